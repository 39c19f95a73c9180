"""Grids, exact and interpolated resampling, and what a case refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from custom.case import Beam, Case, CaseError, DoseScale, Grid, resample

TURN = Rotation.from_euler("xyz", (20, -35, 50), degrees=True).as_matrix()


def oblique(shape=(7, 8, 9), spacing=(2.0, 3.0, 1.5), origin=(-12.0, 5.0, 40.0), turn=TURN) -> Grid:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * spacing, origin
    return Grid(shape, affine)


# ------------------------------------------------------------------------------------------------------ grids
def test_world_and_index_are_inverse_on_an_oblique_grid():
    grid, index = oblique(), np.random.default_rng(0).uniform(-3, 12, (4, 5, 3))
    assert grid.to_world((0, 0, 0)) == pytest.approx((-12, 5, 40))
    assert grid.to_world((0, 1, 0)) - grid.origin_mm == pytest.approx(3.0 * TURN[:, 1])
    np.testing.assert_allclose(grid.to_index(grid.to_world(index)), index, atol=1e-9)
    assert grid.spacing_mm == pytest.approx((2.0, 3.0, 1.5))
    assert grid.voxel_cc == pytest.approx(2.0 * 3.0 * 1.5 / 1000)


def test_ras_affine_mirrors_left_and_posterior():
    grid = oblique()
    lps, ras = grid.to_world((3, 1, 2)), grid.ras_affine @ (3, 1, 2, 1)
    assert ras[:3] == pytest.approx(lps * (-1, -1, 1))


def test_crop_keeps_every_voxel_where_it_is():
    grid = oblique()
    part = grid.crop((slice(2, 6), slice(None), slice(3, None)))
    assert part.shape == (4, 8, 6)
    assert part.to_world((1, 1, 1)) == pytest.approx(grid.to_world((3, 1, 4)))


def test_axis_aligned_and_same_as():
    grid = Grid.axis_aligned((3, 4, 5), (2, 3, 4), (10, 20, 30))
    assert grid.is_axis_aligned and not oblique().is_axis_aligned
    assert [list(a) for a in grid.axes_mm()] == [[10, 12, 14], [20, 23, 26, 29], [30, 34, 38, 42, 46]]
    shifted = Grid.axis_aligned((3, 4, 5), (2, 3, 4), (10, 20, 30.01))
    assert grid.same_as(grid) and not grid.same_as(shifted) and grid.same_as(shifted, tolerance_mm=0.1)
    flipped = Grid((3, 4, 5), np.diag([-2.0, 3, 4, 1]))
    assert not flipped.is_axis_aligned
    with pytest.raises(CaseError, match="axis-aligned"):
        flipped.axes_mm()


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3)])
def test_grid_refuses_an_affine_without_inverse(affine):
    with pytest.raises(CaseError, match="invertible, finite 4x4"):
        Grid((2, 2, 2), affine)


# ------------------------------------------------------------------------------------------------------ resample
@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
@pytest.mark.parametrize("flips", [*itertools.product((False, True), repeat=3)], ids=str)
def test_permuted_and_flipped_grids_are_copied_exactly(order, flips):
    source = oblique((3, 4, 5))
    array = np.random.default_rng(1).normal(size=source.shape).astype(np.float32)
    wanted = np.flip(array.transpose(order), np.flatnonzero(flips))
    to_source = np.zeros((4, 4))  # target index -> source index
    for axis, (own, flip) in enumerate(zip(order, flips)):
        to_source[own, axis] = -1 if flip else 1
        to_source[own, 3] = array.shape[own] - 1 if flip else 0
    to_source[3, 3] = 1
    target = Grid(wanted.shape, source.affine @ to_source)
    assert np.array_equal(resample(array, source, target), wanted)


def test_whole_voxel_shifts_are_copied_exactly_and_filled():
    source = oblique((4, 5, 6))
    array = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    affine = source.affine.copy()
    affine[:3, 3] = source.to_world((-1, 2, 0))
    out = resample(array, source, Grid((4, 5, 8), affine), order=0, fill=-7)
    wanted = np.full((4, 5, 8), -7, dtype=np.int16)
    wanted[1:, :3, :6] = array[:3, 2:]
    assert out.dtype == np.int16 and np.array_equal(out, wanted)
    affine[:3, 3] = source.to_world((50, 0, 0))
    assert (resample(array, source, Grid((4, 5, 8), affine), fill=-7) == -7).all()


@pytest.mark.parametrize("turn", [np.eye(3), TURN], ids=["aligned", "rotated"])
def test_linear_function_is_exact_inside_and_fill_outside(turn):
    source = oblique((16, 14, 18), (3.0, 4.0, 2.5), (-20, -25, -20), turn)
    target = Grid.axis_aligned((30, 28, 26), (2.3, 1.9, 2.7), (-34.0, -27.0, -33.0))

    def plane(points):
        return points @ (0.7, -1.1, 0.4) + 5.0

    def places(grid):
        return grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))

    out = resample(plane(places(source)).astype(np.float32), source, target, fill=-999.0)
    at = source.to_index(places(target))
    inside = ((at >= 0) & (at <= np.array(source.shape) - 1)).all(-1)
    beyond = ((at < -0.51) | (at > np.array(source.shape) - 0.49)).any(-1)
    within = ((at > -0.49) & (at < np.array(source.shape) - 0.51)).all(-1)  # half a voxel around takes the edge's value
    assert inside.sum() > 1000 and beyond.sum() > 1000 and out.dtype == np.float32
    np.testing.assert_allclose(out[inside], plane(places(target))[inside], atol=1e-3)
    assert (out[beyond] == -999.0).all() and (out[within] > -900).all()


def test_nearest_keeps_labels_and_wrong_shape_is_told():
    source = Grid.axis_aligned((6, 6, 6), (2, 2, 2))
    labels = np.random.default_rng(0).integers(0, 4, source.shape).astype(np.uint8)
    finer = Grid.axis_aligned((12, 12, 12), (1, 1, 1), (-0.5, -0.5, -0.5))
    out = resample(labels, source, finer, order=0)
    assert out.dtype == np.uint8 and np.array_equal(out, labels.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    with pytest.raises(CaseError, match=r"\(2, 2, 2\).*\(6, 6, 6\)"):
        resample(np.zeros((2, 2, 2)), source, finer)


# ------------------------------------------------------------------------------------------------------ cases
def parts(**changes):
    body, low, high = np.ones((4, 4, 4), bool), np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    low[:2], high[1, 1, 1] = True, True
    given = dict(name="one", grid=Grid.axis_aligned((4, 4, 4), (2, 2, 2)), ct_hu=None,
                 masks={"Body": body, "PTV_5600": low, "PTV_7000": high},
                 prescription_gy={"PTV_5600": 56.0, "PTV_7000": 70.0}, beams=(Beam("G0", (0.0,), (0, 0, 0)),),
                 technique="IMRT", site="HeadNeck")
    return {**given, **changes}


def test_case_orders_and_joins_its_targets():
    case = Case(**parts())
    assert list(case.targets.items()) == [("PTV_7000", 70.0), ("PTV_5600", 56.0)]
    assert case.highest_prescription_gy == 70.0 and case.body.all()
    assert np.array_equal(case.target_mask(), case.masks["PTV_5600"])
    assert not case.beams[0].is_arc and Beam("A", (0.0, 10.0), (0, 0, 0)).is_arc


@pytest.mark.parametrize(("changes", "message"), [
    ({"masks": {"PTV_7000": np.ones((4, 4, 4), bool)}}, r"one: no 'Body' mask; found \['PTV_7000'\]"),
    ({"prescription_gy": {}}, r"no prescription; found the structures \['Body', 'PTV_5600', 'PTV_7000'\]"),
    ({"prescription_gy": {"PTV_6600": 66.0}}, "'PTV_6600', which is not among"),
    ({"prescription_gy": {"PTV_7000": 7000.0}}, "'PTV_7000' is 7000 Gy; expected 0 to 200"),
    ({"ct_hu": np.zeros((4, 4, 5))}, r"ct has shape \(4, 4, 5\), the grid \(4, 4, 4\)"),
    ({"dose_gy": np.zeros((3, 4, 4))}, r"dose has shape \(3, 4, 4\)"),
    ({"beams": ()}, "no beams; give them in an RTPLAN"),
])
def test_case_names_what_it_found(changes, message):
    with pytest.raises(CaseError, match=message):
        Case(**parts(**changes))


def test_dose_scale_goes_there_and_back():
    scale = DoseScale(70.0)
    assert scale.to_network(35.0) == 0.5 and scale.to_gy(0.5) == 35.0
