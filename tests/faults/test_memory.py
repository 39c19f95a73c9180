"""The memory of a large case: a CT of 512 x 512 x 400 voxels with 40 structures, read and predicted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input.bundle_runs import CONFIGS, ROOT, command, small_network
from tests.faults.large_study import SHAPE, STRUCTURES, write_large_study

MAX_READ_MB, MAX_RUN_MB = 3000, {"small untrained": 4500, "shipped": 4700}
READ = "import sys; from custom.io import read_case; case = read_case(sys.argv[1]); sys.exit(len(case.masks))"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return write_large_study(tmp_path_factory.mktemp("large") / "large")


def peak_mb(arguments: list[str], log: Path) -> tuple[int, int, float]:
    """Exit code, largest resident memory in MB and seconds of CPU of a process."""
    run = subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log.open("w"),
                           stderr=subprocess.STDOUT)
    _, status, usage = os.wait4(run.pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss // 1024, usage.ru_utime


def test_memory_of_reading(study, tmp_path, capsys):
    code, peak, seconds = peak_mb([sys.executable, "-c", READ, str(study)], tmp_path / "log")
    assert code == STRUCTURES, (tmp_path / "log").read_text()[-2000:]
    with capsys.disabled():
        print(f"\nreading {SHAPE} voxels with {STRUCTURES} structures: peak {peak} MB, {seconds:.0f} s CPU")
    assert peak < MAX_READ_MB


@pytest.mark.parametrize("network", MAX_RUN_MB)
def test_memory_of_a_whole_run(study, tmp_path, capsys, network):
    overlay = small_network(tmp_path / "network") if network != "shipped" else CONFIGS / "inference.json"
    arguments = command(overlay, dataset_dir=study, output_dir=tmp_path / "out")
    code, peak, seconds = peak_mb(arguments, tmp_path / "log")
    assert code == 0, (tmp_path / "log").read_text()[-2000:]
    with capsys.disabled():
        print(f"\npredicting {SHAPE} voxels with {STRUCTURES} structures, {network} network: peak {peak} MB, "
              f"{seconds:.0f} s CPU")
    assert peak < MAX_RUN_MB[network]
