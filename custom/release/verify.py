"""All checks of a release, in order, and what each saw; one that was not run is told apart from one that passed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from custom.case import CaseError
from custom.release.assemble import files_of
from custom.release.checks import CHECKS, check_installable, check_schema

__all__ = ["Result", "run_checkout", "verify"]

logger = logging.getLogger("custom.release")

PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"
PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True)
class Result:
    """One check's outcome.

    Args:
        name: of the check.
        status: "passed", "FAILED" or "not run".
        text: what it saw, what was wrong, or why it was not run.
    """

    name: str
    status: str
    text: str


def verify(bundle: Path, schema: Path | None = None, online: bool = False,
           checkout: Path | None = None) -> list[Result]:
    """Check an assembled bundle; every check is tried, whatever the others found.

    Args:
        bundle: folder of the release.
        schema: copy of the zoo's metadata schema; without one, and offline, that check is not run.
        online: also ask the package index whether the pins can be installed, and the schema's address for it.
        checkout: of Project-MONAI/model-zoo, whose own verifier is then run too.
    """
    results = [_tried(name, lambda check=check: check(bundle)) for name, check in CHECKS.items()]
    if schema is not None or online:
        results.append(_tried("schema", lambda: check_schema(bundle, schema)))
    else:
        results.append(Result("schema", NOT_RUN, "no copy of the zoo's schema; give SCHEMA=FILE, or ONLINE=1"))
    if online:
        results.append(_tried("pins installable", lambda: check_installable(bundle)))
    else:
        results.append(Result("pins installable", NOT_RUN, "asks the package index; give ONLINE=1"))
    results += run_probe(bundle)
    if checkout is not None:
        results.append(_tried("the zoo's own verifier", lambda: run_checkout(bundle, checkout, schema)))
    else:
        results.append(Result("the zoo's own verifier", NOT_RUN, "give ZOO=FOLDER, a checkout of the model zoo"))
    for result in results:
        log = logger.error if result.status == FAILED else logger.info
        log("%-8s %-26s %s", result.status, result.name, result.text)
    return results


def run_probe(bundle: Path) -> Iterator[Result]:
    """What MONAI does with the bundle, by the bundle's own code in a Python of its own."""
    with _copied(bundle) as copy, tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        done = subprocess.run([sys.executable, "-", str(target)], input=PROBE.read_text(encoding="utf-8"), cwd=copy,
                              env=clean_environment(), capture_output=True, text=True)
        if not target.is_file():
            yield Result("probe", FAILED, f"ended without a result: {done.stderr[-1500:]}")
            return
        for name, found in json.loads(target.read_text(encoding="utf-8")).items():
            yield Result(name, PASSED if found["ok"] else FAILED, found["text"])


def run_checkout(bundle: Path, checkout: Path, schema: Path | None) -> str:
    """The zoo's ``ci/verify_bundle.py`` in full mode, on a copy of its checkout that holds the bundle.

    As every diffusion bundle, this one is listed among those that cannot be scripted.

    Raises:
        CaseError: no such checkout, or its verifier complains.
    """
    name = bundle.name.partition("_v")[0]
    script = checkout / "ci" / "verify_bundle.py"
    lists = checkout / "ci" / "bundle_custom_data.py"
    for path in (script, lists):
        if not path.is_file():
            raise CaseError(f"zoo: {path} is missing; expected a checkout of Project-MONAI/model-zoo")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "zoo"
        shutil.copytree(checkout / "ci", copy / "ci")
        _copy_bundle(bundle, copy / "models" / name)
        info = checkout / "models" / "model_info.json"
        (copy / "models" / "model_info.json").write_text(info.read_text() if info.is_file() else "{}")
        if schema is not None:
            (copy / "models" / name / "eval").mkdir()
            shutil.copyfile(schema, copy / "models" / name / "eval" / "schema.json")
        text = (copy / "ci" / lists.name).read_text(encoding="utf-8")
        start = "exclude_verify_torchscript_list = ["
        if start not in text:
            raise CaseError(f"zoo: {lists} has no {start!r}; its verifier has changed, see what it wants now")
        (copy / "ci" / lists.name).write_text(text.replace(start, f'{start}\n    "{name}",'), encoding="utf-8")
        done = subprocess.run([sys.executable, "ci/verify_bundle.py", "-b", name, "-m", "full"], cwd=copy,
                              env=clean_environment(), capture_output=True, text=True)
    if done.returncode:
        raise CaseError(f"zoo: its verifier says: {(done.stdout + done.stderr)[-2000:]}")
    return " ".join(line for line in done.stdout.splitlines() if "verified" in line or "skip" in line)


def clean_environment() -> dict[str, str]:
    """This environment without what would let another ``custom`` in, or an experiment's settings."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


@contextlib.contextmanager
def _copied(bundle: Path) -> Iterator[Path]:
    """A copy of the bundle, so that what checks leave behind does not become part of it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / bundle.name
        _copy_bundle(bundle, copy)
        yield copy


def _copy_bundle(bundle: Path, target: Path) -> None:
    for path in files_of(bundle):
        copy = target / path.relative_to(bundle)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _tried(name: str, check: Callable[[], str]) -> Result:
    try:
        return Result(name, PASSED, check())
    except CaseError as error:
        return Result(name, FAILED, str(error))
