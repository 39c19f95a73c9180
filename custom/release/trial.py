"""A release as its user meets it: unpacked, in an environment with the packages its metadata names and no others."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from custom.case import CaseError
from custom.release.assemble import read_json
from custom.release.checks import requirements

__all__ = ["make_environment", "try_out"]

logger = logging.getLogger("custom.release")

RESULTS = ("RTDOSE.dcm", "dose.nii.gz", "report.html", "report.json")
SHAPE = ("48", "48", "24")  # a coarse patient: what is tried is the release, not the network
COVERAGE = (0.7, 1.3)  # mean dose of the highest target, shares of its prescription, in which a prediction makes sense


def make_environment(folder: Path, metadata: dict, interpreter: str = sys.executable) -> Path:
    """A virtual environment with exactly the packages that the metadata names, and what they pull in.

    Args:
        folder: made when missing; taken as it is when it was made for the same packages.
        metadata: of the bundle.
        interpreter: the Python to make it with, such as the zoo's ``python3.10``.

    Returns:
        Its Python.

    Raises:
        CaseError: there is no such interpreter, or pip cannot install them.
    """
    pins = requirements(metadata)
    stamp = folder / f".installed-{hashlib.sha256(' '.join([interpreter, *pins]).encode()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    if stamp.is_file():
        return python.absolute()
    logger.info("making the environment %s with %s (minutes, network needed)", folder, ", ".join(pins))
    try:
        subprocess.run([interpreter, "-m", "venv", "--clear", str(folder)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CaseError(f"release: {interpreter} makes no virtual environment: {getattr(error, 'stderr', error)}; "
                        "name a Python 3.10 to 3.12") from error
    done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins],
                          capture_output=True, text=True)
    if done.returncode:
        raise CaseError(f"release: pip cannot install what metadata.json names: {done.stderr[-2000:]}")
    stamp.touch()
    return python.absolute()


def try_out(archive: Path, python: Path) -> str:
    """Unpack a release, write a synthetic patient with it, predict its dose by the model card's command.

    Args:
        archive: the zip.
        python: of an environment that does not know this repository.

    Returns:
        What was predicted.

    Raises:
        CaseError: a command fails, a result is missing or the dose makes no sense.
    """
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        (bundle,) = Path(folder).iterdir()
        place = _run(python, bundle, "-c", "import custom; print(custom.__file__)").strip().splitlines()[-1]
        if Path(place).resolve().parents[1] != bundle.resolve():
            raise CaseError(f"release: {python} imports custom from {place}, not from the unpacked release; give an "
                            "environment without it")
        studies, results = Path(folder) / "studies", Path(folder) / "results"
        _run(python, bundle, "-m", "custom.phantom", str(studies), "--site", "HeadNeck", "--no-dose", "--shape", *SHAPE)
        _run(python, bundle, "-m", "monai.bundle", "run", "inference", "--config_file", "configs/inference.json",
             "--dataset_dir", str(studies), "--output_dir", str(results))
        (case,) = results.iterdir()
        missing = [name for name in RESULTS if not (case / name).is_file() or not (case / name).stat().st_size]
        if missing:
            raise CaseError(f"release: the run ended without {missing}")
        return _judged(read_json(case / "report.json"))


def _judged(report: dict) -> str:
    """The mean dose of the highest target, if it is one that a prediction could have."""
    target, prescribed_gy = max(report["prescription_gy"].items(), key=lambda item: item[1])
    mean_gy = next(s for s in report["structures"] if s["name"] == target)["metrics"]["Mean[Gy]"]["predicted"]
    low, high = (share * prescribed_gy for share in COVERAGE)
    if not low <= mean_gy <= high:
        raise CaseError(f"release: predicted {mean_gy:.1f} Gy on average in {target}, prescribed {prescribed_gy:g} Gy; "
                        f"expected {low:.1f} to {high:.1f} Gy. Are these trained weights?")
    return f"{report['case']}: mean dose of {target} {mean_gy:.1f} Gy of {prescribed_gy:g} Gy"


def _run(python: Path, cwd: Path, *arguments: str) -> str:
    env = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS") if key in os.environ}
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise CaseError(f"release: `{' '.join(arguments)[:200]}` failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout
