"""A parametric thorax with one lung tumour.

Measures are millimetres of a patient of size 1, set by eye to look like an adult; nothing here comes from a patient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from custom.case import BODY, Grid
from custom.phantom.shapes import Anatomy, Canvas

__all__ = ["CENTRE_MM", "EXTENT_MM", "draw"]

EXTENT_MM = (512.0, 512.0, 300.0)
CENTRE_MM = (0.0, 0.0, 0.0)
PRESCRIPTION_GY = {"PTV_6000": 60.0}
FRACTIONS = 30
LUNGS = {"Lung_L": 1, "Lung_R": -1}
TRIES = 512


@dataclass(frozen=True)
class _Build:
    """Measures (mm) that several organs share; curves are profiles over height."""

    size: float
    half_x: float
    half_y: float
    fat: float
    cage_x: float
    cage_y: float
    lung_top: float
    diaphragm: dict[str, float]
    heart_centre: np.ndarray
    heart_radii: np.ndarray
    spine_y: np.ndarray
    mediastinum: np.ndarray


def draw(grid: Grid, rng: np.random.Generator, texture: np.random.Generator) -> Anatomy:
    """Draw one patient.

    Args:
        grid: axis-aligned grid; :data:`EXTENT_MM` around :data:`CENTRE_MM` shows the whole anatomy.
        rng: decides the anatomy (no draw depends on the grid).
        texture: decides voxel textures.
    """
    canvas = Canvas(grid, texture, rng.uniform(0.92, 1.08), rng.uniform(-4, 4))
    build = _draw_build(canvas, rng)
    body, wall = _outline(canvas, build, rng)
    bones, cord = _bones(canvas, build, rng, body)
    heart, vessels = _heart_and_vessels(canvas, build, wall)
    lungs = _lungs(canvas, build, body, canvas.margin(bones["vertebrae"], 2.0) | heart | vessels)
    _paint_organs(canvas, build, rng, wall, lungs, heart, vessels)
    trachea, esophagus = _tubes(canvas, build, rng, body)
    _paint_bones(canvas, build, rng, bones, wall, cord)
    hard = np.logical_or.reduce(list(bones.values())) | trachea
    targets, side, place = _targets(canvas, build, rng, body, hard, esophagus, cord)
    gtv = targets["GTV"]
    canvas.paint(gtv, 40.0)
    masks = {name: lung & ~gtv for name, lung in lungs.items()}
    masks |= {"Heart": heart & ~gtv, "SpinalCord": cord, "Esophagus": esophagus, **targets}
    outline = ndimage.binary_fill_holes(body)
    masks = {name: mask & outline for name, mask in masks.items()}
    return Anatomy(canvas.hu, {**masks, BODY: outline}, dict(PRESCRIPTION_GY), FRACTIONS, side, place)


def _draw_build(canvas: Canvas, rng: np.random.Generator) -> _Build:
    """Draw the shared measures of one patient."""
    u, s = rng.uniform, canvas.size
    half_x, half_y, fat = s * u(155, 180), s * u(98, 118), u(6, 20)
    return _Build(
        size=s,
        half_x=half_x,
        half_y=half_y,
        fat=fat,
        cage_x=half_x - fat - 12,
        cage_y=half_y - fat - 12,
        lung_top=u(110, 125),
        diaphragm={"Lung_R": u(-95, -70), "Lung_L": u(-105, -80)},
        heart_centre=np.array((s * u(16, 28), -28 * s + u(-5, 5), s * u(-58, -42))),
        heart_radii=s * np.array((u(48, 58), u(38, 45), u(46, 54))),
        spine_y=s * canvas.profile((-160, 58), (-60, 66), (60, 62), (150, 46)),
        mediastinum=s * canvas.profile((-160, 30), (-60, 30), (0, 26), (60, 24), (130, 22)),
    )


def _outline(canvas: Canvas, b: _Build, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The body with breasts and the furrow of the back, and the muscular wall under its fat; both painted."""
    half_x = b.half_x * canvas.profile((-160, 1.02), (-60, 1.0), (40, 0.98), (100, 0.97), (150, 0.88))
    half_y = b.half_y * canvas.profile((-160, 0.98), (-60, 1.02), (40, 1.0), (100, 0.9), (150, 0.75))
    body = canvas.column(0, 8, half_x, half_y, 2.5)
    breast = rng.uniform(0, 22)
    if breast > 8:
        for side in (1, -1):
            centre = (0.48 * side * b.half_x, -0.78 * b.half_y, -20)
            body = body | canvas.ellipsoid(centre, (52, 22 + breast, 48))
    body = body & (canvas.y - 8 <= half_y - 7 * np.exp(-((canvas.x / 22.0) ** 2)))
    wall = canvas.column(0, 8, half_x - b.fat, half_y - b.fat, 2.4) & body
    canvas.paint(body, -95.0)
    canvas.paint(wall, 45.0)
    return body, wall


