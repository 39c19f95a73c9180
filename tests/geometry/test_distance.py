"""Signed distances against an analytic sphere."""

from __future__ import annotations

import numpy as np
import pytest

from custom.geometry.distance import DISTANCE_FORMS, isdm, psdm, signed_distance_mm, tsbdm

SPACING = np.array([2.0, 3.0, 4.0])
RADIUS = 22.0


def sphere(spacing) -> tuple[np.ndarray, np.ndarray]:
    """A sphere of 22 mm in a box of about 9 cm: its mask, and its true signed distance in mm."""
    axes = [d * (np.arange(n) - (n - 1) / 2) for n, d in zip(np.rint(90 / spacing).astype(int), spacing)]
    radius = np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij")))
    return radius <= RADIUS, RADIUS - radius


@pytest.mark.parametrize(("spacing", "closest"), [((3.0, 3.0, 3.0), np.sqrt(27) / 2), (SPACING, 4.0 - 1.0)], ids=str)
def test_sphere_is_met_as_closely_as_its_voxels_tell(spacing, closest):
    """Within half a voxel diagonal of cubic voxels; with others the longest edge less half of the shortest."""
    mask, truth = sphere(np.asarray(spacing))
    found = signed_distance_mm(mask, spacing)
    assert found.dtype == np.float32 and found.shape == mask.shape
    assert np.array_equal(found > 0, mask)
    assert np.abs(found - truth).max() <= closest
    assert np.abs(found - truth).mean() < min(spacing) / 2


def test_zero_level_lies_between_the_voxels_on_either_side():
    """A half space: the surface is half an edge from both layers, and the complement is the negative."""
    mask = np.zeros((10, 4, 4), bool)
    mask[6:] = True
    found = signed_distance_mm(mask, (2.0, 2.0, 2.0))
    assert found[:, 1, 1] == pytest.approx(2.0 * np.arange(10) - 11.0)
    assert np.array_equal(signed_distance_mm(~mask, (2.0, 2.0, 2.0)), -found)


def test_reach_clips_the_full_map():
    mask, _ = sphere(SPACING)
    moved = np.roll(mask, (9, 3, -3), (0, 1, 2))  # near an edge, so that the working box is cut there
    for case, reach in ((mask, 9.0), (moved, 9.0), (mask, 100.0)):
        full = signed_distance_mm(case, SPACING)
        np.testing.assert_allclose(signed_distance_mm(case, SPACING, reach), np.clip(full, -reach, reach), atol=1e-5)


def test_empty_mask_is_an_error():
    with pytest.raises(ValueError, match="mask is empty"):
        signed_distance_mm(np.zeros((3, 3, 3), bool), SPACING)


def test_full_mask_is_inside_everywhere():
    assert (signed_distance_mm(np.ones((3, 3, 3), bool), (1, 1, 1), 5.0) > 0).all()


def test_psdm_of_an_anisotropic_sphere_is_its_distance_in_decimetres():
    mask, truth = sphere(SPACING)
    found = psdm(mask, SPACING)
    assert np.abs(found - truth / 100).max() <= (4.0 - 1.0) / 100
    # the paper's text (offset squared times spacing) would give sqrt(d * s) instead of d: far off along each axis
    wrong = np.sqrt(np.abs(truth) * 4.0) / 100
    outside = truth < -15
    assert np.abs(np.abs(found) - wrong)[outside].min() > 0.03


def test_isdm_counts_voxels_whatever_their_size():
    """An ellipsoid in mm is a sphere in voxels when its half axes are proportional to the voxel's edges."""
    index = np.stack(np.meshgrid(*[np.arange(33) - 16.0] * 3, indexing="ij"))
    radius = np.sqrt((index**2).sum(0))
    found = isdm(radius <= 9.0, SPACING)
    assert np.abs(found - (9.0 - radius) / 100).max() <= np.sqrt(3) / 2 / 100
    assert np.array_equal(found, isdm(radius <= 9.0, (1.0, 1.0, 5.0)))


def test_tsbdm_is_large_inside_and_vanishes_outside():
    mask, _ = sphere(np.array([3.0, 3.0, 3.0]))
    found = tsbdm(mask, (3.0, 3.0, 3.0))
    distance = signed_distance_mm(mask, (1, 1, 1))
    assert found.max() == pytest.approx(2.0) and found[mask].min() >= 1.0 and found[~mask].max() < 1.0
    order = np.argsort(distance, axis=None)
    assert (np.diff(found.ravel()[order]) >= -1e-6).all()  # never falls towards the inside
    assert found[0, 0, 0] < 0.1


def test_every_form_by_name():
    mask, _ = sphere(np.array([5.0, 5.0, 5.0]))
    assert set(DISTANCE_FORMS) == {"psdm", "isdm", "tsbdm", "mask"}
    for form, (build, absent) in DISTANCE_FORMS.items():
        found = build(mask, (5.0, 5.0, 5.0))
        assert found.dtype == np.float32 and found.shape == mask.shape
        assert found.min() >= absent and found[mask].min() > found[~mask].max(), form
