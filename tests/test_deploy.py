"""The MONAI Deploy application on a CPU, from a DICOM study to an RTDOSE; in MONAI Deploy's own environment.

``make test-deploy`` builds that environment and runs this file. ``$DOSE_DEPLOY_PYTHON`` names its interpreter; by
default it is ``.venv-deploy/bin/python``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest

from custom.io import read_case
from custom.io.rtdose import read_rtdose
from custom.phantom import make_case, write_study

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("DOSE_DEPLOY_PYTHON") or ROOT / ".venv-deploy" / "bin" / "python")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no MONAI Deploy environment at {PYTHON}: make test-deploy"),
    pytest.mark.skipif(not (ROOT / "bundle" / "models" / "model.pt").is_file(), reason="no trained weights"),
]


def deploy(study: Path, out: Path, *, app: Path = ROOT / "apps" / "deploy", model: Path = ROOT / "bundle",
           code: Path = ROOT, **options) -> subprocess.CompletedProcess:
    """The documented command; ``options`` go through ``DOSE_OPTIONS``."""
    out.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(code), "DOSE_OPTIONS": json.dumps(options) if options else ""}
    command = [str(PYTHON), str(app), "-i", str(study), "-o", str(out), "-m", str(model)]
    return subprocess.run(command, cwd=out, env=env, capture_output=True, text=True, timeout=3600)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A coarse synthetic patient: CT, RTSTRUCT and RTPLAN, no dose."""
    case = make_case("HeadNeck", 3, shape=(48, 48, 24))
    return write_study(case, tmp_path_factory.mktemp("dicom") / "patient_3", patient_id="DEPLOY_3")


@pytest.fixture(scope="module")
def deployed(study, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("deployed")
    done = deploy(study, out)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (case,) = out.iterdir()
    return case


def test_writes_the_dose_that_the_runner_writes(deployed, study, tmp_path):
    config = ROOT / "bundle" / "configs" / "inference.json"
    command = [sys.executable, "-m", "monai.bundle", "run", "inference", "--config_file", str(config),
               "--dataset_dir", str(study), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    (expected,) = tmp_path.iterdir()
    assert sorted(path.name for path in deployed.iterdir()) == sorted(path.name for path in expected.iterdir())
    dose, reference = read_rtdose(deployed / "RTDOSE.dcm"), read_rtdose(expected / "RTDOSE.dcm")
    assert dose.grid.same_as(reference.grid)
    error = np.abs(dose.gy - reference.gy)  # other versions of numpy and torch
    assert error.max() < 0.3 and error.mean() < 0.01
    assert dose.gy.max() > 60.0


def test_the_rtdose_belongs_to_the_study(deployed, study):
    dataset = pydicom.dcmread(deployed / "RTDOSE.dcm")
    ct = pydicom.dcmread(next((study / "CT").glob("*.dcm")), stop_before_pixels=True)
    plan = pydicom.dcmread(study / "RTPLAN.dcm")
    assert dataset.StudyInstanceUID == ct.StudyInstanceUID
    assert dataset.FrameOfReferenceUID == ct.FrameOfReferenceUID and dataset.PatientID == "DEPLOY_3"
    assert dataset.ReferencedRTPlanSequence[0].ReferencedSOPInstanceUID == plan.SOPInstanceUID
    grid, own = read_rtdose(deployed / "RTDOSE.dcm").grid, read_case(study).grid
    np.testing.assert_allclose(grid.spacing_mm, own.spacing_mm, atol=1e-3)


def test_options_come_through_the_environment_without_a_plan(study, tmp_path):
    """CT and RTSTRUCT alone: beams by name, the prescription by number."""
    alone = tmp_path / "patient_3"
    shutil.copytree(study, alone, ignore=shutil.ignore_patterns("RTPLAN.dcm"))
    done = deploy(alone, tmp_path / "out", prescription_gy=60, default_beams="imrt7")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    report = json.loads((tmp_path / "out" / "patient_3" / "report.json").read_text())
    assert "60" in json.dumps(report) and "imrt7" in json.dumps(report)
    peak = read_rtdose(tmp_path / "out" / "patient_3" / "RTDOSE.dcm").gy.max()
    assert 54.0 < peak < 75.0


@pytest.mark.parametrize(("missing", "says"), [("RTSTRUCT.dcm", "no RTSTRUCT"), ("CT", "no CT image")])
def test_a_study_without_its_parts_is_refused(study, tmp_path, missing, says):
    part = tmp_path / "part"
    shutil.copytree(study, part, ignore=shutil.ignore_patterns(missing))
    done = deploy(part, tmp_path / "out")
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_an_unknown_option_is_refused(study, tmp_path):
    done = deploy(study, tmp_path / "out", prescripton_gy=60)
    assert done.returncode != 0
    assert "expected a JSON object with some of prescription_gy" in done.stdout + done.stderr


def test_the_package_folder_runs_by_itself(study, tmp_path, deployed):
    """What the packager puts into a container: its own code, and the models folder with the bundle one level down."""
    done = subprocess.run([str(PYTHON), str(ROOT / "apps" / "deploy" / "make_package.py"), str(tmp_path / "map")],
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    app = tmp_path / "map" / "app"
    (app / "custom" / "seen.py").write_text("")
    where = subprocess.run([str(PYTHON), "-c", "import custom.seen as s; print(s.__file__)"], cwd=app,
                           capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": ""})
    assert where.stdout.strip() == str(app / "custom" / "seen.py")  # and not the repository's
    done = deploy(study, tmp_path / "out", app=app, model=tmp_path / "map" / "models", code=app)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    dose, expected = (read_rtdose(path / "RTDOSE.dcm").gy for path in (tmp_path / "out" / "patient_3", deployed))
    np.testing.assert_allclose(dose, expected, atol=1e-3)


def test_the_packager_takes_the_folders_as_far_as_docker(tmp_path):
    """Up to its first call of docker: a stand-in that fails takes docker's place, an invented list of images NVIDIA's.

    That an image is built and runs is not tested here.
    """
    subprocess.run([str(PYTHON), str(ROOT / "apps" / "deploy" / "make_package.py"), str(tmp_path / "map")], check=True,
                   capture_output=True, timeout=900)
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text("#!/bin/sh\necho no docker here >&2\nexit 125\n")
    docker.chmod(0o755)
    images = {kind: {"x64-workstation": "image"} for kind in ("igpu", "dgpu", "cpu")}
    listed = {"wheel-version": "1", "debian-version": "1", "base-images": images, "build-images": images}
    ask = "from importlib.metadata import version; print(version('holoscan-cu13'))"
    version = subprocess.run([str(PYTHON), "-c", ask], capture_output=True, text=True, timeout=600).stdout.strip()
    (tmp_path / "images.json").write_text(json.dumps({version: {"holoscan": listed}}))
    command = [str(PYTHON.with_name("monai-deploy")), "package", "map/app", "-c", "map/app/app.yaml", "-m",
               "map/models", "-t", "rt_ct_dose_prediction:0.1.0", "--platform", "x86_64", "--source", "images.json"]
    path = os.pathsep.join([str(docker.parent), str(PYTHON.parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True,
                          timeout=1800)
    said = done.stdout + done.stderr
    assert "Detected application type: Python Module" in said and "Generating pkg.json" in said, said[-3000:]
    assert done.returncode != 0 and "no docker here" in said
