"""The other published systems: overlays, the recipe for one more, and, marked slow, all of it through the runner."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from monai.bundle import ConfigParser

from custom.case import CaseError
from custom.phantom import make_case, with_dose, write_study
from custom.physics.fluence import plan_dose
from custom.runner import check_arguments

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "bundle" / "configs"
SYSTEMS = ("dosediff", "magdiff_adc", "unet")
PLAN_CHANNELS = ["plan_prior", "beam_high", "beam_mid", "beam_low"]


def parse(*overlays: str, **options) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in ("inference.json", "train.json", *overlays)])
    parser.update({"device": torch.device("cpu"), "output_dir": "out", **options})
    return parser


def image_of(names: list[str], size=(24, 20, 8)) -> torch.Tensor:
    image = torch.rand(1, len(names), *size, generator=torch.Generator().manual_seed(0))
    for name in ("body", "prescription_level"):
        image[:, names.index(name)] = 1.0
    return image


def step_and_predict(parser: ConfigParser) -> dict[str, torch.Tensor]:
    """One training step of a config's objective, then its inferer: the terms and the dose."""
    names = parser.get_parsed_content("condition_channels")
    network, objective = (parser.get_parsed_content(key) for key in ("network", "objective"))
    image, rois = image_of(names), len(parser.get_parsed_content("roi_names"))
    batch = {"image": image, "label": torch.full_like(image[:, :1], 0.5), "body": torch.ones_like(image[:, :1]),
             "rois": torch.ones(1, rois, *image.shape[2:]), "voxel_cc": torch.tensor([0.04])}
    terms = dict(objective(network.train(), batch))
    sum(terms.values()).backward()
    return {**terms, "dose": parser.get_parsed_content("inferer")(image, network.eval())}


