"""Signed distance maps of structures, positive inside: in mm, and in the forms that DoseDiff compares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

__all__ = ["DISTANCE_FORMS", "isdm", "psdm", "signed_distance_mm", "structure_mask", "tsbdm"]


def signed_distance_mm(mask: np.ndarray, spacing_mm, reach_mm: float | None = None) -> np.ndarray:
    """Physical signed distance map (PSDM of DoseDiff, eq. 8 and 9, with the spacing squared as its code does).

    Half of the smallest voxel edge is taken off each side, so that a structure and its complement are treated alike.
    For cubic voxels that puts the zero level midway between the centres on either side of the surface; for anisotropic
    ones it is up to half of the longest less half of the shortest edge off.

    Args:
        mask: boolean ``[i, j, k]``; an absent structure has no distance, so an empty mask is an error.
        spacing_mm: voxel edge along each axis.
        reach_mm: distances beyond this are clipped, which saves most of the work for small structures.

    Returns:
        float32 of ``mask.shape``; positive inside.

    Raises:
        ValueError: empty mask.
    """
    if not mask.any():
        raise ValueError("signed_distance_mm: the mask is empty; an absent structure is told by its presence flag")
    half = 0.5 * float(np.min(spacing_mm))
    box = tuple(slice(0, n) for n in mask.shape)
    if reach_mm is not None:
        found = ndimage.find_objects(mask.astype(np.int8))[0]
        pads = [int(np.ceil(reach_mm / d)) + 1 for d in spacing_mm]
        box = tuple(slice(max(0, s.start - p), s.stop + p) for s, p in zip(found, pads, strict=True))
    inside = mask[box]
    outer = ndimage.distance_transform_edt(~inside, sampling=spacing_mm)
    signed = np.where(inside, half, half - outer)
    if not inside.all():
        inner = ndimage.distance_transform_edt(inside, sampling=spacing_mm)
        signed = np.where(inside, inner - half, signed)
    out = np.full(mask.shape, -np.inf if reach_mm is None else -reach_mm, dtype=np.float32)
    out[box] = signed if reach_mm is None else np.clip(signed, -reach_mm, reach_mm)
    return out


def psdm(mask: np.ndarray, spacing_mm) -> np.ndarray:
    """Physical signed distance map in decimetres (mm / 100), DoseDiff's own form (eq. 9 in physical space).

    The paper's text multiplies the squared index offset by the spacing; here, as in its code, offset times spacing is
    squared, which is the distance in space.
    """
    return signed_distance_mm(mask, spacing_mm) / 100.0


def isdm(mask: np.ndarray, spacing_mm=None) -> np.ndarray:
    """Signed distance in image space: voxels / 100 (eq. 9; the paper's section III-D divides by 100).

    Args:
        mask: boolean ``[i, j, k]``, not empty.
        spacing_mm: not used; every edge of a voxel counts 1.
    """
    return signed_distance_mm(mask, (1.0, 1.0, 1.0)) / 100.0


def tsbdm(mask: np.ndarray, spacing_mm=None) -> np.ndarray:
    """Transformed signed boundary distance map: large inside, falling to zero outside, scaled by the structure itself.

    The form of Yue et al. (Radiother Oncol 170, 2022) as DoseDiff describes it: distances in voxels, an instance-wise
    normalisation, voxel values large inside the structure that decrease to zero outside. *Inferred*: the formula, which
    neither our sources nor DoseDiff's text gives. With d the distance in voxels and m its maximum inside, it is
    ``1 + d / m`` inside and ``exp(-|d| / m)`` outside, which meet at 1 on the surface.

    Args:
        mask: boolean ``[i, j, k]``, not empty.
        spacing_mm: not used.
    """
    distance = signed_distance_mm(mask, (1.0, 1.0, 1.0))
    deepest = float(distance.max())
    return np.where(mask, 1.0 + distance / deepest, np.exp(np.minimum(distance, 0.0) / deepest)).astype(np.float32)


def structure_mask(mask: np.ndarray, spacing_mm=None) -> np.ndarray:
    """The plain mask, 0 or 1, for comparison."""
    return mask.astype(np.float32)


# Form by name -> map of a structure that is there, and the value that stands for "absent": 50 cm (or 500 voxels)
# outside for the signed forms, zero for those in which zero already means far outside.
DISTANCE_FORMS: dict[str, tuple[Callable[..., np.ndarray], float]] = {
    "psdm": (psdm, -5.0),
    "isdm": (isdm, -5.0),
    "tsbdm": (tsbdm, 0.0),
    "mask": (structure_mask, 0.0),
}
