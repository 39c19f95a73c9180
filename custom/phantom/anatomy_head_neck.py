"""A parametric head and neck: skull base to lung apices, with organs at risk and two dose levels.

Measures are millimetres of a patient of size 1, set by eye to look like an adult; nothing here comes from a patient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from custom.case import BODY, Grid
from custom.phantom.shapes import Anatomy, Canvas

__all__ = ["CENTRE_MM", "EXTENT_MM", "draw"]

EXTENT_MM = (512.0, 512.0, 320.0)
CENTRE_MM = (0.0, 10.0, -15.0)
PRESCRIPTION_GY = {"PTV_7000": 70.0, "PTV_5600": 56.0}
FRACTIONS = 35
SUBSITES = {"oropharynx": 0.45, "larynx": 0.25, "hypopharynx": 0.15, "nasopharynx": 0.15}


@dataclass(frozen=True)
class _Build:
    """Measures (mm) that several organs share; curves are profiles over height."""

    size: float
    neck: float
    shoulder: float
    width: float
    jaw_front_y: float
    jaw_depth: float
    jaw_half_width: float
    larynx_z: float
    spine_y: np.ndarray
    airway_y: np.ndarray
    airway_r: np.ndarray


def draw(grid: Grid, rng: np.random.Generator, texture: np.random.Generator) -> Anatomy:
    """Draw one patient.

    Args:
        grid: axis-aligned grid; :data:`EXTENT_MM` around :data:`CENTRE_MM` shows the whole anatomy.
        rng: decides the anatomy (no draw depends on the grid).
        texture: decides voxel textures.
    """
    uniform = rng.uniform
    canvas = Canvas(grid, texture, uniform(0.92, 1.08), uniform(-3, 3), uniform(-0.03, 0.03))
    build = _draw_build(canvas, rng)
    body = _outline(canvas, build)
    masks: dict[str, np.ndarray] = {}
    _soft_tissue_and_skull(canvas, build, body)
    spine = _spine(canvas, build, rng, body)
    masks |= _nerves(canvas, build, rng)
    airway, organs = _airway(canvas, build, rng, body)
    masks |= organs
    masks |= _jaw(canvas, build, rng, body, airway)
    masks |= _parotids(canvas, build, rng, body, masks["Bone_Mandible"])
    _shoulders(canvas, build, body, spine)
    hard = spine | masks["Bone_Mandible"] | airway
    targets, side, subsite = _targets(canvas, build, rng, body, hard, masks["SpinalCord"] | masks["Brainstem"])
    masks |= targets
    canvas.paint(masks["GTV"] & (canvas.hu > -200), 55.0)
    outline = ndimage.binary_fill_holes(body)
    masks = {name: mask & outline for name, mask in masks.items()}
    return Anatomy(canvas.hu, {**masks, BODY: outline}, dict(PRESCRIPTION_GY), FRACTIONS, side, subsite)


def _draw_build(canvas: Canvas, rng: np.random.Generator) -> _Build:
    """Draw the shared measures of one patient."""
    u, s = rng.uniform, canvas.size
    spine = [(-180, 62), (-110, 45), (-60, 28), (-20, 20), (20, 24), (45, 30), (90, 32)]  # cervical lordosis
    airway = [(-180, 22), (-110, 5), (-60, -20), (-30, -18), (0, -4), (40, -8), (60, -30)]
    calibre = [(-180, 9.5), (-70, 9), (-45, 7), (-20, 9.5), (5, 8), (35, 9), (50, 6)]
    return _Build(
        size=s,
        neck=s * u(54, 68),
        shoulder=s * u(185, 225),
        width=s * u(0.95, 1.05),
        jaw_front_y=-78 * s * u(0.95, 1.03),
        jaw_depth=s * u(60, 70),
        jaw_half_width=s * u(41, 47),
        larynx_z=u(-52, -40),
        spine_y=s * canvas.profile(*spine),
        airway_y=s * canvas.profile(*airway),
        airway_r=u(0.9, 1.15) * canvas.profile(*calibre),
    )


def _outline(canvas: Canvas, b: _Build, inset_mm: float = 0.0) -> np.ndarray:
    """Skin (or what lies ``inset_mm`` under it): shoulders, neck, head, chin and nose."""
    s, neck, shoulder, w = b.size, b.neck, b.shoulder, b.width
    half_x = canvas.profile(
        (-180, shoulder), (-125, shoulder), (-100, 0.72 * shoulder), (-78, 1.25 * neck), (-55, neck), (-20, neck),
        (15, 70 * w), (50, 76 * w), (95, 76 * w), (125, 60 * w), (145, 35 * w), (155, 8),
    )  # fmt: skip
    half_y = canvas.profile(
        (-180, 100 * s), (-110, 88 * s), (-80, 68 * s), (-55, 60 * s), (-20, 66 * s), (10, 86 * s), (50, 98 * s),
        (95, 97 * s), (125, 75 * s), (145, 42 * s), (155, 9),
    )  # fmt: skip
    centre_y = canvas.profile((-180, 18), (-110, 18), (-80, 10), (-40, 6), (0, -2), (50, -4), (150, 4))
    trunk = canvas.column(0, centre_y, half_x - inset_mm, half_y - inset_mm, 2.3) & (canvas.z < 155 - inset_mm)
    chin = canvas.ellipsoid((0, -62 * s, 3), (46 * s - inset_mm, 42 * s - inset_mm, 24 - inset_mm))
    if inset_mm:
        return trunk | chin
    return trunk | chin | canvas.ellipsoid((0, -98 * s, 52), (11, 16, 16))


def _soft_tissue_and_skull(canvas: Canvas, b: _Build, body: np.ndarray) -> None:
    s, w = b.size, b.width
    canvas.paint(body, -100.0)  # subcutaneous fat
    inner = _outline(canvas, b, 5 * s) & body
    canvas.paint(inner, 40.0)
    canvas.paint(inner & (canvas.noise(9.0) > 1.1), -80.0)  # fat planes between the muscles
    canvas.paint(canvas.ellipsoid((0, 2, 88), (68 * w, 88 * s, 60)) & (canvas.z > 38) & body, 900.0)
    canvas.paint(canvas.ellipsoid((0, 2, 88), (61 * w, 80 * s, 53)) & (canvas.z > 46) & body, 35.0)
    canvas.paint(canvas.ellipsoid((0, -52 * s, 48), (22 * s, 22, 18)) & body, -300.0)  # nasal cavity
    for side in (1, -1):
        canvas.paint(canvas.ellipsoid((side * 30 * s, -58 * s, 45), (13, 14, 14)) & body, -950.0)  # maxillary sinus


def _spine(canvas: Canvas, b: _Build, rng: np.random.Generator, body: np.ndarray) -> np.ndarray:
    """Vertebral bodies with discs, arches and spinous processes, painted; returns bodies and arches."""
    s, y, z, mid = b.size, canvas.y, canvas.z, b.spine_y
    below_skull = (z < 32) & body
    disc = np.mod(z + rng.uniform(0, 20), 20.0) < 4.5
    bodies = canvas.column(0, mid - 17 * s, 14 * s, 11 * s, 2.6) & below_skull
    ring = canvas.column(0, mid, 18 * s, 15 * s) & ~canvas.column(0, mid, 11 * s, 9.5 * s) & (y > mid - 9)
    arches = ring & below_skull
    process = (np.abs(canvas.x) < 4) & (y > mid + 13 * s) & (y < mid + 30 * s) & below_skull
    canvas.paint(bodies & ~disc, 330.0)
    canvas.paint(bodies & disc, 90.0)
    canvas.paint(arches & ~disc, 420.0)
    canvas.paint(process & ~disc, 380.0)
    return bodies | arches


def _nerves(canvas: Canvas, b: _Build, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Spinal cord in its fluid, going over into the brainstem."""
    s, z, mid = b.size, canvas.z, b.spine_y
    junction = rng.uniform(36, 44)
    top = junction + rng.uniform(44, 54)
    canvas.paint(canvas.column(0, mid, 10.5 * s, 9 * s) & (z < 40), 12.0)
    cord = canvas.column(0, mid, 6.2 * s, 5.0 * s) & (z < junction)
    half_x = s * canvas.profile((junction, 7.5), (junction + 22, 15), (junction + 48, 13))
    half_y = s * canvas.profile((junction, 6.5), (junction + 22, 13), (junction + 48, 11))
    brainstem = canvas.column(0, mid - 0.16 * (z - junction), half_x, half_y) & (z >= junction) & (z < top)
    canvas.paint(cord | brainstem, 32.0)
    return {"SpinalCord": cord, "Brainstem": brainstem}


