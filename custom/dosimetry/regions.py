"""Structures a constraint may name that nobody drew: target levels, crops, margins, rings, the side nearer the target.

Regions are kept as a box and a mask within it, so that planning CTs of 50 million voxels stay cheap.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from custom.case import Case, CaseError, Grid

__all__ = ["Region", "bounding_box", "check_structure", "drawn", "regions", "whole_mask"]

Box = tuple[slice, slice, slice]

LEVELS = ("PTV_High", "PTV_Mid", "PTV_Low")
PAIRS = {"Lungs": ("Lung_L", "Lung_R"), "Parotids": ("Parotid_L", "Parotid_R")}
SIDES = ("_Ipsi", "_Contra")
_NAME = r"[A-Za-z][A-Za-z0-9_~^+]*"
_NUMBER = r"\d+(?:\.\d+)?"
_PLAIN = re.compile(rf"^{_NAME}$")
_CROP = re.compile(rf"^({_NAME})-(PTV|GTV)$")
_PRV = re.compile(rf"^({_NAME})_PRV(\d\d)$")
_RING = re.compile(rf"^Ring\(({_NAME}), ({_NUMBER}), ({_NUMBER})\)$")
_SKIN = re.compile(rf"^Skin\(({_NUMBER}), ({_NUMBER})\)$")


@dataclass(frozen=True)
class Region:
    """Part of a case.

    Args:
        name: what to call it.
        box: slices into the case's arrays.
        mask: boolean, shape of the box.
        prescription_gy: own prescription of a target, else the case's highest.
        fine: the same structure on a finer grid, where its reader made one; see :mod:`custom.dosimetry.partial`.
    """

    name: str
    box: Box
    mask: np.ndarray
    prescription_gy: float
    fine: tuple[Grid, np.ndarray] | None = None

    def values(self, array: np.ndarray) -> np.ndarray:
        """The array's values within, flat."""
        return array[self.box][self.mask]


def check_structure(structure: str) -> None:
    """Raise :class:`CaseError` when a structure's text does not follow the grammar of :func:`regions`."""
    for pattern in (_RING, _SKIN):
        if match := pattern.match(structure):
            start, stop = map(float, match.groups()[-2:])
            if not start < stop <= 100:
                raise CaseError(f"structure {structure!r}: expected rising distances up to 100 mm")
            return
    if not (_PLAIN.match(structure) or _CROP.match(structure)):
        raise CaseError(
            f"structure {structure!r} is not understood; expected a TG-263 name, 'X-PTV', 'X-GTV', 'X_PRV05', "
            "'X_Ipsi', 'Ring(X, 5, 10)' or 'Skin(0, 3)'"
        )


def regions(structure: str, case: Case) -> list[Region]:
    """Find or make a structure.

    Grammar, where ``X`` is the name of a mask: ``X``; ``PTV`` (each target, as a region of its own), ``PTV_High``,
    ``PTV_Mid``, ``PTV_Low`` (by prescription; the last only with two levels, the middle only with three); ``X-PTV`` and
    ``X-GTV`` (without all targets, or all structures named GTV...); ``X_PRV05`` (drawn, else X grown by 5 mm);
    ``X_Ipsi`` and ``X_Contra`` (of X_L and X_R, the one nearer to or farther from the high-dose target);
    ``Ring(X, 5, 10)`` (body voxels from 5 to 10 mm off X, without targets); ``Skin(0, 3)`` (body voxels within that
    depth). A drawn mask of exactly that name always comes first; ``Lungs`` and ``Parotids`` are made of their sides.

    Args:
        structure: text in that grammar.
        case: masks, prescription and spacing.

    Returns:
        No region when the structure is absent or empty, several for ``PTV``, else one.

    Raises:
        CaseError: text outside the grammar.
    """
    check_structure(structure)
    if structure == "PTV":
        found = [drawn(roi, case) for roi in case.targets]
    else:
        found = [_find(structure, case)]
    return [region for region in found if region is not None and region.mask.any()]


def drawn(name: str, case: Case) -> Region | None:
    """The mask of exactly that name, whatever the name looks like; None when it is absent or empty."""
    if name not in case.masks:
        return None
    region = _region(name, case.masks[name], case.prescription_gy.get(name, case.highest_prescription_gy))
    fine = case.source.get("fine_masks", {}).get(name)
    return region if region is None or fine is None else replace(region, fine=fine)


def whole_mask(region: Region, case: Case) -> np.ndarray:
    """The region as a boolean array of the case's grid."""
    out = np.zeros(case.grid.shape, dtype=bool)
    out[region.box] = region.mask
    return out


def bounding_box(mask: np.ndarray) -> Box | None:
    """Smallest box around the mask's voxels, or None when there are none."""
    plane = mask.any(axis=0)
    if not plane.any():
        return None
    hits = (mask.reshape(mask.shape[0], -1).any(axis=1), plane.any(axis=1), plane.any(axis=0))
    return tuple(slice(int(h.argmax()), int(len(h) - h[::-1].argmax())) for h in hits)


def _find(structure: str, case: Case) -> Region | None:
    """One region, or None."""
    top_gy = case.highest_prescription_gy
    if structure in case.masks:
        return drawn(structure, case)
    if structure in LEVELS:
        return _target_level(structure, case)
    if structure in PAIRS:
        sides = [case.masks[side] for side in PAIRS[structure] if side in case.masks]
        return _region(structure, np.logical_or.reduce(sides), top_gy) if sides else None
    if match := _CROP.match(structure):
        return _crop(structure, _find(match[1], case), match[2], case)
    if match := _PRV.match(structure):
        inner = _find(match[1], case)
        return None if inner is None else _grown(structure, inner, float(match[2]), case)
    if match := _RING.match(structure):
        return _ring(structure, _find(match[1], case), float(match[2]), float(match[3]), case)
    if match := _SKIN.match(structure):
        return _skin(structure, float(match[1]), float(match[2]), case)
    if structure.endswith(SIDES):
        return _side(structure, case)
    return None


