"""The bundle through MONAI's own runner, on synthetic patients: the commands that the README names."""

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
from monai.bundle import ConfigParser, load, verify_net_in_out

from custom.phantom import make_case, with_dose, write_study
from custom.physics.fluence import plan_dose

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "bundle" / "configs"
WEIGHTS = ROOT / "bundle" / "models" / "model.pt"
needs_weights = pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no trained weights at {WEIGHTS}")


def command(run_id: str, *overlays: str, **options) -> list[str]:
    """The README's command line for a run."""
    files = [str(CONFIGS / name) for name in ("inference.json", *overlays)]
    config = files[0] if len(files) == 1 else str(files)
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", config, *flags]


def run(*args: str, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(command(*args, **options), cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    """Four coarse synthetic patients with a planned dose, as DICOM: three head and neck, one lung."""
    folder = tmp_path_factory.mktemp("studies")
    for site, seed in (("HeadNeck", 3), ("HeadNeck", 4), ("HeadNeck", 5), ("Lung", 1)):
        case = make_case(site, seed, shape=(48, 48, 24))
        plan = plan_dose(case, beamlet_mm=10.0, iterations=15, normalise=True)
        # a share of what the plan prior's own engine gives, so that there is something to learn
        patient = with_dose(case, 0.8 * plan.dose_gy)
        write_study(patient, folder / f"{site}_{seed}", patient_id=f"{site}_{seed}", fluence=plan)
    return folder


@pytest.fixture(scope="module")
def inferred(studies, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results")
    done = run("inference", dataset_dir=studies / "HeadNeck_3", output_dir=out)
    assert done.returncode == 0, done.stderr[-3000:]
    (case,) = out.iterdir()
    return case


@needs_weights
def test_inference_writes_every_result(inferred):
    assert {path.name for path in inferred.iterdir()} == {"RTDOSE.dcm", "dose.nii.gz", "report.json", "report.html"}
    report = json.loads((inferred / "report.json").read_text())
    assert report["prescription_gy"] == {"PTV_7000": 70.0, "PTV_5600": 56.0}


@needs_weights
def test_rtdose_and_nifti_agree_in_patient_coordinates(inferred):
    rtdose = pydicom.dcmread(inferred / "RTDOSE.dcm")
    frames = rtdose.pixel_array * float(rtdose.DoseGridScaling)
    nifti = nib.load(inferred / "dose.nii.gz")
    volume, to_index = nifti.get_fdata(), np.linalg.inv(nifti.affine)
    rng = np.random.default_rng(0)
    for k, row, column in rng.integers(0, frames.shape, size=(200, 3)):
        x, y, z = np.array(rtdose.ImagePositionPatient, dtype=float)
        x += column * float(rtdose.PixelSpacing[1])
        y += row * float(rtdose.PixelSpacing[0])
        z += float(rtdose.GridFrameOffsetVector[k])
        index = np.rint(to_index @ [-x, -y, z, 1])[:3].astype(int)
        assert abs(frames[k, row, column] - volume[tuple(index)]) < 0.01


@needs_weights
def test_the_demo_case_gets_a_real_prediction(inferred, studies):
    """Within 6 Gy on average where the reference exceeds 5 Gy.

    The reference is the engine's own plan, as the plan prior is: this shows that everything runs. That the network adds
    to the prior, on clinical doses, is seen in ``test_weights.py``.
    """
    volume = nib.load(inferred / "dose.nii.gz").get_fdata()
    case = make_case("HeadNeck", 3, shape=(48, 48, 24))
    reference = plan_dose(case, beamlet_mm=10.0, iterations=15, normalise=True).dose_gy
    inside = reference > 5.0
    assert np.abs(volume - reference)[inside].mean() < 6.0
    assert not volume[~case.body].any()


@needs_weights
def test_evaluate_writes_the_scores(studies, tmp_path):
    done = run("evaluate", "evaluate.json", dataset_dir=studies / "HeadNeck_4", output_dir=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0.0 < metrics["dose_score"] < 8.0 and metrics["dvh_score"] > 0.0
    assert (tmp_path / "metrics.csv").is_file()


def test_without_weights_nothing_is_predicted(studies, tmp_path):
    done = run("inference", dataset_dir=studies / "HeadNeck_3", output_dir=tmp_path, weights=tmp_path / "none.pt")
    assert done.returncode != 0
    assert "no weights at" in done.stderr and "not trained" in done.stderr
    assert not list(tmp_path.iterdir())


@needs_weights
def test_weights_fit_the_network_of_the_config():
    net = load("bundle", bundle_dir=str(ROOT), workflow_type="inference", source="github", load_ts_module=False)
    assert sum(p.numel() for p in net.parameters()) > 1e6


def test_network_meets_the_declared_format():
    verify_net_in_out("network_def", config_file=str(CONFIGS / "inference.json"),
                      meta_file=str(CONFIGS / "metadata.json"), device="cpu", any=32)


def test_metadata_names_the_channels_of_the_config():
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    channels = parser.get_parsed_content("condition_channels")
    declared = json.loads((CONFIGS / "metadata.json").read_text())["network_data_format"]["inputs"]["image"]
    assert list(declared["channel_def"].values()) == channels and declared["num_channels"] == len(channels)


def history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_training_in_stages_survives_a_kill(studies, tmp_path):
    """All stages on synthetic cases; the second one is killed in the middle and goes on where it was."""
    options = {"dataset_dir": studies, "validation_share": 0.2}
    vae = tmp_path / "vae"
    done = run("train_autoencoder", "train.json", "train_autoencoder.json", "smoke.json", output_dir=vae, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "dose"
    options |= {"cache_dir": vae / "cache", "vae_weights": vae / "model.pt", "output_dir": out, "val_interval": 1}
    options["compiled"] = {"prior": {"backend": "eager"}}
    first = subprocess.Popen(command("train", "train.json", "smoke.json", **options), cwd=ROOT,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / "checkpoint.pt").is_file() and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (out / "checkpoint.pt").is_file()
    done = run("train", "train.json", "smoke.json", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = history(out)
    assert [int(row["epoch"]) for row in rows if row["name"] == "loss"] == [1, 2, 3, 4]
    scores = [float(row["value"]) for row in rows if row["name"] == "dose_score"]
    assert len(scores) == 4 and scores[-1] < 0.95 * scores[0]
    state = torch.load(out / "model.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert state["broad.share"] == 0
    broad = tmp_path / "broad"
    del options["compiled"]
    options |= {"output_dir": broad, "init_weights": out / "model.pt", "steps_per_epoch": 20, "broad_share": 0.25}
    done = run("train_broad", "train.json", "train_broad.json", "smoke.json", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    loss = [float(row["value"]) for row in history(broad) if row["name"] == "loss"]
    assert len(loss) == 4 and loss[-1] < 0.9 * loss[0]
    after = torch.load(broad / "model.pt", weights_only=True)
    assert after["broad.share"] == 0.25
    assert all(torch.equal(value, after[name]) == (not name.startswith("broad.")) for name, value in state.items())
    last = tmp_path / "dvh"
    options = {k: options[k] for k in ("dataset_dir", "validation_share", "cache_dir")} | {"folds": 2}
    short = {"network_def#broad#members": 1, "network_def#broad#fine_members": 0, "validate#cached#data#limit": 1,
             "max_epochs": 1, "steps_per_epoch": 20}
    for fold in range(2):
        left = {"output_dir": tmp_path / f"fold{fold}", "fold": fold}
        done = run("train_broad", "train.json", "train_broad.json", "smoke.json", **options, **short, **left)
        assert done.returncode == 0, done.stderr[-3000:]
    options |= {"output_dir": last, "init_weights": broad / "model.pt", "dvh_share": 0.4,
                "fold_def": {"members": 1, "width": 16},
                "fold_weights": [str(tmp_path / f"fold{fold}" / "model.pt") for fold in range(2)]}
    done = run("train_dvh", "train.json", "train_dvh.json", "smoke.json", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    with (last / "dvh_estimate.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {"target_high", "SpinalCord"} <= {row["structure"] for row in rows}
    assert all(float(row["left_out_error_gy"]) < 10 for row in rows)
    fitted = torch.load(last / "model.pt", weights_only=True)
    assert fitted["dvh.share"] == pytest.approx(0.4) and after["dvh.share"] == 0
    assert all(torch.equal(value, fitted[name]) for name, value in after.items() if not name.startswith("dvh."))
