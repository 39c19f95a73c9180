"""Any spacing, origin, orientation and shape: what was drawn or computed at a patient point is read at that point."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from scipy.spatial.transform import Rotation

from custom.case import BODY, Beam, Case, Grid, Site, Technique
from custom.io.ct import check_geometry
from custom.io.rtdose import read_rtdose, write_rtdose
from custom.io.rtstruct import Roi, rasterise
from custom.transforms.load import to_working_grid

EASY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
spacings = st.tuples(*[st.floats(0.4, 6.0)] * 3)
origins = st.tuples(*[st.floats(-500.0, 500.0)] * 3)
shapes = st.tuples(st.integers(3, 20), st.integers(3, 20), st.integers(2, 12))
right_angles = st.sampled_from([r.as_matrix() for r in Rotation.create_group("O")])
any_angle = st.builds(lambda v, a: Rotation.from_rotvec(a * np.array(v) / (np.linalg.norm(v) or 1)).as_matrix(),
                      st.tuples(*[st.floats(-1, 1)] * 3), st.floats(-3.1, 3.1))
orientations = st.one_of(right_angles, any_angle)


def grid_of(shape, spacing, origin, directions) -> Grid:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.asarray(directions) * np.array(spacing), origin
    return Grid(shape, affine)


grids = st.builds(grid_of, shapes, spacings, origins, orientations)


def outline(kind: str, count: int) -> np.ndarray:
    """A closed curve around the origin, radius up to 1, ``(count, 2)``; a star is not convex."""
    angle = 2 * np.pi * np.arange(count) / count
    radius = np.where(np.arange(count) % 2, 0.45, 1.0) if kind == "star" else np.ones(count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def inside(points: np.ndarray, polygon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Winding by angles, another way than the reader's: whether points lie inside, and their distance to the edge."""
    a = polygon[None] - points[:, None]
    b = np.roll(polygon, -1, axis=0)[None] - points[:, None]
    turn = np.arctan2(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0], (a * b).sum(-1)).sum(1)
    edge = b - a
    t = np.clip(-(a * edge).sum(-1) / np.maximum((edge**2).sum(-1), 1e-12), 0, 1)
    return np.abs(turn) > np.pi, np.linalg.norm(a + t[..., None] * edge, axis=-1).min(1)


@EASY
@given(grid=grids, kind=st.sampled_from(["round", "star"]), count=st.sampled_from([4, 6, 12, 40]),
       centre=st.tuples(st.floats(0.2, 0.8), st.floats(0.2, 0.8)), size=st.floats(0.15, 0.9))
def test_a_structure_fills_the_voxels_whose_centres_lie_inside(grid, kind, count, centre, size):
    """Contours in patient mm on some slices, rasterised: each voxel centre is judged by its winding number."""
    ni, nj, nk = grid.shape
    polygon = outline(kind, count) * size * np.array([ni, nj]) / 2 + np.array(centre) * np.array([ni, nj])
    slices = range(0, nk, 1) if nk < 4 else range(1, nk - 1)
    drawn = [np.column_stack([polygon, np.full(count, float(k))]) for k in slices]
    centres = np.stack(np.meshgrid(np.arange(ni), np.arange(nj), indexing="ij"), -1).reshape(-1, 2).astype(float)
    within, distance = inside(centres, polygon)
    if not (within & (distance > 1e-6)).any():
        return  # smaller than a voxel: refused, tests/io/test_rtstruct.py
    roi = Roi(1, "ROI", "", tuple(grid.to_world(c) for c in drawn))
    mask = rasterise(roi, grid)
    clear = (distance > 1e-6).reshape(ni, nj)
    for k in range(nk):
        expected = within.reshape(ni, nj) if k in slices else np.zeros((ni, nj), bool)
        np.testing.assert_array_equal(mask[:, :, k][clear], expected[clear])


