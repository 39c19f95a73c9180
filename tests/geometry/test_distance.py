"""Signed distances against an analytic sphere."""

from __future__ import annotations

import numpy as np
import pytest

from custom.geometry.distance import signed_distance_mm

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
