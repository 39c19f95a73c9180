"""Studies on networks whose answer is known."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from custom.case import CaseError, DoseScale
from custom.metrics import case_metrics, summarise
from custom.phantom import make_case
from custom.studies import CachedScore, CalibrationStudy, PredictionStudy, coverage, fit_calibration, without
from custom.transforms.load import WorkingGridd
from custom.transforms.save import RestoreDosed


@pytest.fixture(scope="module")
def item():
    case = make_case("HeadNeck", seed=1, spacing_mm=(8.0, 8.0, 8.0))
    rng = np.random.default_rng(0)
    dose = np.where(case.body, rng.uniform(20, 60, case.grid.shape), 0).astype(np.float32)
    data = {"image": "x", "case": replace(case, dose_gy=dose)}
    return WorkingGridd()(data)


def condition(data):
    """The reference itself, and whether the CT and the cord are there."""
    work = data["work"]
    truth = DoseScale(work.highest_prescription_gy).to_network(work.dose_gy)
    there = [np.full(truth.shape, float(x), np.float32) for x in (work.ct_hu is not None, "SpinalCord" in work.masks)]
    return {**data, "image": torch.from_numpy(np.stack([truth, *there]).astype(np.float32))}


def test_scores_of_known_errors_and_of_inputs_left_out(item, tmp_path):
    share = 2.0 / item["case"].highest_prescription_gy
    ways = {
        "exact": {"inferer": lambda x, n: x[:, :1]},
        "2 Gy high": {"inferer": lambda x, n: x[:, :1] + share},
        "CT or 2 Gy": {"inferer": lambda x, n: x[:, :1] + share * (1 - x[:, 1:2]), "without": ["CT"]},
        "cord or 2 Gy": {"inferer": lambda x, n: x[:, :1] + share * (1 - x[:, 2:3]), "without": ["SpinalCord"]},
        "no such organ": {"inferer": lambda x, n: x[:, :1], "without": ["Eye_L"]},
    }
    study = PredictionStudy([item], condition, torch.nn.Identity(), ways, RestoreDosed(), tmp_path, "ways")
    found = study.run()
    assert found["exact"]["dose_score"] == pytest.approx(0.0, abs=0.02)
    assert found["exact"]["fine_structure_ratio"] == pytest.approx(1.0, abs=0.01)
    for way in ("2 Gy high", "CT or 2 Gy", "cord or 2 Gy"):
        assert found[way]["dose_score"] == pytest.approx(2.0, abs=0.02), way
        assert found[way]["psnr_db"] == pytest.approx(20 * np.log10(1 / share), abs=0.1), way
    assert found["no such organ"]["cases"] == 0  # nothing to leave out: no case counts for it
    rows = list(csv.DictReader((tmp_path / "ways.csv").open()))
    assert [row["way"] for row in rows] == list(ways)[:4]
    assert [row["has_ct"] for row in rows] == ["1", "1", "0", "1"]
    assert json.loads((tmp_path / "ways.json").read_text())["exact"]["cases"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ways.csv", "ways.json"]


def test_targets_and_body_cannot_be_left_out(item):
    with pytest.raises(CaseError, match="Body"):
        without(item["case"], ["Body"])
    with pytest.raises(CaseError, match="PTV"):
        without(item["case"], [next(iter(item["case"].targets))])


def test_calibration_finds_the_scale_and_the_floor_of_known_errors():
    rng = np.random.default_rng(1)
    std = rng.uniform(0.1, 4.0, 200_000)
    true = 1.7 * np.sqrt(std**2 + 0.8**2)
    error = rng.normal(size=std.size) * true
    found = fit_calibration(error, std)
    assert found.scale == pytest.approx(1.7, rel=0.03)
    assert found.floor_gy == pytest.approx(0.8, rel=0.15)
    assert [found.factors[p] for p in (0.5, 0.8, 0.95)] == pytest.approx([0.6745, 1.2816, 1.96], rel=0.02)


def test_coverage_on_the_held_out_half_is_that_of_the_levels(item, tmp_path):
    """Heavy-tailed errors, three times the samples' spread: only the calibrated intervals cover as they say."""
    rng = np.random.default_rng(2)
    truth = condition(item)["image"][:1]
    rx = item["work"].highest_prescription_gy

    cases = iter(range(4))

    def dose_std_and_samples(image, network):
        std = torch.from_numpy(rng.uniform(0.5, 2.0, truth.shape).astype(np.float32))
        error = torch.from_numpy(rng.laplace(size=truth.shape).astype(np.float32)) * std * 3
        shifts = (-1, 2, 1) if next(cases) else (1, 2, 3)  # only of the first case are all too high
        samples = torch.stack([truth + shift / rx for shift in shifts])[:, None]
        return (truth + error / rx)[None], (std / rx)[None], samples

    study = CalibrationStudy([{**item, "image": truth}] * 4, torch.nn.Identity(),
                             SimpleNamespace(dose_std_and_samples=dose_std_and_samples), tmp_path)
    record = study.run()
    structures = [name for name, mask in item["work"].masks.items() if name != "Body" and mask.any()]
    metrics = 2 * len(structures) + len(item["work"].targets)  # a target has three of them
    assert record["dvh_metrics"] == {"number": 4 * metrics, "within_samples": 0.75, "expected": 0.5}
    for row in record["reliability"]:
        assert row["calibrated"] == pytest.approx(row["level"], abs=0.015)
        assert row["uncalibrated"] < row["level"] - 0.2
    assert json.loads((tmp_path / "calibration.json").read_text()) == record
    with pytest.raises(CaseError, match="two or more"):
        CalibrationStudy([item], torch.nn.Identity(), None, tmp_path).run()


