"""Numbers stay the same: from run to run, in half the precision, in windows, and with the oldest packages.

``make test-second`` makes the environment of the last one (``DOSE_SECOND_PYTHON``) and runs the slow tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from custom.phantom import make_case, write_study
from tests.bad_input.bundle_runs import CONFIGS, ROOT, small_network

WEIGHTS = ROOT / "bundle" / "models" / "model.pt"
SECOND = os.environ.get("DOSE_SECOND_PYTHON")
AGREE_GY = 0.1
ROUNDING_GY = 0.001
FLOAT32 = {"autocast_dtype": "$None"}  # the default is what the processor has
VERSIONS = ("import sys, numpy, pydicom, torch; "
            "print(*sys.version_info[:2], numpy.__version__, pydicom.__version__, torch.__version__)")
needs_weights = pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no trained weights at {WEIGHTS}")


@pytest.fixture(scope="module")
def coarse(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coarse") / "case"
    write_study(make_case("HeadNeck", 3, shape=(40, 40, 20)), folder, patient_id="ID")
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A synthetic patient on voxels like those of the training data, 4 x 4 x 5 mm."""
    folder = tmp_path_factory.mktemp("study") / "case"
    write_study(make_case("HeadNeck", 3), folder, patient_id="ID")
    return folder


def predict(study: Path, out: Path, *overlays: Path, python: str = sys.executable, **options: object) -> Path:
    """Folder of the results of a run in a process of its own; ``inferer__a=1`` stands for ``--inferer#a 1``."""
    files = [str(CONFIGS / "inference.json"), *map(str, overlays)]
    options = {"config_file": str(files), "dataset_dir": study, "output_dir": out, "device": "cpu", **options}
    flags = [text for key, value in options.items() for text in (f"--{key.replace('__', '#')}", str(value))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([python, "-m", "monai.bundle", "run", "inference", *flags], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / study.name


def volume(results: Path, name: str = "dose.nii.gz") -> np.ndarray:
    return np.asarray(nib.load(results / name).dataobj)


def difference(first: Path, second: Path) -> tuple[float, float]:
    """Mean and largest difference in Gy of two doses, inside the body."""
    a, b = volume(first), volume(second)
    inside = (a > 0) | (b > 0)
    gap = np.abs(a.astype(np.float64) - b)[inside]
    assert inside.any()
    return float(gap.mean()), float(gap.max())


def test_one_seed_gives_the_same_bits_twice(coarse, tmp_path):
    """With samples drawn from noise; every number but dates and identifiers is the same."""
    overlay = small_network(tmp_path / "network")
    first, second = (predict(coarse, tmp_path / name, overlay, num_samples=2, num_inference_steps=2) for name in "ab")
    for name in ("dose.nii.gz", "dose_std.nii.gz"):
        assert volume(first, name).max() > 0
        assert volume(first, name).tobytes() == volume(second, name).tobytes()
    stored = [pydicom.dcmread(results / "RTDOSE.dcm") for results in (first, second)]
    assert stored[0].PixelData == stored[1].PixelData and stored[0].DoseGridScaling == stored[1].DoseGridScaling
    assert stored[0].SOPInstanceUID != stored[1].SOPInstanceUID
    assert (first / "report.json").read_bytes() == (second / "report.json").read_bytes()


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory) -> Path:
    """The shipped network's prediction, in float32 and of the whole volume at once."""
    return predict(study, tmp_path_factory.mktemp("whole"), **FLOAT32)


@needs_weights
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FLOAT32["autocast_dtype"], "bfloat16"])
def test_the_shipped_network_gives_the_same_bits_twice(study, tmp_path, dtype):
    first, again = (predict(study, tmp_path / name, autocast_dtype=dtype) for name in "ab")
    assert volume(first).tobytes() == volume(again).tobytes()


@needs_weights
@pytest.mark.slow
def test_bfloat16(study, whole, tmp_path, capsys):
    mean, largest = difference(whole, predict(study, tmp_path, autocast_dtype="bfloat16"))
    with capsys.disabled():
        print(f"\nbfloat16 against float32: mean {mean:.4f}, max {largest:.4f} Gy")
    assert mean > 0 and largest < AGREE_GY


@needs_weights
@pytest.mark.slow
def test_windows(study, whole, tmp_path, capsys):
    mean, largest = difference(whole, predict(study, tmp_path, roi_size=[64, 64, 48], overlap_voxels=16, **FLOAT32))
    with capsys.disabled():
        print(f"\nwindows against the whole volume: mean {mean:.4f}, max {largest:.4f} Gy")
    assert largest < ROUNDING_GY  # the prior is predicted in windows of its own, and one step is the prior


@needs_weights
@pytest.mark.slow
@pytest.mark.skipif(not SECOND, reason="make test-second makes the other environment")
def test_another_set_of_packages(study, whole, tmp_path, capsys):
    """Python 3.10, pydicom 2.4 and numpy 1.26 give the newest ones' dose."""
    versions = subprocess.run([SECOND, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.split()
    assert versions[2].startswith("1.26.") and versions[3].startswith("2.4."), versions
    mean, largest = difference(whole, predict(study, tmp_path, python=SECOND, **FLOAT32))
    with capsys.disabled():
        print(f"\n{' '.join(versions)} against this environment: mean {mean:.6f}, max {largest:.6f} Gy")
    assert largest < AGREE_GY
