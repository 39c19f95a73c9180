"""The dose operator in water: its transpose, depth dose, field size, directions and densities."""

from __future__ import annotations

import numpy as np
import pytest

from custom.case import Grid
from custom.physics.pencil_beam import SAD_MM, Direction, density_from_hu, depth_terms

SPACING = 5.0


@pytest.fixture(scope="module")
def cube() -> Grid:
    """Grid of a 30 cm water cube in air, centred on the origin."""
    return Grid.axis_aligned((68, 68, 30), (SPACING, SPACING, SPACING), (-167.5, -167.5, -72.5))


def places(grid: Grid) -> np.ndarray:
    return np.stack(np.meshgrid(*grid.axes_mm(), indexing="ij"))


def water(grid: Grid) -> np.ndarray:
    x, y, _ = places(grid)
    return ((np.abs(x) < 150) & (np.abs(y) < 150)).astype(np.float32)


def box(grid: Grid, half_mm, centre_mm=(0.0, 0.0, 0.0)) -> np.ndarray:
    off = [np.abs(p - c) for p, c in zip(places(grid), centre_mm)]
    return np.logical_and.reduce([o < h for o, h in zip(off, half_mm)])


def open_square(direction: Direction, half_mm: float) -> np.ndarray:
    """Fluence of a square field at the isocentre plane."""
    inside = (np.abs(direction.u_mm) <= half_mm)[:, None] & (np.abs(direction.w_mm) <= half_mm)[None, :]
    return inside.astype(np.float32)


def line_dose(direction: Direction, grid: Grid, fluence) -> tuple[np.ndarray, np.ndarray]:
    """Dose along y through the centre of the field (x = z = 2.5 mm), and the y of its voxels."""
    index = np.full(grid.shape[1], 34), np.arange(grid.shape[1]), np.full(grid.shape[1], 15)
    return direction.field(index).forward(fluence), grid.axes_mm()[1]


def test_adjoint_is_the_transpose(cube):
    rng = np.random.default_rng(0)
    direction = Direction(water(cube), cube, 37.0, (3.0, -8.0, 5.0), box(cube, (30, 20, 25), (10, 0, 0)))
    index = tuple(rng.integers(0, n, 4000) for n in cube.shape)
    field = direction.field(index)
    fluence = rng.random(direction.active.shape).astype(np.float32)
    residual = rng.normal(size=4000).astype(np.float32)
    dose, back = field.forward(fluence), field.adjoint(residual)
    scale = np.linalg.norm(residual) * np.linalg.norm(dose)
    assert dose.shape == (4000,) and back.shape == fluence.shape and dose.max() > 0
    assert abs(float(residual @ dose) - float((back * fluence).sum())) < 1e-4 * scale
    np.testing.assert_allclose(field.forward(2 * fluence + 1), 2 * dose + field.forward(0 * fluence + 1), rtol=1e-3,
                               atol=1e-3)
    some, residual = rng.permutation(4000)[:500], rng.normal(size=500)
    part = field.at(some)  # in float64, as an optimiser wants it: releases of numpy round in other places
    np.testing.assert_allclose(part.forward(fluence), dose[some], rtol=1e-4, atol=1e-5)
    one, other = residual @ part.forward(fluence), (part.adjoint(residual) * fluence).sum()
    assert one == pytest.approx(other, rel=1e-12, abs=1e-12 * np.linalg.norm(residual) * np.linalg.norm(dose[some]))


def test_depth_dose_of_a_10_cm_field_is_a_6_mv_one(cube):
    """Isocentre on the surface (SSD 100 cm): the build-up's maximum, and 10 cm depth at about two thirds of it."""
    surface = -150.0
    direction = Direction(water(cube), cube, 0.0, (2.5, surface, 2.5), box(cube, (50, 5, 50), (2.5, surface, 2.5)))
    fluence = open_square(direction, 50.0)
    dose, y = line_dose(direction, cube, fluence)
    depth = y - surface
    inside = depth > 0
    share, depth = dose[inside] / dose.max(), depth[inside]
    assert 10 <= depth[share.argmax()] <= 20
    assert 60 < 100 * np.interp(100.0, depth, share) < 70
    assert share[0] < 0.8 and (np.diff(share[depth > 20]) < 0).all()
    assert 100 * np.interp(200.0, depth, share) == pytest.approx(38, abs=4)


def test_dose_falls_with_the_square_of_the_distance():
    """The same depth below two surfaces 10 cm apart, under fields of the same size there."""
    doses = []
    for surface, size in ((0.0, 50.0), (100.0, 55.0)):  # 55 mm at 1.1 SAD is projected by 50 mm at the isocentre
        grid = Grid.axis_aligned((48, 24, 48), (5, 5, 5), (-117.5, surface - 7.5, -117.5))
        density = np.ones(grid.shape, np.float32)
        density[:, :2] = 0
        direction = Direction(density, grid, 0.0, (0, 0, 0), box(grid, (size, 30, size), (0, surface + 15, 0)), 2.5)
        index = np.array([24]), np.array([12]), np.array([24])
        doses.append(float(direction.field(index).forward(open_square(direction, 50.0))[0]))
        t = SAD_MM + grid.axes_mm()[1][12]
        doses[-1] *= (t / SAD_MM) ** 2
    assert doses[1] == pytest.approx(doses[0], rel=0.03)