def _region(name: str, mask: np.ndarray, prescription_gy: float) -> Region | None:
    box = bounding_box(mask)
    return None if box is None else Region(name, box, mask[box].copy(), prescription_gy)  # not a view of the whole


def _target_level(structure: str, case: Case) -> Region | None:
    levels = sorted(set(case.prescription_gy.values()), reverse=True)
    number = {"PTV_High": 0, "PTV_Mid": 1, "PTV_Low": -1}[structure]
    if len(levels) < {"PTV_High": 1, "PTV_Mid": 3, "PTV_Low": 2}[structure]:
        return None
    gy = levels[number]
    names = [roi for roi, own in case.prescription_gy.items() if own == gy]
    if len(names) == 1:
        only = drawn(names[0], case)
        return None if only is None else replace(only, name=structure)
    return _region(structure, np.logical_or.reduce([case.masks[n] for n in names]), gy)


def _crop(name: str, inner: Region | None, kind: str, case: Case) -> Region | None:
    """A structure without the targets, or without what is drawn as GTV."""
    if inner is None:
        return None
    away = list(case.prescription_gy) if kind == "PTV" else [roi for roi in case.masks if roi.startswith("GTV")]
    mask = inner.mask.copy()
    for roi in away:
        mask &= ~case.masks[roi][inner.box]
    side = inner.name[inner.name.index(" (") :] if " (" in inner.name else ""
    return Region(name + side, inner.box, mask, case.highest_prescription_gy)


def _grown(name: str, inner: Region, margin_mm: float, case: Case) -> Region:
    box, distance_mm = _distance_mm(inner, margin_mm, case)
    return Region(name, box, distance_mm <= margin_mm, case.highest_prescription_gy)


def _ring(name: str, inner: Region | None, start_mm: float, stop_mm: float, case: Case) -> Region | None:
    if inner is None:
        return None
    box, distance_mm = _distance_mm(inner, stop_mm, case)
    mask = (distance_mm > start_mm) & (distance_mm <= stop_mm) & case.body[box]
    for roi in case.prescription_gy:
        mask &= ~case.masks[roi][box]
    return Region(name, box, mask, case.highest_prescription_gy)


def _distance_mm(inner: Region, margin_mm: float, case: Case) -> tuple[Box, np.ndarray]:
    """Distance to a region's nearest voxel centre, in the box that holds all within the margin."""
    spacing_mm = case.grid.spacing_mm
    pad = np.ceil(margin_mm / spacing_mm).astype(int)
    box = tuple(slice(max(s.start - p, 0), min(s.stop + p, n)) for s, p, n in zip(inner.box, pad, case.grid.shape))
    outside = np.ones([s.stop - s.start for s in box], dtype=bool)
    outside[tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(inner.box, box))] = ~inner.mask
    return box, ndimage.distance_transform_edt(outside, sampling=spacing_mm).astype(np.float32)


def _skin(name: str, start_mm: float, stop_mm: float, case: Case) -> Region | None:
    """Body voxels whose depth below the surface lies between the two; the ends of the scan are no surface."""
    box = bounding_box(case.body)
    if box is None:
        return None
    body = case.body[box]
    deep, shallow = (_eroded(body, mm, case.grid.spacing_mm) for mm in (stop_mm, start_mm))
    return Region(name, box, shallow & ~deep, case.highest_prescription_gy)


def _eroded(mask: np.ndarray, depth_mm: float, spacing_mm: np.ndarray) -> np.ndarray:
    """Voxels whose centre lies deeper below the mask's faces; beyond the array's k ends counts as inside."""
    reach = np.floor(depth_mm / spacing_mm + 0.5).astype(int)
    padded = np.pad(mask, [(reach[0],) * 2, (reach[1],) * 2, (0, 0)])
    padded = np.pad(padded, [(0, 0), (0, 0), (reach[2],) * 2], mode="edge")
    out = mask.copy()
    offsets = np.stack(np.meshgrid(*[np.arange(2 * r + 1) for r in reach], indexing="ij"), axis=-1).reshape(-1, 3)
    to_face_mm = np.clip(np.abs(offsets - reach) - 0.5, 0, None) * spacing_mm
    near = (to_face_mm**2).sum(axis=1) <= depth_mm**2
    for i, j, k in offsets[near]:
        out &= padded[i : i + mask.shape[0], j : j + mask.shape[1], k : k + mask.shape[2]]
    return out


def _side(structure: str, case: Case) -> Region | None:
    """The one of a paired organ whose centre is nearer to (Ipsi) or farther from (Contra) the high-dose target's."""
    organ, wanted = structure.rsplit("_", 1)
    target = _target_level("PTV_High", case)
    sides = [_find(f"{organ}_{side}", case) for side in "LR"]
    sides = [side for side in sides if side is not None]
    if len(sides) < 2 or target is None:
        return None
    centre = _centre_mm(target, case)
    sides.sort(key=lambda side: float(np.linalg.norm(_centre_mm(side, case) - centre)))
    side = sides[0 if wanted == "Ipsi" else 1]
    return replace(side, name=f"{structure} ({side.name})")


def _centre_mm(region: Region, case: Case) -> np.ndarray:
    index = np.argwhere(region.mask).mean(axis=0) + [s.start for s in region.box]
    return case.grid.to_world(index)