@pytest.mark.parametrize("channels", [[], PLAN_CHANNELS], ids=["published", "with the plan"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_overlay_gives_a_network_that_learns_and_predicts(system, channels):
    parser = parse(f"systems/{system}.json", plan_channels=channels, num_inference_steps=2)
    names = parser.get_parsed_content("condition_channels")
    assert set(channels) <= set(names) and len(set(names)) == len(names)
    found = step_and_predict(parser)
    assert found["dose"].shape == (1, 1, 24, 20, 8) and torch.isfinite(found["dose"]).all()


@pytest.mark.parametrize("form", ["isdm", "tsbdm", "mask"])
def test_distance_form_is_chosen_by_name(form):
    parser = parse("systems/dosediff.json", distance_form=form)
    spatial = parser.get_parsed_content("spatial_channels")
    assert spatial[2:5] == [f"{form}_target_high", f"{form}_target_mid", f"{form}_target_low"]
    assert parser.get_parsed_content("swap_channels")[0] == [f"{form}_Parotid_R", f"{form}_Parotid_L"]
    network = parser.get_parsed_content("network")
    assert [network.names[i] for i in network.distance if not network.names[i].startswith("has_")] == spatial[2:]


def test_published_sizes_build():
    parser = parse("systems/dosediff.json", "systems/dosediff_paper.json")
    network = parser.get_parsed_content("network_def")
    assert network.net.timed and network.net.patch == 1 and network.schedule.parameterization == "epsilon"
    assert len(network.net.dose_encoder.down) == 4  # down-samplings
    assert sum(p.numel() for p in network.parameters()) > 5e7


def test_a_systems_file_serves_all_three_commands(tmp_path):
    for run_id, stage in (("train", ["train.json"]), ("evaluate", ["evaluate.json"]), ("inference", [])):
        files = [str(CONFIGS / name) for name in ("inference.json", *stage, "systems/dosediff.json")]
        check_arguments(["run", run_id, "--config_file", str(files), "--dataset_dir", "d"])
    (tmp_path / "systems").mkdir()
    wrong = tmp_path / "systems" / "typo.json"
    wrong.write_text('{"learning_rat": 1.0}')
    for name in ("inference.json", "train.json", "evaluate.json"):
        (tmp_path / name).write_text((CONFIGS / name).read_text())
    with pytest.raises(CaseError, match="unknown key 'learning_rat'"):
        check_arguments(["run", "inference", "--config_file", str([str(tmp_path / "inference.json"), str(wrong)])])


# ------------------------------------------------------------------------------------------- the page's recipe
def recipe() -> tuple[str, dict]:
    """The page's network file, and its overlay."""
    text = (ROOT / "bundle" / "docs" / "systems.md").read_text(encoding="utf-8")
    text = text[text.index("## How to add a system"):]
    (code,), (overlay,) = (re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for kind in
                           ("python", "json"))
    return code, json.loads(overlay)


def follow_recipe(folder: Path) -> Path:
    """Write both files as the page says; only the package is another, since tests write nothing into the project."""
    code, overlay = recipe()
    (folder / "systems").mkdir(parents=True)
    (folder / "my_system.py").write_text(code)
    overlay["network_def"]["_target_"] = overlay["network_def"]["_target_"].replace("custom.networks.", "")
    path = folder / "systems" / "my_system.json"
    path.write_text(json.dumps(overlay))
    return path


def test_the_recipe_gives_a_network_that_learns_and_predicts(tmp_path, monkeypatch):
    overlay = follow_recipe(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = step_and_predict(parse(str(overlay)))
    assert found["dose"].shape == (1, 1, 24, 20, 8) and float(found["l1"].detach()) > 0


# ------------------------------------------------------------------------------------------- through the runner
def run(run_id: str, *overlays: str | Path, path: Path | None = None, **options) -> None:
    files = [str(CONFIGS / name) for name in ("inference.json", *overlays)]
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    env = {**os.environ, "PYTHONPATH": str(path or ROOT)}
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(files), *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    """Four coarse synthetic patients with a planned dose, as DICOM."""
    folder = tmp_path_factory.mktemp("studies")
    for seed in (3, 4, 5, 6):
        case = make_case("HeadNeck", seed, shape=(48, 48, 24))
        plan = plan_dose(case, beamlet_mm=10.0, iterations=10, normalise=True)
        write_study(with_dose(case, plan.dose_gy), folder / f"hn_{seed}", patient_id=f"hn_{seed}", fluence=plan)
    return folder


SHORT = {"validation_share": 0.5, "val_interval": 2, "max_epochs": 4}
EPOCHS = {"unet": 24}  # nothing bounds its output or plans for it: 4 epochs gave a real patient 235 Gy, 24 gave 71 Gy


@pytest.fixture(scope="module", params=SYSTEMS)
def trained(request, studies, tmp_path_factory) -> tuple[str, Path]:
    """A system after a smoke training: its overlay, and the folder of its weights."""
    out = tmp_path_factory.mktemp(request.param)
    overlay = f"systems/{request.param}.json"
    options = {**SHORT, "max_epochs": EPOCHS.get(request.param, SHORT["max_epochs"])}
    run("train", "train.json", "smoke.json", overlay, dataset_dir=studies, output_dir=out, **options)
    return overlay, out


@pytest.mark.slow
def test_smoke_training_writes_finite_weights_and_scores(trained):
    _, out = trained
    assert all(torch.isfinite(value).all() for value in torch.load(out / "model.pt", weights_only=True).values())
    assert (out / "history.csv").read_text().count("dose_score") >= 2


@pytest.mark.slow
def test_evaluate_scores_the_system(trained, studies):
    overlay, out = trained
    run("evaluate", "evaluate.json", overlay, dataset_dir=studies / "hn_3", output_dir=out)
    (row,) = json.loads((out / "metrics.json").read_text())["per_case"]
    assert {"ssim", "psnr_db", "dosediff_dose_score_gy", "roi_mae/SpinalCord_gy", "prediction_seconds"} <= set(row)
    assert row["prediction_seconds"] > 0


@pytest.mark.slow
def test_real_patient_gets_an_rtdose(trained, shared_dir, tmp_path):
    overlay, out = trained
    unpack = [sys.executable, str(shared_dir / "dicom" / "unpack.py"), str(tmp_path / "data"), "hn_onkodicom"]
    subprocess.run(unpack, check=True, capture_output=True)
    run("inference", overlay, dataset_dir=tmp_path / "data" / "hn_onkodicom", output_dir=tmp_path / "out",
        weights=out / "model.pt", prescription_gy=70, num_inference_steps=2)
    rtdose = pydicom.dcmread(tmp_path / "out" / "hn_onkodicom" / "RTDOSE.dcm")
    dose_gy = rtdose.pixel_array * float(rtdose.DoseGridScaling)
    assert dose_gy.shape == (186, 512, 512) and rtdose.DoseUnits == "GY"
    assert np.isfinite(dose_gy).all() and dose_gy.min() >= 0 and 0 < dose_gy.max() < 100
    warnings = json.loads((tmp_path / "out" / "hn_onkodicom" / "report.json").read_text())["warnings"]
    assert any("hottest voxel" in text for text in warnings) == (dose_gy.max() > 1.25 * 70)


@pytest.mark.slow
def test_the_recipe_runs_by_the_three_commands(studies, tmp_path):
    overlay = follow_recipe(tmp_path)
    path, out = tmp_path, tmp_path / "out"
    for name in ("inference.json", "train.json", "evaluate.json"):  # the overlay's siblings, as in the bundle
        (tmp_path / name).write_text((CONFIGS / name).read_text())
    run("train", "train.json", "smoke.json", overlay, path=path, dataset_dir=studies, output_dir=out, **SHORT)
    run("evaluate", "evaluate.json", overlay, path=path, dataset_dir=studies / "hn_4", output_dir=out)
    run("inference", overlay, path=path, dataset_dir=studies / "hn_4", output_dir=out)
    assert (out / "metrics.json").is_file() and (out / "hn_4" / "RTDOSE.dcm").is_file()


@pytest.mark.slow
def test_studies_of_steps_and_seeds(studies, tmp_path):
    overlay = "systems/dosediff.json"
    run("train", "train.json", "smoke.json", overlay, dataset_dir=studies, output_dir=tmp_path, **SHORT)
    options = {"dataset_dir": studies / "hn_3", "output_dir": tmp_path, "weights": tmp_path / "model.pt"}
    run("step_curve", overlay, "studies.json", "axial_studies.json", curve_steps=[1, 2, 8], **options)
    run("seed_study", overlay, "studies.json", "axial_studies.json", seeds=3, num_inference_steps=2, **options)
    assert set(json.loads((tmp_path / "steps.json").read_text())) == {"1 steps", "2 steps", "8 steps"}
    assert (tmp_path / "steps.png").stat().st_size > 5000
    spread = json.loads((tmp_path / "seed_spread.json").read_text())
    assert spread["seeds"] == 3 and spread["scores"]["mae_body_gy"]["variance"] > 0


@pytest.mark.slow
def test_comparison_makes_table_and_figures(studies, tmp_path):
    """The command of the page with a budget of seconds; ADDiff-Dose with the network of smoke.json."""
    small = tmp_path / "systems" / "small.json"
    small.parent.mkdir()
    small.write_text(json.dumps({"network_def": json.loads((CONFIGS / "smoke.json").read_text())["network_def"]}))
    systems = json.loads((CONFIGS / "comparison.json").read_text())["systems"]
    systems["ADDiff-Dose"]["overlays"] = [str(small)]
    changed = tmp_path / "compared.json"
    changed.write_text(json.dumps({"systems": systems, "train_overlays": ["smoke.json"]}))
    run("comparison", "train.json", "comparison.json", changed, dataset_dir=studies, output_dir=tmp_path / "out",
        train_minutes=0.3, validation_share=0.5)
    table = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(table) == list(systems) and all(entry["parameters"] > 1000 for entry in table.values())
    assert "difference" in table["DoseDiff"]["figures"]["dose_score_gy"]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| MAGDiff without ADC |" in text and "| SpinalCord |" in text
    assert all((tmp_path / "out" / name).stat().st_size > 10_000 for name in ("doses.png", "dvhs.png"))