def _bones(
    canvas: Canvas, b: _Build, rng: np.random.Generator, body: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Vertebrae, arches, oblique ribs and sternum (not painted yet), and the spinal cord."""
    s, x, y, z, mid = b.size, canvas.x, canvas.y, canvas.z, b.spine_y
    vertebrae = canvas.column(0, mid - 22 * s, 18 * s, 15 * s, 2.6)
    arches = canvas.column(0, mid, 21 * s, 16 * s) & ~canvas.column(0, mid, 10 * s, 9 * s) & (y > mid - 12)
    shell = canvas.column(0, 8, b.cage_x, b.cage_y, 2.2) & ~canvas.column(0, 8, b.cage_x - 9, b.cage_y - 9, 2.2)
    pitch = rng.uniform(24, 28)
    slope = z - 0.28 * (y - 8)  # ribs fall towards the front
    ribs = shell & (np.mod(slope + rng.uniform(0, pitch), pitch) < 11) & (np.abs(x) > 14)
    sternum = (np.abs(x) < 16) & (np.abs(y - (16 - b.cage_y)) < 7) & (z > -30) & (z < 85)
    bones = {"vertebrae": vertebrae, "arches": arches, "ribs": ribs, "sternum": sternum}
    return {name: bone & body for name, bone in bones.items()}, canvas.column(0, mid, 6 * s, 5 * s) & body


def _heart_and_vessels(canvas: Canvas, b: _Build, wall: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heart, and aorta with superior vena cava."""
    s, z = b.size, canvas.z
    heart = canvas.ellipsoid(b.heart_centre, b.heart_radii, 2.1) & wall & (canvas.y < b.spine_y - 42 * s)
    descending = canvas.column(24 * s, b.spine_y - 27 * s, 12, 12) & (z < 45 * s)
    arch = canvas.ellipsoid((14, 8, 45 * s), (16, 38, 16))
    cava = canvas.column(-24 * s, -15 * s, 11, 11) & (z > -15) & (z < 80)
    return heart, descending | arch | cava


def _lungs(canvas: Canvas, b: _Build, body: np.ndarray, not_lung: np.ndarray) -> dict[str, np.ndarray]:
    """Both lungs: inside the rib cage, beside the mediastinum, above the domes of the diaphragm."""
    s, x, y, z = b.size, canvas.x, canvas.y, canvas.z
    inner_x, inner_y = b.cage_x - 13, b.cage_y - 13
    inside = canvas.column(0, 8, inner_x, inner_y, 2.2) & body & ~not_lung
    taper = np.sqrt(np.clip((b.lung_top - z) / 70.0, 0, 1)) + 1e-3  # apex
    lungs = {}
    for name, side in LUNGS.items():
        lobe = canvas.column(side * 68 * s, 8, 0.62 * inner_x * taper, inner_y * taper, 2.4)
        dome = z > b.diaphragm[name] - 0.006 * ((x - side * 75) ** 2 + (y - 5) ** 2)
        medial = side * x > b.mediastinum * (1 + 0.25 * (y < -20))
        lungs[name] = inside & lobe & dome & medial & (z < b.lung_top)
    return lungs


def _paint_organs(
    canvas: Canvas, b: _Build, rng: np.random.Generator, wall: np.ndarray, lungs: dict, heart: np.ndarray,
    vessels: np.ndarray,
) -> None:  # fmt: skip
    """Lungs with their vessels and dependent density, liver, stomach with its air, mediastinum."""
    x, y, z = canvas.x, canvas.y, canvas.z
    either = lungs["Lung_L"] | lungs["Lung_R"]
    for lung in lungs.values():
        texture = canvas.noise(6.0)
        canvas.paint(lung, rng.uniform(-830, -740) + 0.6 * y + 35 * texture + 260 * (texture > 2.1))
    liver = canvas.column(-40, 0, 0.72 * b.cage_x, b.cage_y - 14, 2.2) & (z < b.diaphragm["Lung_R"] + 8) & (x < 60)
    canvas.paint(liver & wall & ~either, 60.0)
    stomach = canvas.ellipsoid((70 * b.size, -20, b.diaphragm["Lung_L"] - 30), (38, 35, 30)) & wall & ~either
    canvas.paint(stomach, 20.0)
    canvas.paint(stomach & (y < -32), -900.0)
    canvas.paint(heart | vessels, 45.0)
    between = canvas.column(0, 8, b.cage_x - 9, b.cage_y - 9, 2.2) & (np.abs(x) < 1.1 * b.mediastinum)
    canvas.paint(between & (y < -20) & (z > 10) & ~heart & ~vessels & ~either, -70.0)


def _tubes(
    canvas: Canvas, b: _Build, rng: np.random.Generator, body: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Trachea with the main bronchi, and the oesophagus; painted."""
    s, z = b.size, canvas.z
    trachea = canvas.column(0, s * canvas.profile((20, 12), (60, 4), (150, -8)), 9, 8) & (z > 22)
    for side in (1, -1):
        trachea = trachea | (canvas.column(0.9 * side * (24 - z), 13 * s, 9, 6.5) & (z <= 26) & (z > -14))
    y = s * canvas.profile((-160, 18), (-60, 24), (20, 27), (60, 20), (150, 10))
    esophagus = canvas.column(rng.uniform(1, 10), y, 8.5, 6) & body
    canvas.paint(trachea, -980.0)
    canvas.paint(esophagus, 35.0)
    return trachea, esophagus


def _paint_bones(
    canvas: Canvas, b: _Build, rng: np.random.Generator, bones: dict, wall: np.ndarray, cord: np.ndarray
) -> None:
    """Bones with discs, the spinal canal and the shoulder blades."""
    disc = np.mod(canvas.z + rng.uniform(0, 26), 26.0) < 5
    canvas.paint(bones["ribs"], 420.0)
    canvas.paint(bones["vertebrae"], 280.0)
    canvas.paint(bones["vertebrae"] & disc, 90.0)
    canvas.paint(bones["arches"] & ~disc, 380.0)
    canvas.paint(canvas.column(0, b.spine_y, 9.5 * b.size, 8.5 * b.size), 12.0)
    canvas.paint(cord, 32.0)
    canvas.paint(bones["sternum"], 280.0)
    cage = canvas.column(0, 8, b.cage_x, b.cage_y, 2.2)
    for side in (1, -1):
        y = 48 * b.size + 0.045 * (150 - canvas.z)
        blade = canvas.column(side * (b.cage_x + 4), y, 5, 30) & (canvas.z > 20)
        canvas.paint(blade & wall & ~cage, 380.0)


def _targets(
    canvas: Canvas, b: _Build, rng: np.random.Generator, body: np.ndarray, hard: np.ndarray, esophagus: np.ndarray,
    cord: np.ndarray,
) -> tuple[dict[str, np.ndarray], int, str]:  # fmt: skip
    """A tumour anywhere in one lung, every other time with a hilar node, and its planning target.

    Args:
        hard: bone and central airways, where no tumour grows.
    """
    u = rng.uniform
    side = 1 if rng.random() < 0.5 else -1
    radius = u(11, 24)
    gtv = canvas.blob(rng, _place(b, rng, side, radius), radius)
    gtv = gtv & canvas.column(0, 8, b.cage_x - 9, b.cage_y - 9, 2.2)
    nodal = rng.random() < 0.55
    node = canvas.blob(rng, (side * u(14, 30), 8, u(0, 30)), u(8, 14), lobes=2) & ~esophagus
    if nodal:
        gtv = gtv | node
    gtv = gtv & body & ~hard
    ptv = canvas.margin(gtv, u(6, 9)) & canvas.margin(body, -5.0) & ~canvas.margin(cord, 5.0)
    place = f"{'left' if side > 0 else 'right'} lung{', hilar node' if nodal else ''}"
    return {"GTV": gtv, "PTV_6000": ptv}, side, place


def _place(b: _Build, rng: np.random.Generator, side: int, radius: float) -> np.ndarray:
    """The first of a fixed number of random points that lies well inside the lung, clear of heart and diaphragm.

    Points are tested against the measures, not the voxels, so the tumour keeps its place at every resolution.
    """
    x, y, z = rng.uniform((0, -110, -85), (180, 110, 85), size=(TRIES, 3)).T
    half_x, half_y = b.cage_x - 13 - radius / 2, b.cage_y - 13 - radius / 2
    inside = (x / half_x) ** 2.2 + (np.abs(y - 8) / half_y) ** 2.2 <= 1
    inside &= (x > 34 * b.size + radius / 2) & (z > b.diaphragm["Lung_L" if side > 0 else "Lung_R"] + radius)
    x = side * x
    to_heart = (np.column_stack((x, y, z)) - b.heart_centre) / (b.heart_radii + radius / 2)
    inside &= (to_heart**2).sum(axis=1) > 1
    first = int(np.argmax(inside))
    return np.array((x[first], y[first], z[first]))
