"""The constraint loss: the paper's formulas, the reference as an excuse, and gradients."""

import json

import numpy as np
import pytest
import torch

from custom.case import BODY, Beam, Case, CaseError, Grid
from custom.dosimetry.constraints import check, load_constraints
from custom.protocol.loss import ConstraintLoss, active_rows, protocol_loss, select_rows
from custom.protocol.soft import Softness

EXACT = Softness(1e-3, 0.0)
ROW = {"structure": "SpinalCord", "metric": "Max[Gy]", "direction": "<=", "limit": 45, "weight": 1.0, "site": "any",
       "source": "test"}
TARGET = {"structure": "PTV", "metric": "D95%[Gy]", "direction": ">=", "limit": "95%Rx"}
PAROTIDS = [{"structure": f"Parotid_{s}", "metric": "Mean[Gy]", "limit": 26, "any_of": "parotid"} for s in "LR"]
SHAPE = (10, 10, 5)


@pytest.fixture
def case():
    masks = {roi: np.zeros(SHAPE, bool) for roi in (BODY, "PTV_6000", "SpinalCord", "Parotid_L", "Parotid_R")}
    masks[BODY][:] = True
    masks["PTV_6000"][:4, :4] = True
    masks["SpinalCord"][8:, 8:] = True
    masks["Parotid_L"][6:8, :2] = True
    masks["Parotid_R"][6:8, 4:6] = True
    grid = Grid.axis_aligned(SHAPE, (4.0, 4.0, 5.0))
    return Case("box", grid, None, masks, {"PTV_6000": 60.0}, (Beam("1", (0.0,), (0, 0, 0)),), "IMRT", "HeadNeck")


def rows(tmp_path, case, *changes):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"constraints": [ROW | change for change in changes]}))
    return active_rows(load_constraints(path), case)


def dose_of(case, gy):
    """Uniform doses by structure, zero elsewhere."""
    dose = torch.zeros(SHAPE, dtype=torch.float64)
    for roi, value in gy.items():
        dose[torch.from_numpy(case.masks[roi])] = value
    return dose


def test_terms_are_the_papers(tmp_path, case):
    """ADDiff-Dose section 2.3: (Dmax / limit - 1)^2, (V - limit)^2 as shares, (1 - D95 / limit)^2, each by weight."""
    dose = dose_of(case, {"SpinalCord": 54.0, "PTV_6000": 45.6})
    cord = rows(tmp_path, case, {"weight": 0.5})
    assert float(protocol_loss(dose, cord, softness=EXACT)) == pytest.approx(0.5 * (54 / 45 - 1) ** 2)
    volume = rows(tmp_path, case, {"metric": "V20Gy[%]", "limit": 30})
    assert float(protocol_loss(dose, volume, softness=EXACT)) == pytest.approx((1 - 0.30) ** 2)
    coverage = rows(tmp_path, case, TARGET)
    assert float(protocol_loss(dose, coverage, softness=EXACT)) == pytest.approx((1 - 45.6 / 57) ** 2)
    cc = rows(tmp_path, case, {"metric": "V20Gy[cc]", "limit": 0.5})  # 20 voxels of 0.08 cc receive it
    assert float(protocol_loss(dose, cc, softness=EXACT)) == pytest.approx(((1.6 - 0.5) / (1.6 + 0.5)) ** 2)
    together = [*cord, *volume, *coverage, *cc]
    assert float(protocol_loss(dose, together, softness=EXACT)) == pytest.approx(
        sum(float(protocol_loss(dose, part, softness=EXACT)) for part in (cord, volume, coverage, cc)))


def test_only_what_exceeds_the_reference_too_counts(tmp_path, case):
    cord = rows(tmp_path, case, {})
    over, far_over, under = (dose_of(case, {"SpinalCord": gy}) for gy in (50.0, 54.5, 40.0))
    assert float(protocol_loss(over, cord, over, EXACT)) == 0  # the reference is as bad
    assert float(protocol_loss(under, cord, over, EXACT)) == 0
    assert float(protocol_loss(far_over, cord, over, EXACT)) == pytest.approx((4.5 / 45) ** 2)
    assert float(protocol_loss(over, cord, under, EXACT)) == pytest.approx((5 / 45) ** 2)  # beyond the limit
    target = rows(tmp_path, case, TARGET)
    cold, colder = dose_of(case, {"PTV_6000": 50.0}), dose_of(case, {"PTV_6000": 44.3})
    assert float(protocol_loss(cold, target, cold, EXACT)) == 0
    assert float(protocol_loss(colder, target, cold, EXACT)) == pytest.approx((5.7 / 57) ** 2)


def test_absent_structures_and_other_sites_are_not_active(tmp_path, case):
    dose = dose_of(case, {BODY: 60.0}).requires_grad_()
    none = rows(tmp_path, case, {"structure": "Heart"}, {"site": "Lung"}, {"weight": 0})
    loss = protocol_loss(dose, none)
    loss.backward()
    assert none == [] and float(loss) == 0 and float(dose.grad.abs().max()) == 0