def test_coverage_counts():
    calibration = fit_calibration(np.array([1.0, -1.0, 1.0, 1.0]), np.ones(4))
    bars = calibration.factors[0.5] * calibration.bar_gy(np.ones(2))
    assert coverage(np.array([0.99, 1.01]) * bars, np.ones(2), calibration)[0.5] == 0.5


def test_cached_scores_are_those_of_the_evaluation(item, tmp_path):
    """The score of the cached tensors is that of the case itself, with and without a second label channel."""
    case = item["work"]
    gy = case.highest_prescription_gy
    names = ["SpinalCord", "Parotid_L", *case.targets]
    rng = np.random.default_rng(3)
    dose = np.where(case.body, case.dose_gy + rng.normal(0, 3, case.grid.shape), 0).clip(0).astype(np.float32)
    tensors = {
        "image": torch.from_numpy(dose / gy)[None],
        "label": torch.from_numpy(case.dose_gy / gy)[None].expand(2, -1, -1, -1),
        "body": torch.from_numpy(case.body[None]), "prescription_gy": torch.tensor(gy),
        "rois": torch.from_numpy(np.stack([case.masks[n] for n in names]).astype(np.uint8)),
        "voxel_cc": torch.tensor(case.grid.voxel_cc),
    }
    found = CachedScore([tensors], torch.nn.Identity(), {"as it is": lambda x, n: x}, names, list(case.targets),
                        tmp_path).run()["as it is"]
    kept = replace(case, masks={n: case.masks[n] for n in (*names, "Body")})
    expected = summarise([case_metrics(kept, dose)])
    assert found["dose_score"] == pytest.approx(expected["dose_score"], rel=1e-4)
    assert found["dvh_score"] == pytest.approx(expected["dvh_score"], rel=1e-4)
    assert json.loads((tmp_path / "scores.json").read_text())["as it is"] == found


def test_cached_scores_judge_the_limits_on_all_conditions(tmp_path):
    """Prediction and reference by the metric, on the images that lost no condition; nan where no limit applies."""
    def item(condition):
        volume = torch.ones(1, 4, 4, 4)
        return {"image": condition * volume, "label": 0.5 * volume, "body": volume, "rois": volume,
                "prescription_gy": torch.tensor(70.0), "voxel_cc": torch.tensor(0.1)}

    class Metric(list):  # empty and so false, as one of MONAI's with nothing in its buffer
        def __call__(self, dose, image):
            assert dose.shape == image.shape == (1, 1, 4, 4, 4)
            return torch.full((1, 1), float(dose.mean() * image.mean()) if image.max() > 0 else float("nan"))

    blanked, whole = [item(0.0), item(0.0)], [item(80.0), item(0.0)]
    found = CachedScore(blanked, torch.nn.Identity(), {"x": lambda image, n: image + 1}, ["SpinalCord"], [], tmp_path,
                        compliance=Metric(), judged=whole).run()["x"]
    assert found["constraints_met_percents"][0] == 80 and np.isnan(found["constraints_met_percents"][1])
    assert (found["constraints_met_percent"], found["reference_constraints_met_percent"]) == (80, 40)
    assert "constraints_met_percent" not in CachedScore(blanked, torch.nn.Identity(), {"x": lambda i, n: i},
                                                        ["SpinalCord"], [], tmp_path).run()["x"]
