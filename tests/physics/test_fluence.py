"""Plans on a small water phantom: what the objectives ask for, and the deliverable dose nearest to a given one."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from custom.case import Beam, Case, CaseError, Grid
from custom.physics.fluence import BeamModel, Objective, load_objectives, plan_dose

TARGET = [
    Objective("Target", "min", 300, dose_share=1.0),
    Objective("Target", "max", 100, dose_share=1.03),
    Objective("Body", "max", 1, dose_share=0.3),
]
SPARE = Objective("SpinalCord", "max", 100, dose_gy=15.0)


def cylinder(beams: int = 5) -> Case:
    """A water cylinder of 16 cm with a target on the axis, 60 and 50 Gy, and an organ 20 mm behind it."""
    grid = Grid.axis_aligned((36, 36, 14), (5, 5, 5), (-87.5, -87.5, -32.5))
    x, y, z = np.stack(np.meshgrid(*grid.axes_mm(), indexing="ij"))
    body = np.hypot(x, y) < 80
    high = (np.hypot(x, y) < 18) & (np.abs(z) < 16)
    low = (np.hypot(x - 30, y) < 12) & (np.abs(z) < 16) & ~high
    cord = (np.hypot(x, y - 45) < 10) & (np.abs(z) < 26)
    return Case(
        name="cylinder", grid=grid, ct_hu=np.where(body, 0, -1000).astype(np.float32),
        masks={"Body": body, "PTV_6000": high, "PTV_5000": low, "SpinalCord": cord},
        prescription_gy={"PTV_6000": 60.0, "PTV_5000": 50.0},
        beams=tuple(Beam(f"G{a:.0f}", (float(a),), (0, 0, 0)) for a in np.arange(beams) * 360 / beams),
        technique="IMRT", site="HeadNeck")


@pytest.fixture(scope="module")
def case() -> Case:
    return cylinder()


@pytest.fixture(scope="module")
def beams(case) -> BeamModel:
    return BeamModel(case, beamlet_mm=8.0)


@pytest.fixture(scope="module")
def plan(case, beams):
    return plan_dose(case, [*TARGET, SPARE], beams=beams, iterations=40)


def test_plan_meets_the_prescriptions(case, plan):
    for roi, gy in case.targets.items():
        dose = plan.dose_gy[case.masks[roi]]
        assert dose.mean() == pytest.approx(gy, abs=3)
        assert np.percentile(dose, 5) > gy - 5
    assert plan.dose_gy.max() < 72 and plan.dose_gy.dtype == np.float32


def test_fluence_is_not_negative_and_makes_the_dose(case, beams, plan):
    assert len(plan.fluences) == len(plan.gantry_deg) == 5 and plan.gantry_deg == [0, 72, 144, 216, 288]
    for fluence, u, w in zip(plan.fluences, plan.u_mm, plan.w_mm):
        assert fluence.min() >= 0 and fluence.max() > 0 and fluence.shape == (u.size, w.size)
    assert (plan.dose_gy[~case.body] == 0).all()
    np.testing.assert_allclose(beams.plan(plan.fluences).dose_gy, plan.dose_gy, atol=1e-3)


def test_an_objective_spares_its_organ(case, beams, plan):
    without = plan_dose(case, TARGET, beams=beams, iterations=40)
    cord = case.masks["SpinalCord"]
    assert plan.dose_gy[cord].mean() < without.dose_gy[cord].mean() - 2
    assert plan.dose_gy[cord].max() < without.dose_gy[cord].max() - 3


def test_normalised_plan_covers_95_percent(case, beams):
    plan = plan_dose(case, TARGET, beams=beams, iterations=5, normalise=True)
    assert np.percentile(plan.dose_gy[case.masks["PTV_6000"]], 5) == pytest.approx(60, abs=1e-3)
    np.testing.assert_allclose(beams.plan(plan.fluences).dose_gy, plan.dose_gy, rtol=1e-3, atol=1e-3)


def test_levels_choose_their_targets(case, beams):
    """A maximum for the lower target only pulls that one down."""
    rows = [Objective("Target", "min", 300, dose_share=1.0, level="high"),
            Objective("Target", "max", 300, dose_gy=10.0, level="lower")]
    dose = plan_dose(case, rows, beams=beams, iterations=30).dose_gy
    assert dose[case.masks["PTV_6000"]].mean() > 55 and dose[case.masks["PTV_5000"]].mean() < 35


@pytest.mark.parametrize(("level", "pulled_down"), [("low", [45]), ("mid", [50]), ("lower", [50, 45])])
def test_of_three_levels_the_named_one_is_pulled_down(case, beams, level, pulled_down):
    third = np.roll(case.masks["PTV_5000"], -12, axis=0)  # 60 mm to the right of the second target
    three = dataclasses.replace(case, masks=case.masks | {"PTV_4500": third},
                                prescription_gy=case.prescription_gy | {"PTV_4500": 45.0})
    rows = [*TARGET[:1], Objective("Target", "max", 3000, dose_gy=10.0, level=level)]
    dose = plan_dose(three, rows, beams=beams, iterations=30).dose_gy
    for gy in (60, 50, 45):
        assert (dose[three.masks[f"PTV_{100 * gy}"]].mean() < 0.8 * gy) == (gy in pulled_down)


def test_low_and_mid_ask_for_two_and_three_levels(case, beams):
    """The case has two: nothing is its middle one, and its highest is never its lowest."""
    one = dataclasses.replace(case, prescription_gy={"PTV_6000": 60.0})
    for levels, level in ((case, "mid"), (one, "low")):
        named = Objective("Target", "max", 300, dose_gy=10.0, level=level)
        plain, same = (plan_dose(levels, rows, beams=beams, iterations=3) for rows in (TARGET, [*TARGET, named]))
        assert np.array_equal(plain.dose_gy, same.dose_gy)


def test_same_case_gives_the_same_plan(case, beams):
    first, again = (plan_dose(case, TARGET, beams=beams, iterations=3, seed=1).dose_gy for _ in range(2))
    assert np.array_equal(first, again)


def test_case_without_ct_is_planned_as_water(case, beams):
    """The cylinder is water, so that its plan does not change."""
    ones = [np.ones_like(d.active, dtype=np.float32) for d in beams.directions]
    blind = BeamModel(dataclasses.replace(case, ct_hu=None), beamlet_mm=8.0)
    np.testing.assert_allclose(blind.plan(ones).dose_gy, beams.plan(ones).dose_gy, rtol=1e-3, atol=1e-3)


def test_arcs_are_thinned(case):
    arc = Beam("ARC", tuple(np.arange(0.0, 360.0, 4.0)), (0, 0, 0))
    model = BeamModel(dataclasses.replace(case, beams=(arc,)), beamlet_mm=15.0, max_directions=12)
    angles = [d.gantry_deg for d in model.directions]
    assert len(angles) <= 12 and np.ptp(np.diff(angles)) == 0 and angles[-1] > 300


# ------------------------------------------------------------------------------------------------------ objectives
def test_the_bundles_objectives_are_read():
    rows = load_objectives()
    assert {"Target", "SpinalCord", "Body", "Ring"} <= {row.structure for row in rows}
    assert all(row.kind in ("min", "max") for row in rows)


@pytest.mark.parametrize(("text", "message"), [
    ('{"objectives": [{"structure": "Body", "kind": "max", "weight": 1, "dose_gy": 5},'
     ' {"structure": "Body", "kind": "mean", "weight": 1, "dose_gy": 5}]}', "row 2: wants kind"),
    ('{"objectives": [{"structure": "Body", "kind": "max", "weight": 1}]}', "row 1: .*one of dose_gy and dose_share"),
    ('{"objectives": [{"structure": "Body", "kind": "max", "weight": 0, "dose_gy": 5}]}', "row 1: .*positive"),
    ('{"objectives": [{"structure": "Body", "kind": "max", "wait": 1}]}', "wait"),
    ('{"rows": []}', "expected {'objectives'"),
    ('{"objectives": [{"structure": "Body", "kind": "max", "weight": "5", "dose_gy": 3}]}', "row 1.*as numbers"),
    ('{"objectives": [{"structure": "Body", "kind": "max", "weight": 5, "dose_gy": "3"}]}', "row 1.*as numbers"),
    ('{"objectives": [{"structure": "Target", "kind": "max", "weight": 5, "dose_gy": 3, "level": "highest"}]}',
     "row 1: .*level .*'high', 'mid', 'low', 'lower'"),
    ("not JSON", "expected {'objectives'"),
])
def test_objectives_that_cannot_be_read_are_named(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(CaseError, match=f"mine.json.*{message}"):
        load_objectives(path)


def test_missing_objectives_are_named(tmp_path):
    with pytest.raises(CaseError, match="absent.json"):
        load_objectives(tmp_path / "absent.json")


def test_own_objectives_are_read(tmp_path):
    row = {"structure": "Larynx", "kind": "max", "weight": 2, "dose_share": 0.5}
    (tmp_path / "own.json").write_text(json.dumps({"objectives": [row]}))
    assert load_objectives(str(tmp_path / "own.json")) == (Objective("Larynx", "max", 2, dose_share=0.5),)
