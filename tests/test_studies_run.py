"""The studies through MONAI's runner, with the shipped weights, on two coarse synthetic patients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from custom.phantom import make_case, with_dose, write_study
from custom.physics.fluence import plan_dose

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [str(ROOT / "bundle" / "configs" / name) for name in ("inference.json", "studies.json")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("patients")
    for seed in (1, 2):
        case = make_case("HeadNeck", seed, spacing_mm=(6.0, 6.0, 6.0), shape=(64, 64, 32))
        dose = plan_dose(case, beamlet_mm=8.0, iterations=25, normalise=True).dose_gy
        write_study(with_dose(case, dose), folder / f"p{seed}", patient_id=f"p{seed}")
    return folder


def run(what: str, patients: Path, out: Path, *options: str, overlays: tuple[str, ...] = ()) -> dict:
    files = [*CONFIGS, *(str(ROOT / "bundle" / "configs" / name) for name in overlays)]
    command = [sys.executable, "-m", "monai.bundle", "run", what, "--config_file", str(files), "--dataset_dir",
               str(patients), "--output_dir", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / f"{what}.json").read_text())


def test_steps(patients, tmp_path):
    found = run("steps", patients, tmp_path)
    first = ["plan prior alone", "prior without the broad branch", "1 step without the DVH estimate", "1 step"]
    assert list(found)[:4] == first and len(found) == 9
    assert all(row["cases"] == 2 and 0 < row["dose_score"] < 20 for row in found.values())
    # these references come from the plan prior's own engine
    assert found["plan prior alone"]["dose_score"] < 6
    assert found["1 step"]["dose_score"] != found["8 steps"]["dose_score"]


def test_robustness(patients, tmp_path):
    found = run("robustness", patients, tmp_path, "--every", "2")
    assert found["all inputs"]["cases"] == 1 and found["without CT"]["cases"] == 1
    assert found["without CT"]["dose_score"] != found["all inputs"]["dose_score"]


def test_calibration(patients, tmp_path):
    found = run("calibration", patients, tmp_path, "--calibration_samples", "3", "--calibration_steps", "2")
    assert [row["level"] for row in found["reliability"]] == [0.5, 0.8, 0.95]
    assert all(0 < row["calibrated"] <= 1 for row in found["reliability"])
    scale, floor_gy = found["std_calibration"]
    assert scale > 0 and floor_gy > 0
    assert found["dvh_metrics"]["number"] > 20 and found["dvh_metrics"]["expected"] == 0.5  # of three samples


def test_benchmark(patients, tmp_path):
    found = run("benchmark", patients, tmp_path, "--every", "2")
    stages = [row["stage"] for row in found["stages"]]
    assert {"reading", "conditions with the plan prior", "network, 1 step", "8 steps", "C3D-sized cascade"} <= {*stages}
    assert len(list(tmp_path.glob("*/RTDOSE.dcm"))) == 1


def test_edited_limits(patients, tmp_path):
    """A cord limit of 30 Gy instead of 45 lowers the maximum of the cord, through the plan prior."""
    found = run("limits", patients, tmp_path, "--every", "2", overlays=("protocol_studies.json",))
    cord = {way: row["SpinalCord Max[Gy]"] for way, row in found.items()}
    assert cord["plan prior alone, cord 45 to 30 Gy"] < cord["plan prior alone"] - 2
    assert cord["cord 45 to 30 Gy"] < cord["limits as they are"] - 2


def test_guidance(patients, tmp_path):
    """Every strength is measured, and guidance changes the dose."""
    found = run("guidance", patients, tmp_path, "--every", "2", overlays=("protocol_studies.json",))
    scores = [row["dose_score"] for way, row in found.items() if "cord" not in way]
    assert len(found) == 5 and all(row["cases"] == 1 for row in found.values())
    assert len(scores) == len(set(scores)) == 4  # the cord alone may be below its limit already
