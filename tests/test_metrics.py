"""The evaluator against the challenge's golden values, and its bookkeeping."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from custom.case import BODY, Beam, Case, CaseError, Grid
from custom.dosimetry.constraints import load_constraints
from custom.metrics import (
    DoseScore,
    case_metrics,
    gdp_hmm_mae_gy,
    openkbp_dose_error_gy,
    openkbp_dvh,
    summarise,
    write_metrics,
)

OARS = ("Brainstem", "SpinalCord", "Parotid_R", "Parotid_L", "Esophagus", "Larynx", "Bone_Mandible")
BITS = (*OARS, "PTV_5600", "PTV_6300", "PTV_7000", BODY)  # bit order of the packed cases


def errors(masks, voxel_mm3, dose, reference):
    """The OpenKBP part of ``case_metrics`` for sparse masks."""
    row = {"openkbp_dose_error_gy": openkbp_dose_error_gy(dose, reference, masks[BODY])}
    for roi, mask in masks.items():
        if roi != BODY and mask.any():
            a, b = (openkbp_dvh(d[mask], voxel_mm3, roi.startswith("PTV")) for d in (dose, reference))
            row |= {f"openkbp_dvh_error/{roi}/{name}": abs(a[name] - b[name]) for name in a}
    return row


def test_golden_scores_of_the_40_validation_cases(shared_dir):
    """science.md C3: 0.95 x dose, nothing, and a blur of one voxel within the mask."""
    names = json.loads((shared_dir / "openkbp" / "splits.json").read_text())["validation"]
    rows = {"0.95": [], "zero": [], "blur": []}
    for name in names:
        with np.load(shared_dir / "openkbp" / "cases" / f"{name}.npz") as case:
            bits, voxel_mm3 = case["structures"], float(np.prod(case["voxel_mm"], dtype=np.float64))
            reference = case["dose_cgy"].astype(np.float32) / 100
        box = ndimage.find_objects((bits > 0).astype(np.int8))[0]
        box = tuple(slice(max(s.start - 5, 0), s.stop + 5) for s in box)  # all dose lies within; the blur reaches 4
        bits, reference = bits[box], reference[box]
        masks = {roi: (bits >> bit & 1).astype(bool) for bit, roi in enumerate(BITS)}
        blurred = ndimage.gaussian_filter(reference, 1.0) * masks[BODY]
        for key, dose in (("0.95", np.float32(0.95) * reference), ("zero", 0 * reference), ("blur", blurred)):
            rows[key].append(errors(masks, voxel_mm3, dose, reference))
    scores = {key: summarise(value) for key, value in rows.items()}
    assert sum(k.startswith("openkbp_dvh_error") for row in rows["zero"] for k in row) == 748
    for key, dose_score, dvh_score in (
        ("0.95", 1.3069, 2.5788),
        ("zero", 26.1372, 51.5756),
        ("blur", 1.5644, 2.0508),
    ):  # the packed doses are rounded to 1 cGy, the golden values come from the unrounded CSV files
        assert scores[key]["dose_score"] == pytest.approx(dose_score, abs=2e-4), key
        assert scores[key]["dvh_score"] == pytest.approx(dvh_score, abs=2e-4), key


@pytest.fixture
def case():
    """A box body with a target in a dose that falls along x, a cord and a lung."""
    grid = Grid.axis_aligned((24, 20, 16), (3.0, 3.0, 2.5))
    masks = {roi: np.zeros(grid.shape, bool) for roi in (BODY, "PTV_6000", "SpinalCord", "Lung_L", "Lung_R")}
    masks[BODY][2:-2, 2:-2, 1:-1] = True
    masks["PTV_6000"][4:10, 6:14, 4:12] = True
    masks["SpinalCord"][11:13, 15:17, 1:-1] = True
    masks["Lung_L"][13:20, 4:14, 2:14] = True
    x = np.arange(24.0)[:, None, None]
    dose = (60 * np.clip((22 - x) / 12, 0, 1) + np.zeros(grid.shape)) * masks[BODY]
    beams = (Beam("1", (0.0,), (0.0, 0.0, 0.0)),)
    return Case("box", grid, None, masks, {"PTV_6000": 60.0}, beams, "IMRT", "Lung", dose_gy=dose.astype(np.float32))


def test_case_metrics_of_a_perfect_dose(case):
    row = case_metrics(case, case.dose_gy)
    assert row["openkbp_dose_error_gy"] == 0 and row["isodose_dice_mean"] == 1 and row["isodose_hd95_mean_mm"] == 0
    assert row["lung_v20_abs_diff_percent"] == 0 and row["ptv_high_d98_abs_diff_gy"] == 0
    assert math.isnan(row["heart_v30_abs_diff_percent"])


def test_case_metrics_of_a_shifted_dose(case):
    row = case_metrics(case, case.dose_gy + np.float32(1) * case.body)
    for name in ("openkbp_dose_error_gy", "mae_body_gy", "mae_ptv_high_gy", "spinalcord_max_abs_diff_gy"):
        assert row[name] == pytest.approx(1, abs=1e-5), name
    assert row["mae_ptv_high_addiff_units"] == pytest.approx(0.1, abs=1e-6)
    assert row["openkbp_dvh_error/PTV_6000/d95_gy"] == pytest.approx(1, abs=1e-4)
    assert row["openkbp_dvh_error/SpinalCord/d0.1cc_gy"] == pytest.approx(1, abs=1e-4)
    assert not any(k.startswith("openkbp_dvh_error/Lung") for k in row)


def test_compliance_is_part_of_the_row_when_asked_for(case):
    row = case_metrics(case, 0 * case.dose_gy, load_constraints())
    assert 0 < row["constraints_met_percent"] < 100 and 0 < row["reference_constraints_met_percent"] < 100


def test_dose_outside_the_body_counts_for_openkbp_only(case):
    dose = case.dose_gy + np.float32(2) * ~case.body
    row = case_metrics(case, dose)
    outside = np.count_nonzero(~case.body)
    assert row["openkbp_dose_error_gy"] == pytest.approx(2 * outside / np.count_nonzero(case.body), rel=1e-6)
    assert row["mae_body_gy"] == 0


def test_gdp_hmm_mae_counts_as_the_challenge_does():
    body = np.array([True] * 4 + [False])
    ptv = np.array([True, False, False, False, False])
    reference, dose = np.array([30.0, 10.0, 2.0, 4.0, 50.0]), np.array([61.0, 21.0, 6.0, 4.0, 0.0])
    # scaled reference: 60, 20, 4, 8 -> errors 1, 1, 2 (prediction above 5), 4; the reference exceeds 5 in three voxels
    assert gdp_hmm_mae_gy(dose, reference, body, ptv, 60.0) == pytest.approx(8 / 3, rel=1e-5)


def test_case_without_reference_is_refused(case):
    bare = Case(case.name, case.grid, None, case.masks, case.prescription_gy, case.beams, case.technique, case.site)
    with pytest.raises(CaseError, match="reference dose"):
        case_metrics(bare, case.dose_gy)
    with pytest.raises(CaseError, match="shape"):
        case_metrics(case, case.dose_gy[1:])


def test_summary_pools_dvh_errors_over_all_cases():
    rows = [
        {"openkbp_dose_error_gy": 2.0, "openkbp_dvh_error/A/mean_gy": 1.0, "openkbp_dvh_error/B/mean_gy": 2.0},
        {"openkbp_dose_error_gy": 4.0, "openkbp_dvh_error/A/mean_gy": 6.0, "heart": math.nan},
    ]
    summary = summarise(rows)
    assert summary["dose_score"] == 3 and summary["dvh_score"] == 3  # 9 / 3, not the mean of 1.5 and 6
    assert summary["metrics"]["openkbp_dose_error_gy"]["std"] == pytest.approx(math.sqrt(2))
    assert summary["metrics"]["heart"]["cases"] == 0 and math.isnan(summary["metrics"]["heart"]["mean"])


def test_write_metrics(tmp_path, case):
    rows = [{"case": "a"} | case_metrics(case, case.dose_gy), {"case": "b"} | case_metrics(case, 0.9 * case.dose_gy)]
    write_metrics(rows, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.csv", "metrics.json"]
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["dose_score"] == pytest.approx(np.mean([r["openkbp_dose_error_gy"] for r in rows]))
    assert record["metrics"]["heart_v30_abs_diff_percent"]["mean"] is None and record["cases"] == 2
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["case"] for line in lines] == ["a", "b", "mean", "std"]
    assert lines[0]["heart_v30_abs_diff_percent"] == ""
    with pytest.raises(CaseError, match="no case"):
        write_metrics([], tmp_path)


class TestDoseScore:
    """The training metric: MAE within the body, in Gy, averaged over cases."""

    y = torch.zeros(2, 1, 4, 4, 4)
    y_pred = torch.full((2, 1, 4, 4, 4), 0.1)
    body = torch.zeros(2, 1, 4, 4, 4)
    body[:, :, :2] = 1

    def test_mean_over_cases(self):
        score = DoseScore()
        y_pred = self.y_pred.clone()
        y_pred[:, :, 2:] = 9.0  # outside the body: must not count
        score(y_pred, self.y, body=self.body, scale_gy=torch.tensor([70.0, 50.0]))
        assert score.aggregate().item() == pytest.approx(6.0)
        score(y_pred[:1], self.y[:1], body=self.body[:1], scale_gy=30.0)
        assert score.aggregate().item() == pytest.approx((7 + 5 + 3) / 3)
        assert score.get_buffer().shape == (3, 1)
        score.reset()
        assert math.isnan(score.aggregate())

    def test_packed_channels_and_lists_give_the_same(self):
        scale = torch.tensor([70.0, 50.0])
        packed, listed, default = DoseScore(), DoseScore(), DoseScore(60.0)
        packed(self.y_pred, DoseScore.pack(self.y, self.body, scale))
        items = [DoseScore.pack(y, b, s) for y, b, s in zip(self.y, self.body, (70.0, 50.0))]
        assert items[0].shape == (2, 4, 4, 4)
        packed(list(self.y_pred), items)
        listed(list(self.y_pred), list(self.y), body=list(self.body), scale_gy=[70.0, 50.0])
        default(self.y_pred, self.y)
        for score in (packed, listed, default):
            assert score.aggregate().item() == pytest.approx(6.0)

    def test_errors(self):
        with pytest.raises(ValueError, match="expected"):
            DoseScore()(self.y_pred, self.y[:, :, :2])
        with pytest.raises(ValueError, match="no body voxels"):
            DoseScore()(self.y_pred, self.y, body=0 * self.body)


def test_intervals_are_those_of_the_mean_over_patients():
    """Many normal values: the mean +- 1.96 s / sqrt(n). The figures of a patient are drawn together."""
    rng = np.random.default_rng(0)
    doses = rng.normal(3.0, 1.0, 400)
    rows = [{"openkbp_dose_error_gy": d, "openkbp_dvh_error/a/x": d, "openkbp_dvh_error/b/y": d} for d in doses]
    summary = summarise(rows)
    half = 1.96 * doses.std() / 20
    for score in ("dose_score", "dvh_score"):  # two equal figures a patient tell no more than one
        assert summary[f"{score}_interval"] == pytest.approx([doses.mean() - half, doses.mean() + half], abs=0.01)
    assert np.isnan(summarise(rows[:1])["dose_score_interval"]).all()
