"""Plan indices on shapes whose values are known."""

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance

from custom.dosimetry.indices import (
    conformity_paddick,
    conformity_rtog,
    hausdorff95_mm,
    homogeneity_icru83,
    isodose_dice,
    isodose_hausdorff95_mm,
)

BODY = np.ones((20, 20, 20), bool)


def box(start, stop):
    out = np.zeros(BODY.shape, bool)
    out[start:stop, 5:15, 5:15] = True
    return out


def test_homogeneity():
    assert homogeneity_icru83(np.full(50, 70.0)) == 0
    assert homogeneity_icru83(np.arange(100) + 0.5) == pytest.approx((98 - 2) / 50)
    assert np.isnan(homogeneity_icru83(np.zeros(5))) and np.isnan(homogeneity_icru83(np.array([])))


def test_conformity():
    target, dose = box(5, 10), 70.0 * box(5, 15)  # the isodose is twice the target and covers it
    assert conformity_paddick(dose, target, BODY, 60) == pytest.approx(0.5)
    assert conformity_rtog(dose, target, BODY, 60) == pytest.approx(2.0)
    assert conformity_paddick(dose, target, BODY, 80) == 0
    assert np.isnan(conformity_paddick(dose, ~BODY, BODY, 60)) and np.isnan(conformity_rtog(dose, ~BODY, BODY, 60))


def test_isodose_dice_by_level():
    first, second = 70.0 * box(5, 15), 50.0 * box(5, 15) + 20.0 * box(10, 15)
    assert isodose_dice(first, second, BODY, [40, 60, 80]) == pytest.approx([1, 2 * 5 / 15, np.nan], nan_ok=True)
    assert isodose_dice(first, 0 * first, BODY, [40]) == pytest.approx([0])


def test_hausdorff_is_in_mm_and_symmetric():
    spacing = (2.0, 1.0, 1.0)
    first, second = 70.0 * box(5, 15), 70.0 * box(5, 12)
    both = [isodose_hausdorff95_mm(a, b, BODY, [60, 80], spacing) for a, b in ((first, second), (second, first))]
    assert both[0] == pytest.approx([6.0, np.nan], nan_ok=True) and both[1] == pytest.approx(both[0], nan_ok=True)


def test_hausdorff_agrees_with_monai():
    rng = np.random.default_rng(0)
    x = np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"))
    first, second = (((x - c[:, None, None, None]) ** 2).sum(0) < 40 for c in rng.uniform(8, 11, (2, 3)))
    spacing = (3.0, 1.5, 2.0)
    a, b = (torch.as_tensor(m)[None, None] for m in (first, second))
    expected = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing)
    assert hausdorff95_mm(first, second, spacing) == pytest.approx(expected.item(), rel=1e-5)
