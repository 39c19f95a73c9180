"""Open fields on a mirror-symmetric phantom."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from custom.case import Beam, Case, Grid
from custom.physics.fluence import BeamModel
from custom.physics.open_field import open_field_dose


@pytest.fixture(scope="module")
def case() -> Case:
    """An elliptic body, symmetric about x = 0, a target on the midline within a wider one, a lung on either side."""
    grid = Grid.axis_aligned((40, 32, 12), (6, 6, 6), (-117, -93, -33))
    x, y, z = np.stack(np.meshgrid(*grid.axes_mm(), indexing="ij"))
    body = (x / 110) ** 2 + (y / 85) ** 2 < 1
    lungs = (np.hypot(np.abs(x) - 60, y) < 30)
    low = (np.hypot(x / 2, y) < 15) & (np.abs(z) < 20)
    high = low & (np.abs(x) < 15)
    hu = np.where(body, np.where(lungs, -750, 0), -1000).astype(np.float32)
    beams = tuple(Beam(f"G{a}", (float(a),), (0, 0, 0)) for a in (0, 70, 140, 180, 220, 290))
    return Case("mirror", grid, hu, {"Body": body, "PTV_6000": high, "PTV_5000": low},
                {"PTV_6000": 60.0, "PTV_5000": 50.0}, beams, "IMRT", "Lung")


@pytest.fixture(scope="module")
def paths(case) -> list[np.ndarray]:
    return open_field_dose(BeamModel(case, beamlet_mm=6.0), [case.masks["PTV_6000"], case.masks["PTV_5000"]])


def test_mean_is_one_in_the_target_and_zero_outside_the_body(case, paths):
    for volume, roi in zip(paths, ("PTV_6000", "PTV_5000"), strict=True):
        assert volume.dtype == np.float32 and volume.min() >= 0
        assert volume[case.masks[roi]].mean() == pytest.approx(1.0, abs=1e-4)
        assert (volume[~case.body] == 0).all()


def test_symmetric_patient_and_beams_give_symmetric_paths(paths):
    for volume in paths:
        assert np.abs(volume - volume[::-1]).max() < 0.03
        assert np.abs(volume - volume[::-1]).mean() < 0.003


def test_apertures_follow_their_own_target(case, paths):
    """Beside the narrow target, in the wide one, the wide fields give more."""
    beside = case.masks["PTV_5000"] & ~case.masks["PTV_6000"]
    high, low = (volume[beside].mean() for volume in paths)
    assert low > 1.2 * high


def test_one_beam_passes_only_along_its_line(case):
    """From anterior: dose in front of and behind the target, attenuated with depth; next to none beside it."""
    single = dataclasses.replace(case, beams=case.beams[:1])
    (volume,) = open_field_dose(BeamModel(single, beamlet_mm=6.0), [case.masks["PTV_6000"]])
    along = volume[20, :, 6]
    inside = np.flatnonzero(case.body[20, :, 6])
    assert along[inside[3]] > 1.2 > 1 > along[inside[-3]] > 0.4
    assert volume[34, 16, 6] < 0.1  # 9 cm to the left


def test_target_outside_the_body_gives_no_division_by_zero(case):
    body = case.body.copy()
    body[case.masks["PTV_5000"]] = False
    hollow = dataclasses.replace(case, masks={**case.masks, "Body": body})
    (volume,) = open_field_dose(BeamModel(hollow, beamlet_mm=10.0), [case.masks["PTV_6000"]])
    assert np.isfinite(volume).all()
