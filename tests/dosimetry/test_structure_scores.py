"""DoseDiff's scores on doses whose every metric is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from custom.case import Beam, Case, Grid
from custom.dosimetry.structure_scores import structure_scores


def make_case(**masks) -> Case:
    grid = Grid.axis_aligned((10, 10, 4), (5, 5, 5))
    body = np.ones(grid.shape, bool)
    return Case("drawn", grid, None, {"Body": body, **masks}, {"PTV_7000": 70.0}, (Beam("G0", (0.0,), (0, 0, 0)),),
                "IMRT", "HeadNeck")


def box(i, j) -> np.ndarray:
    mask = np.zeros((10, 10, 4), bool)
    mask[i, j] = True
    return mask


def test_every_figure_of_a_drawn_case():
    case = make_case(PTV_7000=box(slice(0, 5), slice(0, 4)), Parotid_L=box(slice(6, 8), slice(0, 4)),
                     SpinalCord=box(9, slice(0, 2)), Larynx=np.zeros((10, 10, 4), bool))
    reference = np.zeros((10, 10, 4))
    reference[:5, :4] = 70.0
    reference[6, :4], reference[7, :4] = 20.0, 40.0  # half of the parotid above 30 Gy
    reference[9, 0], reference[9, 1] = 30.0, 45.0
    dose = reference.copy()
    dose[:5, :4] = 66.0  # all below 95 % of 70 Gy = 66.5 Gy
    dose[6, :4] = 32.0
    dose[9, 0] = 41.0  # below the maximum, which stays
    found = structure_scores(case, dose, reference)
    assert found == pytest.approx({
        "roi_mae/PTV_7000_gy": 4.0, "dosediff_dose/PTV_7000_gy": 4.0, "dosediff_volume/PTV_7000_percent": 100.0,
        "roi_mae/Parotid_L_gy": 6.0, "dosediff_dose/Parotid_L_gy": 6.0, "dosediff_volume/Parotid_L_percent": 50.0,
        "roi_mae/SpinalCord_gy": 5.5, "dosediff_dose/SpinalCord_gy": 0.0,
        "dosediff_dose_score_gy": 10 / 3, "dosediff_volume_score_percent": 75.0,
    })


def test_equal_doses_have_no_error():
    case = make_case(PTV_7000=box(slice(0, 5), slice(0, 4)), Heart=box(7, 7))
    dose = np.random.default_rng(0).random((10, 10, 4)) * 70
    assert set(structure_scores(case, dose, dose).values()) == {0.0}


def test_without_structures_there_is_no_score():
    case = make_case(PTV_7000=np.zeros((10, 10, 4), bool))
    nothing = np.zeros((10, 10, 4))
    assert all(math.isnan(value) for value in structure_scores(case, nothing, nothing).values())
