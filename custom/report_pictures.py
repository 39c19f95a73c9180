"""Isodose pictures: three planes through a voxel, the dose over the CT, drawn without matplotlib's global state."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from contourpy import contour_generator
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.transforms import IdentityTransform
from PIL import Image

from custom.case import Case
from custom.dosimetry.regions import bounding_box

__all__ = ["ISODOSE_LINES", "draw_views"]

# Share of the highest prescription -> colour of its line.
ISODOSE_LINES = {
    0.2: "#3b6fe0",
    0.5: "#19a7b8",
    0.8: "#2fb344",
    0.95: "#ffd400",
    1.0: "#ff8c1a",
    1.07: "#e0218a",
}
WINDOW_HU = (-160.0, 240.0)
IRRADIATED_SHARE = 0.05  # of the prescription: planes reach this far along the patient, and a bit
AROUND_DOSE_MM, BORDER_MM = 40.0, 8.0
WIDTH_PX, MAX_HEIGHT_PX, DPI = 400, 520, 100
COLOURS_PER_PICTURE = 256
# plane -> (axis cut, horizontal axis, vertical axis, vertical runs upwards, edge labels left/right/top/bottom) in LPS
PLANES = {
    "axial": (2, 0, 1, False, "RLAP"),
    "coronal": (1, 0, 2, True, "RLSI"),
    "sagittal": (0, 1, 2, True, "APSI"),
}


@dataclass(frozen=True)
class _Scene:
    """Arrays of a case as views along +L, +P, +S, with the box around the dose; of a structure only its cuts."""

    ct_hu: np.ndarray | None
    body: np.ndarray
    structures: Sequence[tuple[Mapping[tuple[int, int], np.ndarray], str]]
    spacing_mm: np.ndarray
    box: tuple[slice, slice, slice]
    prescription_gy: float


def draw_views(
    views: Sequence[Mapping[str, Any]], case: Case, dose_gy: np.ndarray, colours: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Draw every view in three planes: the dose, and with a reference that and the difference.

    Args:
        views: entries with ``title``, ``index`` (voxel of the case's grid), ``dose_gy``.
        case: the patient.
        dose_gy: predicted dose ``[i, j, k]``.
        colours: structures to outline, and in which colour.

    Returns:
        For each view ``{"title", "dose_gy", "rows": [{"title", "planes": {name: PNG as base64}}]}``.
    """
    axes, flips = _to_lps(case)

    def turn(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else np.flip(array.transpose(axes), [a for a in range(3) if flips[a]])

    body = turn(case.body)
    spacing_mm = case.grid.spacing_mm[list(axes)]
    dose, reference = turn(dose_gy), turn(case.dose_gy)
    irradiated = bounding_box(dose > IRRADIATED_SHARE * case.highest_prescription_gy)
    extent = _padded(irradiated, AROUND_DOSE_MM, spacing_mm, body.shape)
    indices = [[view["index"][axis] for axis in axes] for view in views]
    indices = [[body.shape[a] - 1 - n if flips[a] else n for a, n in enumerate(index)] for index in indices]
    planes = {(cut, index[cut]) for index in indices for cut in range(3)}
    structures = [(_cuts(turn(case.masks[name]), planes), colours[name]) for name in case.masks if name in colours]
    scene = _Scene(turn(case.ct_hu), body, structures, spacing_mm, extent, case.highest_prescription_gy)
    drawn = []
    for view, index in zip(views, indices):
        rows = [{"title": "Predicted", "planes": _draw_planes(scene, index, dose)}]
        if reference is not None:
            rows.append({"title": "Reference", "planes": _draw_planes(scene, index, reference)})
            rows.append({"title": "Predicted − reference", "planes": _draw_planes(scene, index, dose, reference)})
        drawn.append({"title": view["title"], "dose_gy": view["dose_gy"], "rows": rows})
    return drawn


def _to_lps(case: Case) -> tuple[tuple[int, ...], list[bool]]:
    """Array axis nearest to L, P and S, and whether it has to be flipped; exact unless the grid is oblique."""
    direction = case.grid.affine[:3, :3] / case.grid.spacing_mm
    axes, left = [], [0, 1, 2]
    for world in range(3):
        axis = max(left, key=lambda a: abs(direction[world, a]))
        axes.append(axis)
        left.remove(axis)
    return tuple(axes), [bool(direction[world, axis] < 0) for world, axis in enumerate(axes)]


def _cuts(mask: np.ndarray, planes: Collection[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
    """The mask on planes ``(axis, index)``, so that only one structure's whole mask is held at a time."""
    return {(axis, n): mask.take(n, axis=axis) for axis, n in planes}


def _padded(box, margin_mm: float, spacing_mm: np.ndarray, shape: Sequence[int]) -> tuple[slice, ...]:
    """The box grown by a margin within the array; the whole array without a box."""
    if box is None:
        return tuple(slice(0, n) for n in shape)
    pad = np.ceil(margin_mm / spacing_mm).astype(int)
    return tuple(slice(max(s.start - p, 0), min(s.stop + p, n)) for s, p, n in zip(box, pad, shape))


def _plane_box(scene: _Scene, cut: int, index: Sequence[int]) -> tuple[slice, ...]:
    """What a plane shows: the body on that plane, as far as the irradiated part of the patient reaches."""
    layer = tuple(slice(index[cut], index[cut] + 1) if axis == cut else scene.box[axis] for axis in range(3))
    own = bounding_box(scene.body[layer])
    if own is None:
        return layer
    own = tuple(slice(s.start + o.start, s.start + o.stop) for s, o in zip(layer, own))
    grown = _padded(own, BORDER_MM, scene.spacing_mm, scene.body.shape)
    return tuple(layer[axis] if axis == cut else grown[axis] for axis in range(3))


def _draw_planes(scene: _Scene, index: Sequence[int], dose: np.ndarray, minus: np.ndarray | None = None) -> dict:
    return {plane: _draw_plane(scene, plane, index, dose, minus) for plane in PLANES}


def _draw_plane(scene: _Scene, plane: str, index: Sequence[int], dose: np.ndarray, minus: np.ndarray | None) -> str:
    """One picture as base64 PNG: the dose with its isodoses, or the difference ``dose - minus``."""
    cut, across, down, upwards, letters = PLANES[plane]
    box = _plane_box(scene, cut, index)
    where = tuple(index[cut] if axis == cut else box[axis] for axis in range(3))

    def upright(part: np.ndarray) -> np.ndarray:
        return part.T[::-1] if upwards else part.T  # the first row is the picture's top

    def sliced(array: np.ndarray) -> np.ndarray:
        return upright(np.asarray(array[where]))

    size_mm = [(box[a].stop - box[a].start) * scene.spacing_mm[a] for a in (across, down)]
    width = round(min(WIDTH_PX, MAX_HEIGHT_PX * size_mm[0] / size_mm[1]))
    size_px = width, max(round(width * size_mm[1] / size_mm[0]), 8)
    body, shown = sliced(scene.body), sliced(dose).astype(np.float32)
    background = np.where(body, 0.0, -1000.0) if scene.ct_hu is None else sliced(scene.ct_hu)
    grey = _scaled((background - WINDOW_HU[0]) / (WINDOW_HU[1] - WINDOW_HU[0]), size_px).clip(0, 1)
    if minus is None:
        colour, alpha = _dose_wash(_scaled(shown / scene.prescription_gy, size_px))
    else:
        colour, alpha = _difference_wash(_scaled((shown - sliced(minus)) * body / scene.prescription_gy, size_px))
    picture = grey[..., None] * (1 - alpha[..., None]) + colour * alpha[..., None]
    lines = []
    if minus is None:
        for share, line_colour in ISODOSE_LINES.items():
            lines.append((_contour_px(shown, share * scene.prescription_gy, size_px), line_colour, 1.3, "solid"))
    for cuts, line_colour in scene.structures:
        part = upright(cuts[cut, index[cut]][box[min(across, down)], box[max(across, down)]])
        if part.any():
            lines.append((_contour_px(part.astype(np.float32), 0.5, size_px), line_colour, 1.0, (0, (3, 1.5))))
    cross = [index[a] - box[a].start + 0.5 for a in (across, down)]
    cross = [n / shown.shape[1 - axis] * size_px[axis] for axis, n in enumerate(cross)]
    return _to_png(picture, lines, (cross[0], cross[1] if upwards else size_px[1] - cross[1]), letters)


def _scaled(values: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Values interpolated to ``(height, width)`` pixels."""
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size_px, Image.Resampling.BILINEAR))


def _contour_px(values: np.ndarray, level: float, size_px: tuple[int, int]) -> list[np.ndarray]:
    """Contour lines in pixels from the lower left corner; none where the level is not crossed."""
    rows, columns = values.shape
    if min(rows, columns) < 2 or not values.min() < level <= values.max():
        return []
    lines = contour_generator(z=values).lines(level)
    scale = np.array([size_px[0] / columns, -size_px[1] / rows])
    return [(line + 0.5) * scale + (0, size_px[1]) for line in lines]


def _dose_wash(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour and opacity of a dose as share of the prescription; clear below 10 %."""
    return colormaps["turbo"](share / 1.1)[..., :3], np.clip((share - 0.1) / 0.2, 0, 1) * 0.38


def _difference_wash(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blue where the prediction is too cold, red where it is too hot, full colour at 10 % of the prescription."""
    relative = share / 0.1
    return colormaps["bwr"](0.5 + 0.5 * relative)[..., :3], np.clip(np.abs(relative) * 1.6 - 0.15, 0, 0.85)


def _to_png(picture: np.ndarray, lines, cross_px: tuple[float, float], letters: str) -> str:
    """Picture ``(height, width, 3)`` with lines, cross hair and the letters of the patient's sides."""
    height, width = picture.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, frameon=False)
    canvas = FigureCanvasAgg(figure)
    x, y = cross_px
    hair = [np.array([[x, 0], [x, height]]), np.array([[0, y], [width, y]])]
    for paths, colour, line_width, style in [*lines, (hair, (1, 1, 1, 0.5), 0.5, "solid")]:
        if paths:
            figure.add_artist(
                LineCollection(
                    paths, colors=[colour], linewidths=line_width, linestyles=[style], transform=IdentityTransform()
                )
            )
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.985, "center", "top"))
    for letter, (u, v, ha, va) in zip(letters, (*places, (0.5, 0.015, "center", "bottom"))):
        figure.text(u, v, letter, color="white", fontsize=10, weight="bold", ha=ha, va=va)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    image = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
    image.paste(drawn, mask=drawn)
    image = image.quantize(COLOURS_PER_PICTURE, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
