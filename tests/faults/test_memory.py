"""The memory of a large case: a CT of 512 x 512 x 400 voxels with 40 structures, read and predicted."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from pathlib import Path

import pytest

from custom.io import read_case
from tests.bad_input.bundle_runs import ROOT, command, small_network
from tests.faults.large_study import SHAPE, STRUCTURES, write_large_study

MAX_READ_MB, MAX_RUN_MB = 4000, 8000
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return write_large_study(tmp_path_factory.mktemp("large") / "large")


def reading_peak_mb(path: Path) -> int:
    case = read_case(path)
    assert case.grid.shape == SHAPE and len(case.masks) == STRUCTURES
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def test_memory_of_reading(study, capsys):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        peak = pool.apply(reading_peak_mb, (study,))
    with capsys.disabled():
        print(f"\nreading {SHAPE} voxels with {STRUCTURES} structures: peak {peak} MB")
    assert peak < MAX_READ_MB


def test_memory_of_a_whole_run(study, tmp_path, capsys):
    overlay = small_network(tmp_path / "network")
    run = subprocess.Popen(command(overlay, dataset_dir=study, output_dir=tmp_path / "out"), cwd=ROOT,
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                           stderr=(tmp_path / "stderr").open("w"))
    _, status, usage = os.wait4(run.pid, 0)
    assert status == 0, (tmp_path / "stderr").read_text()[-2000:]
    peak = usage.ru_maxrss // 1024
    with capsys.disabled():
        print(f"\npredicting {SHAPE} voxels with {STRUCTURES} structures: peak {peak} MB, {usage.ru_utime:.0f} s CPU")
    assert peak < MAX_RUN_MB
