"""SIGKILL at random moments of batch inference and of training: nothing is half written, the next run goes on.

``FAULT_KILLS`` times each (``make faults``: 20), at moments drawn from ``FAULT_SEED``.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from custom.phantom import make_case, with_dose, write_study
from custom.physics.fluence import plan_dose
from tests.bad_input.bundle_runs import CONFIGS, ROOT, command, small_network

KILLS, SEED = int(os.environ.get("FAULT_KILLS", 3)), int(os.environ.get("FAULT_SEED", 0))
FILES = {"RTDOSE.dcm", "dose.nii.gz", "report.json", "report.html"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    for seed in (3, 4, 5, 6):
        case = make_case("HeadNeck", seed, shape=(40, 40, 20))
        plan = plan_dose(case, beamlet_mm=10.0, iterations=10, normalise=True)
        write_study(with_dose(case, plan.dose_gy), folder / f"case_{seed}", patient_id=f"ID{seed}", fluence=plan)
    return folder


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=log.open("a"), stderr=subprocess.STDOUT,
                            start_new_session=True)


def kill(process: subprocess.Popen) -> None:
    """The process and the workers it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def visible(out: Path) -> list[Path]:
    """Folders of results."""
    return [p for p in out.iterdir() if not p.name.startswith(".")] if out.is_dir() else []


def check_results(out: Path) -> int:
    """Every folder of results that can be seen is whole."""
    for case in visible(out):
        assert {p.name for p in case.iterdir()} == FILES
        dose = pydicom.dcmread(case / "RTDOSE.dcm")
        stored = dose.pixel_array * float(dose.DoseGridScaling)
        volume = nib.load(case / "dose.nii.gz").get_fdata()
        assert stored.size == volume.size and np.isfinite(volume).all()
        assert abs(stored.max() - volume.max()) < 0.01
        json.loads((case / "report.json").read_text())
        assert (case / "report.html").read_text().rstrip().endswith("</html>")
    return len(visible(out))


def test_batch_inference(studies, tmp_path, capsys):
    """Half of the kills fall at any time after the start, half while results are being written."""
    overlay, out, log = small_network(tmp_path / "network"), tmp_path / "out", tmp_path / "log"
    rng = np.random.default_rng(SEED)
    arguments = command(overlay, dataset_dir=studies, output_dir=out, skip_done=True)
    seen, writing, killed, tries = [], 0, 0, 0
    while killed < KILLS:
        process, began = start(arguments, log), time.monotonic()
        if tries % 2:
            wanted = tries // 2 % 4  # of the first case, the second...
            while process.poll() is None and not (list(out.glob(".*.part.*")) and len(visible(out)) >= wanted):
                time.sleep(0.002)
            time.sleep(float(rng.uniform(0, 0.5)))
        else:
            moment = float(rng.uniform(0, 40))
            while process.poll() is None and time.monotonic() - began < moment:
                time.sleep(0.05)
        tries += 1
        assert tries <= 5 * KILLS, "the runs end before they are killed"
        if process.poll() is None:
            kill(process)
            killed += 1
            writing += bool(list(out.glob(".*.part.*")))
        seen.append(check_results(out))
        if seen[-1] == 4:  # all done: begin anew
            for case in visible(out):
                case.rename(tmp_path / f"old_{tries}_{case.name}")
    last = start(arguments, log)
    last.wait()
    assert last.returncode == 0 or "nothing is left to do" in log.read_text()
    assert check_results(out) == 4
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")], "what killed runs left behind is removed"
    with capsys.disabled():
        print(f"\n{killed} kills of batch inference ({writing} while writing; {tries - killed} runs ended before): "
              f"results seen after each {seen}")


def history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open() as stream:
        return list(csv.DictReader(stream))


def check_training(out: Path) -> int:
    """What is there can be read; the epochs that the checkpoint holds."""
    if (out / "history.csv").is_file():
        assert all(float(row["value"]) == float(row["value"]) for row in history(out))
    if (out / "model.pt").is_file():
        state = torch.load(out / "model.pt", weights_only=True)
        assert all(torch.isfinite(value).all() for value in state.values())
    if not (out / "checkpoint.pt").is_file():
        return 0
    return int(torch.load(out / "checkpoint.pt", weights_only=True)["epochs"])


def test_training(studies, tmp_path, capsys):
    """Every kill falls within three seconds of something saved; the last run goes on for two epochs more."""
    out, log = tmp_path / "dose", tmp_path / "log"
    files = str([str(CONFIGS / name) for name in ("inference.json", "train.json", "smoke.json")])
    options = {"dataset_dir": studies, "output_dir": out, "validation_share": 0.3, "val_interval": 2}
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    arguments = [sys.executable, "-m", "monai.bundle", "run", "train", "--config_file", files, *flags, "--max_epochs"]
    rng = np.random.default_rng(SEED)
    epochs = [0]
    for _ in range(KILLS):
        marks = {p: p.stat().st_mtime_ns for p in out.glob("*.pt")}
        process = start([*arguments, "1000"], log)
        while process.poll() is None and {p: p.stat().st_mtime_ns for p in out.glob("*.pt")} == marks:
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 3)))
        assert process.poll() is None, log.read_text()[-3000:]
        kill(process)
        epochs.append(check_training(out))
        assert epochs[-1] >= epochs[-2], "a checkpoint is lost"
    last = start([*arguments, str(epochs[-1] + 2)], log)
    last.wait()
    assert last.returncode == 0, log.read_text()[-3000:]
    assert check_training(out) == epochs[-1] + 2
    assert [int(row["epoch"]) for row in history(out) if row["name"] == "loss"] == list(range(1, epochs[-1] + 3))
    with capsys.disabled():
        print(f"\n{KILLS} kills of training: epochs in the checkpoint after each {epochs[1:]}")
