"""A case and its condition channels: the way there and back."""

import json
from pathlib import Path

import numpy as np
import pytest

from custom.case import BODY, CaseError
from custom.phantom import make_case
from custom.protocol.conditions import LEVEL_NAMES, case_from_conditions
from custom.transforms.condition import AppendContextd, ConditionChannelsd

CONFIG = json.loads((Path(__file__).parents[2] / "bundle" / "configs" / "inference.json").read_text())
SPATIAL = [name for name in CONFIG["spatial_channels"] if not name.startswith(("beam", "plan"))]
CONTEXT = CONFIG["context_channels"]


def conditions(case):
    """The image as the network gets it, without what needs the dose engine."""
    data = ConditionChannelsd(spatial_channels=SPATIAL, context_channels=CONTEXT)({"work": case})
    return AppendContextd()(data)["image"].half().float().numpy()  # the cache holds half precision


@pytest.mark.parametrize("site", ["HeadNeck", "Lung"])
def test_round_trip(site):
    case = make_case(site, 1, spacing_mm=(7, 6, 8))
    found = case_from_conditions(conditions(case), [*SPATIAL, *CONTEXT])
    assert (found.site, found.technique) == (case.site, case.technique)
    assert found.grid.spacing_mm == pytest.approx([7, 6, 8], rel=1e-3)
    assert found.highest_prescription_gy == pytest.approx(case.highest_prescription_gy, rel=1e-3)
    assert sorted(found.prescription_gy.values()) == pytest.approx(sorted({*case.prescription_gy.values()}), rel=1e-3)
    for roi in set(found.masks) - {*LEVEL_NAMES.values(), "Lungs"}:
        assert np.array_equal(found.masks[roi], case.masks[roi]), roi
    assert {roi for roi in case.masks if f"sdm_{roi}" in SPATIAL} <= set(found.masks)
    for name in found.prescription_gy:
        own_gy = pytest.approx(found.prescription_gy[name], 1e-3)
        same = [roi for roi, gy in case.prescription_gy.items() if gy == own_gy]
        assert np.array_equal(found.masks[name], np.logical_or.reduce([case.masks[roi] for roi in same])), name


def test_a_crop_without_the_high_target_keeps_the_prescription():
    case = make_case("HeadNeck", 1, spacing_mm=(8, 8, 8))
    image = conditions(case)
    low = image[SPATIAL.index("sdm_target_high")] > 0
    empty = np.flatnonzero(~low.any((0, 1)))
    found = case_from_conditions(image[..., empty], [*SPATIAL, *CONTEXT])
    assert found.highest_prescription_gy == pytest.approx(case.highest_prescription_gy, rel=1e-3)
    assert not found.masks["PTV_High"].any() and found.masks[BODY].any()


def test_a_dropped_organ_is_absent():
    case = make_case("HeadNeck", 1, spacing_mm=(8, 8, 8))
    image = conditions(case)
    image[SPATIAL.index("sdm_SpinalCord")] = -1
    image[len(SPATIAL) + CONTEXT.index("has_SpinalCord")] = 0
    assert "SpinalCord" not in case_from_conditions(image, [*SPATIAL, *CONTEXT]).masks


def test_missing_channels_are_named():
    with pytest.raises(CaseError, match="prescription_level"):
        case_from_conditions(np.zeros((2, 4, 4, 4)), ["body", "prescription"])