@EASY
@given(shape=shapes, spacing=spacings, origin=origins, directions=orientations, seed=st.integers(0, 99))
def test_slices_in_any_order_give_their_grid(shape, spacing, origin, directions, seed):
    grid = grid_of(shape, spacing, origin, directions)
    if np.linalg.det(grid.affine[:3, :3]) < 0:  # a series' normal is row x column
        grid = Grid(shape, grid.affine @ np.diag([1, 1, -1, 1]))
    headers = []
    for k in range(shape[2]):
        ds = Dataset()
        ds.ImagePositionPatient = [f"{v:.8g}"[:16] for v in grid.to_world((0, 0, k))]
        ds.ImageOrientationPatient = [f"{v:.10f}"[:16] for v in (grid.affine[:3, :2] / grid.spacing_mm[:2]).T.ravel()]
        ds.PixelSpacing = [f"{grid.spacing_mm[1]:.10g}", f"{grid.spacing_mm[0]:.10g}"]
        ds.Columns, ds.Rows = shape[:2]
        headers.append((ds, Path(f"{k}.dcm")))
    shuffled = np.random.default_rng(seed).permutation(shape[2])
    found, order = check_geometry([headers[i] for i in shuffled], [])
    assert found.same_as(grid, tolerance_mm=1e-3)
    assert [int(shuffled[i]) for i in order] == list(range(shape[2]))


@EASY
@given(grid=grids, seed=st.integers(0, 99), peak_gy=st.floats(0.1, 120.0), bits=st.sampled_from([16, 32]))
def test_an_rtdose_keeps_every_dose_at_its_point(grid, seed, peak_gy, bits):
    dose = np.random.default_rng(seed).random(grid.shape) * peak_gy
    with tempfile.TemporaryDirectory() as folder:
        write_rtdose(Path(folder, "d.dcm"), dose, grid, {}, bits=bits)
        read = read_rtdose(Path(folder, "d.dcm"))
    index = np.argwhere(np.ones(grid.shape, bool))
    there = read.grid.to_index(grid.to_world(index))
    nearest = np.rint(there).astype(int)
    assert np.abs(there - nearest).max() < 1e-3
    tolerance = peak_gy / (2**16 - 1) if bits == 16 else 2e-6
    np.testing.assert_allclose(read.gy[tuple(nearest.T)], dose[tuple(index.T)], atol=tolerance, rtol=1e-6)


@settings(EASY, max_examples=30)
@given(spacing=st.tuples(*[st.floats(0.8, 5.0)] * 3), origin=origins, directions=orientations,
       slope=st.tuples(*[st.floats(-0.3, 0.3)] * 3))
def test_the_working_grid_keeps_a_field_and_a_ball_in_place(spacing, origin, directions, slope):
    """A dose that is linear in patient mm, and a ball: the same numbers at the same points on the working grid."""
    shape = tuple(int(n) for n in np.clip(np.ceil(70.0 / np.array(spacing)), 8, 60))
    grid = grid_of(shape, spacing, origin, directions)
    world = grid.to_world(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    centre = grid.to_world((np.array(shape) - 1) / 2)
    field = (30.0 + (world - centre) @ np.array(slope)).astype(np.float32)
    ball = np.linalg.norm(world - centre, axis=-1) <= 22.0
    case = Case(name="x", grid=grid, ct_hu=field, masks={BODY: np.ones(shape, bool), "PTV": ball},
                prescription_gy={"PTV": 60.0}, beams=(Beam("b", (0.0,), tuple(centre)),), technique=Technique.IMRT,
                site=Site.HEAD_NECK, dose_gy=field)
    work = to_working_grid(case, (3.9, 3.9, 2.5), (1.9, 1.9, 1.4))
    points = work.grid.to_world(np.stack(np.meshgrid(*map(np.arange, work.grid.shape), indexing="ij"), -1))
    index = grid.to_index(points)
    margin = 2.0 * np.maximum(1.0, 4.0 / np.array(spacing)) + 1.0  # the average's window, and an interpolated voxel
    deep = ((index > margin) & (index < np.array(shape) - 1 - margin)).all(-1)
    expected = 30.0 + (points - centre) @ np.array(slope)
    np.testing.assert_allclose(work.dose_gy[deep], expected[deep], atol=0.02)
    distance = np.linalg.norm(points - centre, axis=-1)
    reach = 0.87 * max(*work.grid.spacing_mm, *spacing) + 1.0
    assert work.masks["PTV"][deep & (distance < 22.0 - reach)].all()
    assert not work.masks["PTV"][distance > 22.0 + reach].any()
