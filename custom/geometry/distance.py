"""Signed distance maps of structures, in mm, positive inside."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

__all__ = ["signed_distance_mm"]


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