@pytest.mark.parametrize(("gantry", "enters_from"), [(0, (0, -1)), (90, (1, 0)), (180, (0, 1)), (270, (-1, 0))])
def test_gantry_tells_where_the_beam_enters(cube, gantry, enters_from):
    """0 from anterior (-y), 90 from the patient's left (+x), 180 from posterior, 270 from the right."""
    direction = Direction(water(cube), cube, gantry, (0, 0, 0), box(cube, (20, 20, 20)), 10.0)
    points = np.array([[100 * s * enters_from[0], 100 * s * enters_from[1], 2.5] for s in (1, -1)])
    index = tuple(np.rint(cube.to_index(points)).astype(int).T)
    near, far = direction.field(index).forward(np.ones_like(direction.u_mm)[:, None] * np.ones_like(direction.w_mm))
    assert near > 1.5 * far > 0
    depth_near, depth_far = direction.radiological_depth(index)
    assert depth_near == pytest.approx(50, abs=4) and depth_far == pytest.approx(250, abs=4)
    assert direction.beam_eye_view(index)[2] == pytest.approx([900, 1100], abs=3)


def test_beams_eye_view_has_the_patients_sides(cube):
    """IEC X is the patient's left from the front, posterior from the left; IEC Y superior. Both at the isocentre."""
    point = np.rint(cube.to_index(np.array([[40.0, 20.0, 30.0]]))).astype(int)
    x, y, z = cube.to_world(point)[0]
    for gantry, across, towards in ((0, x, -y), (90, y, x), (180, -x, y), (270, -y, -x)):
        direction = Direction(water(cube), cube, gantry, (0, 0, 0), box(cube, (20, 20, 20)), 10.0)
        u, w, t = direction.beam_eye_view(tuple(point.T))
        assert t == pytest.approx(1000 - towards)
        assert u == pytest.approx(across * 1000 / t, abs=1e-3) and w == pytest.approx(z * 1000 / t, abs=1e-3)


def test_narrow_field_loses_dose_and_sharpness_in_lung(cube):
    """Without side scatter's equilibrium, lung gets less than its radiological depth tells, and a wider penumbra."""
    _, y, _ = places(cube)
    profiles, axis = [], []
    for density in (1.0, 0.25):
        medium = water(cube)
        medium[(y > -100) & (y < 60)] *= density
        direction = Direction(medium, cube, 0.0, (2.5, 0, 2.5), box(cube, (20, 20, 20), (2.5, 0, 2.5)))
        fluence = open_square(direction, 20.0)
        x = np.arange(26, 34), np.full(8, 34), np.full(8, 15)
        profile = direction.field(x).forward(fluence)
        axis.append(direction.field(tuple(a[-1:] for a in x)).forward(fluence)[0])
        axis[-1] /= depth_terms(direction.radiological_depth(tuple(a[-1:] for a in x)))[0][0]
        profiles.append(profile / profile[-1])
    assert axis[1] < 0.97 * axis[0]  # relative to the primary dose there
    edges = [np.interp((0.2, 0.8), profile, cube.axes_mm()[0][26:34]) for profile in profiles]
    assert np.ptp(edges[1]) > np.ptp(edges[0]) + 1.0


def test_water_cylinder_looks_the_same_from_everywhere():
    grid = Grid.axis_aligned((61, 61, 9), (4, 4, 8), (-120, -120, -32))
    x, y, z = places(grid)
    density = (np.hypot(x, y) < 100).astype(np.float32)
    target = (np.hypot(x, y) < 20) & (np.abs(z) < 20)
    radius = np.array([-60.0, -20.0, 0.0, 20.0, 60.0])
    lines = []
    for gantry in (0.0, 90.0, 180.0, 270.0):
        angle = np.deg2rad(gantry)
        points = np.stack([radius * np.sin(angle), -radius * np.cos(angle), 0 * radius], 1)
        index = tuple(np.rint(grid.to_index(points)).astype(int).T)
        direction = Direction(density, grid, gantry, (0, 0, 0), target, 5.0)
        lines.append(direction.field(index).forward(open_square(direction, 20.0)))
    np.testing.assert_allclose(lines, np.broadcast_to(lines[0], (4, 5)), rtol=0.02)
    assert (np.diff(lines[0]) > 0).all()  # from the exit to the entrance


def test_radiological_depth_behind_a_slab_of_half_density(cube):
    """5 cm of water, 10 cm of density 0.5, then water: 15 cm of depth count 10 cm."""
    _, y, _ = places(cube)
    density = water(cube)
    density[(y > -100) & (y < 0)] *= 0.5
    direction = Direction(density, cube, 0.0, (2.5, 0, 2.5), box(cube, (20, 20, 20)))
    j = np.searchsorted(cube.axes_mm()[1], [-122.5, -52.5, 47.5])
    depth = direction.radiological_depth((np.full(3, 34), j, np.full(3, 15)))
    assert depth == pytest.approx([27.5, 50 + 23.75, 50 + 50 + 47.5], abs=2.5)


def test_density_calibration_and_depth_curves():
    assert density_from_hu(np.array([-1000, 0, 500, 5000])) == pytest.approx([0.001, 1.0, 1.07 + 0.49 * 400 / 900, 2.4])
    terms = depth_terms(np.array([-5.0, 0.0, 15.0, 300.0]))
    assert (terms >= 0).all() and terms[:, 0] == pytest.approx(terms[:, 1])  # in front of the surface: as on it
    assert terms[1:, 1] == pytest.approx(0) and terms[0, 2] > terms[0, 1] > terms[0, 3]


def test_open_beamlets_cover_the_target_with_their_margin(cube):
    target = box(cube, (30, 20, 25))
    direction = Direction(water(cube), cube, 0.0, (0, 0, 0), target, 5.0, margin_mm=10.0)
    open_u, open_w = direction.u_mm[direction.active.any(1)], direction.w_mm[direction.active.any(0)]
    assert np.ptp(open_u) == pytest.approx(2 * (30 + 10), abs=10) and np.ptp(open_w) == pytest.approx(70, abs=10)
    assert np.diff(direction.u_mm) == pytest.approx(5.0)