def _airway(
    canvas: Canvas, b: _Build, rng: np.random.Generator, body: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pharynx and trachea (returned first), larynx with its cartilage, and the oesophagus behind them."""
    s, z = b.size, canvas.z
    airway = canvas.column(0, b.airway_y, 1.15 * b.airway_r, 0.9 * b.airway_r) & (z < 50) & body
    canvas.paint(airway, -1000.0)
    centre = (0, -24 * s, b.larynx_z)
    larynx = canvas.ellipsoid(centre, (21 * s, 21 * s, rng.uniform(20, 25)), 2.4) & body
    cavity = canvas.ellipsoid(centre, (16.5 * s, 16.5 * s, 19), 2.4)
    canvas.paint(larynx & ~cavity & (canvas.y < -20 * s), 180.0)
    behind = b.airway_y + b.airway_r + 6.5
    esophagus = canvas.column(rng.uniform(-6, 2), behind, 8.5 * s, 5.5 * s) & (z < b.larynx_z - 18) & body
    canvas.paint(esophagus, 35.0)
    return airway, {"Larynx": larynx, "Esophagus": esophagus}


def _jaw(
    canvas: Canvas, b: _Build, rng: np.random.Generator, body: np.ndarray, airway: np.ndarray
) -> dict[str, np.ndarray]:
    """Mandible (parabolic arch and two rami), teeth, and the oral cavity inside the arch."""
    s, x, z = b.size, canvas.x, canvas.z
    depth, half, pixel = b.jaw_depth, b.jaw_half_width, float(canvas.grid.spacing_mm[:2].max())
    off_arch = np.abs(canvas.y - (b.jaw_front_y + depth * (x / half) ** 2))
    wall = max(5.5 * s, 0.5 * pixel) * np.sqrt(1 + (2 * depth * x / half**2) ** 2)
    arch = (off_arch < wall) & (np.abs(x) < 1.02 * half) & (np.abs(z) < 14)
    ramus_y, ramus_top = b.jaw_front_y + depth - 2 * s, rng.uniform(42, 52)
    rami = canvas.column(half, ramus_y, 5.5 * s, 15 * s, 2.5) | canvas.column(-half, ramus_y, 5.5 * s, 15 * s, 2.5)
    mandible = (arch | (rami & (z > -8) & (z < ramus_top))) & body
    teeth = (off_arch < 4 * s) & (np.abs(x) < 0.85 * half) & (z > 14) & (z < 23) & body
    canvas.paint(mandible, 900.0)
    canvas.paint(canvas.margin(mandible, -3.0), 500.0)  # marrow
    canvas.paint(teeth, 1500.0)
    oral = canvas.ellipsoid((0, -40 * s, 14), (27 * s, 31 * s, 22)) & body & ~mandible & ~airway & ~teeth
    canvas.paint(oral & (z > 6), 55.0)
    return {"Bone_Mandible": mandible, "Cavity_Oral": oral}


def _parotids(
    canvas: Canvas, b: _Build, rng: np.random.Generator, body: np.ndarray, mandible: np.ndarray
) -> dict[str, np.ndarray]:
    """A superficial and a deep lobe on each side, wrapped around the ramus."""
    s, u = b.size, rng.uniform
    room = canvas.margin(body, -3.0) & ~mandible
    masks = {}
    for name, side in (("Parotid_L", 1), ("Parotid_R", -1)):
        radii = s * np.array((u(10, 14), u(15, 21), u(20, 28)))
        x = side * (b.jaw_half_width + u(10, 14))
        y, z = b.jaw_front_y + b.jaw_depth + s * u(6, 14), u(14, 26)
        deep = canvas.ellipsoid((x - 4 * side, y + 4, z - 12), 0.7 * radii)
        masks[name] = (canvas.ellipsoid((x, y, z), radii) | deep) & room
        canvas.paint(masks[name], u(-30, 15))
    return masks


def _shoulders(canvas: Canvas, b: _Build, body: np.ndarray, spine: np.ndarray) -> None:
    """Lung apices, clavicles and humeral heads: what the lower beams pass through."""
    s, reach = b.size, np.abs(canvas.x)
    for side in (1, -1):
        apex = canvas.ellipsoid((side * 70 * s, 35, -195), (45 * s, 55 * s, 70)) & body & ~spine
        canvas.paint(apex, -780.0)
        rod = ((canvas.y + 38 * s - 0.22 * reach) / 6) ** 2 + ((canvas.z + 118 - 0.18 * reach) / 7) ** 2 <= 1
        canvas.paint(rod & (side * canvas.x > 14) & (reach < 0.85 * b.shoulder) & body, 450.0)
        head = canvas.ellipsoid((side * (b.shoulder - 34 * s), 18, -140), (24, 24, 26)) & body
        canvas.paint(head, 350.0)


def _targets(
    canvas: Canvas, b: _Build, rng: np.random.Generator, body: np.ndarray, hard: np.ndarray, nerves: np.ndarray
) -> tuple[dict[str, np.ndarray], int, str]:
    """Gross tumour with up to two nodes (PTV_7000) and the elective neck on both sides (PTV_5600), disjoint.

    Args:
        hard: bone and air, where no tumour grows.
        nerves: spinal cord and brainstem, which the planning targets keep clear of.
    """
    u, s = rng.uniform, b.size
    skin = canvas.margin(body, -4.0)
    side = 1 if rng.random() < 0.5 else -1
    subsite = str(rng.choice(list(SUBSITES), p=list(SUBSITES.values())))
    centre = {
        "oropharynx": (side * u(12, 24), -10 * s + u(-6, 6), u(0, 20)),
        "larynx": (side * u(0, 8), -24 * s, b.larynx_z + u(-6, 8)),
        "hypopharynx": (side * u(6, 16), -8 * s, b.larynx_z + u(0, 16)),
        "nasopharynx": (side * u(0, 10), -12 * s, u(36, 46)),
    }[subsite]
    gtv = canvas.blob(rng, centre, u(13, 20))
    for _ in range(rng.integers(0, 3)):
        node_side = side if rng.random() < 0.75 else -side
        node = (node_side * u(38, 46) * s, 4 * s + u(-6, 8), u(-60, 15))
        gtv = gtv | (canvas.blob(rng, node, u(7, 12), lobes=2) & skin)
    gtv = gtv & body & ~hard
    high = canvas.margin(gtv, u(6, 8)) & skin & ~canvas.margin(nerves, 4.0)
    elective = _nodal_levels(canvas, b, rng) & ~hard
    low = canvas.margin(elective, 1.5) | canvas.margin(gtv, 12.0)
    low = low & skin & ~canvas.margin(nerves, 6.0) & ~high
    return {"GTV": gtv, "PTV_7000": high, "PTV_5600": low}, side, subsite


def _nodal_levels(canvas: Canvas, b: _Build, rng: np.random.Generator) -> np.ndarray:
    """Levels II to IV on both sides: a tube along each jugular vein, with level Ib before its upper part."""
    u, s, z = rng.uniform, b.size, canvas.z
    chain = np.zeros(canvas.grid.shape, bool)
    for side in (1, -1):
        bottom, top = u(-92, -76), u(10, 24)
        x = side * s * canvas.profile((-95, 44), (-50, 38), (0, 42), (35, 42))
        y = s * canvas.profile((-95, 12), (-50, 4), (0, 10), (35, 18))
        jugular = canvas.column(x, y, s * u(10.5, 13), s * u(17, 21))
        submandibular = canvas.column(0.85 * x, y - 17 * s, 9 * s, 12 * s) & (z > -25)
        chain |= (jugular | submandibular) & (z > bottom) & (z < top)
    return chain
