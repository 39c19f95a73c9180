"""Warnings for cases unlike the training data and for implausible doses."""

from __future__ import annotations

import numpy as np
import torch

from custom.case import BODY, Beam, Case, Grid
from custom.transforms.check import PlausibilityWarningsd


def make(site="HeadNeck", technique="IMRT", gy=70.0) -> Case:
    shape = (10, 10, 10)
    target = np.zeros(shape, dtype=bool)
    target[3:6, 3:6, 3:6] = True
    beams = tuple(Beam(f"{a}", (float(a),), (0.0, 0.0, 0.0)) for a in range(0, 360, 40))
    masks = {BODY: np.ones(shape, dtype=bool), "PTV_7000": target}
    grid = Grid.axis_aligned(shape, (10.0, 10.0, 10.0))
    return Case("c", grid, None, masks, {"PTV_7000": gy}, beams, technique, site)


CHECK = PlausibilityWarningsd(sites=["HeadNeck"], techniques=["IMRT"], prescription_gy=[69, 71], directions=[9, 9],
                              target_cc=[20, 2000])


def warnings(case: Case, dose_gy: float) -> list[str]:
    dose = torch.full((1, *case.grid.shape), dose_gy)
    return CHECK({"case": case, "pred": dose})["warnings"]


def test_a_case_like_the_training_data_gets_none():
    assert warnings(make(), 70.0) == []


def test_each_difference_is_named():
    found = " ".join(warnings(make(site="Lung", technique="VMAT", gy=60.0), 60.0))
    assert "site Lung" in found and "technique VMAT" in found and "prescription (Gy) 60" in found


def test_hot_spots_and_missing_coverage_are_named():
    assert "hottest voxel has 90.0 Gy" in warnings(make(), 90.0)[0]
    assert "D95 of PTV_7000 is 50.0 Gy" in warnings(make(), 50.0)[0]