def test_at_least_one_side(tmp_path, case):
    both = rows(tmp_path, case, *PAROTIDS)
    met = dose_of(case, {"Parotid_L": 40.0, "Parotid_R": 20.0})
    assert float(protocol_loss(met, both, softness=EXACT)) == 0
    missed = dose_of(case, {"Parotid_L": 40.0, "Parotid_R": 30.0}).requires_grad_()
    loss = protocol_loss(missed, both, softness=EXACT)
    assert float(loss) == pytest.approx((4 / 26) ** 2)
    loss.backward()  # the side that is nearer to its limit is spared
    left, right = (missed.grad[torch.from_numpy(case.masks[f"Parotid_{s}"])] for s in "LR")
    assert (left == 0).all() and (right > 0).all()


def test_a_step_down_the_gradient_mends_every_kind_of_row(tmp_path, case):
    kinds = [{}, {"metric": "D0.1cc[Gy]"}, {"metric": "V40Gy[%]", "limit": 10}, {"metric": "V40Gy[cc]", "limit": 0.2},
             {"metric": "Mean[Gy]", "limit": 20}, TARGET, TARGET | {"metric": "V95%[%]", "limit": 95},
             TARGET | {"metric": "Min[Gy]"}]
    noise = torch.from_numpy(np.random.default_rng(1).normal(0, 1.5, SHAPE))
    for change in kinds:
        found = rows(tmp_path, case, change)
        dose = (dose_of(case, {"PTV_6000": 56.0, "SpinalCord": 47.0}) + noise).requires_grad_()
        loss = protocol_loss(dose, found)
        loss.backward()
        assert torch.isfinite(dose.grad).all() and loss > 0, change
        mask = torch.from_numpy(case.masks[found[0].structure])
        assert (dose.grad[~mask] == 0).all(), change
        sign = 1 if found[0].constraint.at_most else -1
        assert (sign * dose.grad[mask] >= 0).all() and (sign * dose.grad[mask] > 0).any(), change
        step = 0.2 / dose.grad.abs().max()
        assert protocol_loss(dose.detach() - step * dose.grad, found) < loss, change


def test_loss_is_zero_exactly_where_the_protocol_is_met(case):
    """The whole shipped table: met rows add nothing, and the failed ones are those the report would name."""
    constraints = load_constraints()
    dose = dose_of(case, {BODY: 12.0, "PTV_6000": 61.0, "SpinalCord": 50.0}).numpy()
    verdicts = check(constraints, case, dose)
    for row, verdict in zip(active_rows(constraints, case), (v for v in verdicts if v.status != "not_applicable")):
        if not row.constraint.any_of:
            loss = float(protocol_loss(torch.from_numpy(dose), [row], softness=EXACT))
            assert (loss > 1e-9) == (verdict.status == "failed"), verdict


# ------------------------------------------------------------------------------------------------ the batch's loss
NAMES = ["body", "prescription", "sdm_target_high", "sdm_SpinalCord", "prescription_level", "spacing_x", "spacing_y",
         "spacing_z", "has_SpinalCord"]


def image_of(case):
    sdm = [np.where(case.masks[roi], 0.1, -0.1) for roi in ("PTV_6000", "SpinalCord")]
    spatial = [case.body, case.masks["PTV_6000"], *sdm]
    context = [np.full(SHAPE, value) for value in (60 / 70, 1.0, 1.0, 1.25, 1.0)]
    return torch.from_numpy(np.stack([*spatial, *context]).astype(np.float32))[None]


def test_batch_is_the_mean_of_its_patients(tmp_path, case):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"constraints": [ROW]}))
    loss = ConstraintLoss(NAMES, path, dose_width_gy=1e-3, volume_share=0.0)
    image = image_of(case).repeat(2, 1, 1, 1, 1)
    ref = dose_of(case, {"SpinalCord": 40 / 60})[None, None].float().repeat(2, 1, 1, 1, 1)
    pred = ref.clone()
    pred[1] *= 54 / 40
    pred.requires_grad_()
    value = loss(pred, ref, image)
    assert float(value) == pytest.approx(0.5 * 0.2**2, rel=1e-4)
    value.backward()
    assert (pred.grad[0] == 0).all() and pred.grad[1].max() > 0
    absolute = ConstraintLoss(NAMES, path, beyond_reference=False)
    assert float(absolute(pred, pred.detach(), image)) > 0 == float(loss(pred, pred.detach(), image))


def test_errors(case):
    with pytest.raises(CaseError, match="no row on \\['Nose'\\]"):
        select_rows(load_constraints(), ["Nose"])
    assert {row.structure for row in select_rows(load_constraints(), ["SpinalCord"])} == {"SpinalCord"}
    image = image_of(case)
    with pytest.raises(CaseError, match="constraint loss: expected"):
        ConstraintLoss(NAMES)(image[:, :1, 1:], image[:, :1, 1:], image)
