"""Beams, techniques and prescriptions of plans as planning systems write them."""

from __future__ import annotations

import numpy as np
import pytest

from custom.case import CaseError
from custom.io.rtplan import read_rtplan, to_head_first_supine_deg
from tests.io.dicom_builder import Study, oriented_grid


def source_in_patient(gantry_deg: float, position: str) -> np.ndarray:
    """Direction to the source in LPS: IEC fixed axes (+Zf up, +Yf to the gantry) seen by the patient on the couch."""
    g = np.radians(gantry_deg)
    fixed = np.array([np.sin(g), 0.0, np.cos(g)])
    superior = np.array([0.0, 1.0, 0.0]) if position.startswith("HF") else np.array([0.0, -1.0, 0.0])
    up = np.array([0.0, 0.0, 1.0])
    lying = {"S": ("posterior", -up), "P": ("posterior", up), "DL": ("left", -up), "DR": ("left", up)}[position[2:]]
    axes = {lying[0]: lying[1]}
    if "posterior" in axes:
        axes["left"] = np.cross(axes["posterior"], superior)
    else:
        axes["posterior"] = np.cross(superior, axes["left"])
    return np.array([fixed @ axes["left"], fixed @ axes["posterior"], fixed @ superior])


@pytest.mark.parametrize("position", ["HFS", "HFP", "FFS", "FFP", "HFDL", "HFDR", "FFDL", "FFDR"])
@pytest.mark.parametrize("gantry_deg", [0.0, 40.0, 90.0, 211.5, 359.9])
def test_gantry_in_the_head_first_supine_frame(position, gantry_deg):
    angle = np.radians(to_head_first_supine_deg(gantry_deg, position))
    expected = source_in_patient(gantry_deg, position)
    np.testing.assert_allclose([np.sin(angle), -np.cos(angle), 0.0], expected, atol=1e-7)


def test_unknown_position():
    with pytest.raises(CaseError, match="SITTING"):
        to_head_first_supine_deg(0, "SITTING")


def test_only_treating_beams_and_their_technique(tmp_path):
    path = Study(tmp_path, oriented_grid()).write_plan([
        {"name": "static", "angles": [10, 10]},
        {"name": "steps", "angles": [20] * 4},
        {"name": "window", "angles": [30] * 3, "kind": "DYNAMIC"},
        {"name": "CBCT", "angles": [0, 0], "meterset": None},
        {"name": "setup", "angles": [0, 0], "delivery": "SETUP"},
        {"name": "empty", "angles": [0, 0], "meterset": 0},
    ])
    plan = read_rtplan(path)
    assert {b.name: t for b, t in zip(plan.beams, plan.techniques)} == {
        "static": "static", "steps": "step and shoot", "window": "sliding window"}
    assert all(len(b.gantry_deg) == 1 for b in plan.beams)
    assert plan.fractions == 35 and "CBCT" in plan.notes[0]


@pytest.mark.parametrize(("direction", "angles", "first", "last", "travel"), [
    ("CW", [181, 179], 181, 179, 358), ("CC", [179, 181], 179, 181, 358), ("CC", [10, 350], 10, 350, 20),
    ("CW", [350, 0, 10], 350, 10, 20), ("CW", list(np.arange(181, 540, 2.0) % 360), 181, 179, 358),
])
def test_arcs_follow_their_direction(tmp_path, direction, angles, first, last, travel):
    path = Study(tmp_path, oriented_grid()).write_plan([{"name": "arc", "angles": angles, "direction": direction}])
    plan = read_rtplan(path)
    sampled = np.array(plan.beams[0].gantry_deg)
    sign = 1 if direction == "CW" else -1
    steps = (sign * np.diff(sampled)) % 360
    assert plan.techniques == ("arc",)
    assert (sampled[0], sampled[-1]) == (pytest.approx(first), pytest.approx(last))
    assert steps.sum() == pytest.approx(travel) and steps.max() <= 15 + 1e-6


def test_prescription_takes_targets_only(tmp_path):
    study = Study(tmp_path, oriented_grid())
    beams = [{"name": "a", "angles": [0, 0]}]
    site = {"DoseReferenceType": "TARGET", "DoseReferenceStructureType": "SITE", "TargetPrescriptionDose": 14}
    point = {**site, "DoseReferenceStructureType": "POINT", "TargetPrescriptionDose": 15}
    organ = {**site, "DoseReferenceType": "ORGAN_AT_RISK", "TargetPrescriptionDose": 80}
    volume = {**site, "DoseReferenceStructureType": "VOLUME", "ReferencedROINumber": 4}
    assert read_rtplan(study.write_plan(beams, prescription=[organ, point, site])).prescription_gy == 14
    assert read_rtplan(study.write_plan(beams, prescription=[point])).prescription_gy == 15
    assert read_rtplan(study.write_plan(beams, prescription=[site, volume])).prescription_gy == {4: 14}
    assert read_rtplan(study.write_plan(beams)).prescription_gy is None
