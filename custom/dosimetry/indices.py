"""Homogeneity, conformity, and how alike two isodose volumes are; levels are shares of the prescription."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from custom.dosimetry.dvh import dose_at_volume
from custom.dosimetry.regions import bounding_box

__all__ = [
    "conformity_paddick",
    "conformity_rtog",
    "hausdorff95_mm",
    "homogeneity_icru83",
    "isodose_dice",
    "isodose_hausdorff95_mm",
]


def homogeneity_icru83(dose_in_target_gy: np.ndarray) -> float:
    """Homogeneity index ``(D2% - D98%) / D50%`` (ICRU report 83, eq. 3.1); 0 is perfectly homogeneous.

    Args:
        dose_in_target_gy: dose of the target's voxels, any shape.

    Returns:
        The index, or nan for an empty target or one whose median dose is zero.
    """
    dose_gy = np.asarray(dose_in_target_gy).ravel()
    if dose_gy.size == 0:
        return float("nan")
    d2, d50, d98 = (dose_at_volume(dose_gy, share) for share in (0.02, 0.50, 0.98))
    return (d2 - d98) / d50 if d50 > 0 else float("nan")


def conformity_paddick(dose_gy: np.ndarray, target: np.ndarray, body: np.ndarray, reference_gy: float) -> float:
    """Paddick's conformity index ``TV_PIV^2 / (TV * PIV)`` (J Neurosurg 93 suppl. 3, 2000); 1 is perfect.

    Args:
        dose_gy: dose ``[i, j, k]``.
        target: boolean ``[i, j, k]``.
        body: boolean ``[i, j, k]``; the isodose volume is counted within.
        reference_gy: dose whose isodose should hug the target.

    Returns:
        The index; 0 when the isodose is nowhere reached, nan for an empty target.
    """
    hot = (dose_gy >= reference_gy) & body
    target_voxels, isodose_voxels = np.count_nonzero(target), np.count_nonzero(hot)
    if target_voxels == 0:
        return float("nan")
    covered = np.count_nonzero(hot & target)
    return covered**2 / (target_voxels * isodose_voxels) if isodose_voxels else 0.0


def conformity_rtog(dose_gy: np.ndarray, target: np.ndarray, body: np.ndarray, reference_gy: float) -> float:
    """RTOG conformity index: isodose volume / target volume (Shaw et al., IJROBP 27, 1993); 1 to 2 is "per protocol".

    Arguments as in :func:`conformity_paddick`; nan for an empty target.
    """
    target_voxels = np.count_nonzero(target)
    return np.count_nonzero((dose_gy >= reference_gy) & body) / target_voxels if target_voxels else float("nan")


def isodose_dice(
    dose_gy: np.ndarray, reference_dose_gy: np.ndarray, body: np.ndarray, levels_gy: Sequence[float]
) -> np.ndarray:
    """Dice coefficient ``2 |A & B| / (|A| + |B|)`` of the volumes above each dose level.

    Args:
        dose_gy: dose ``[i, j, k]``.
        reference_dose_gy: the dose to compare with.
        body: boolean ``[i, j, k]``; volumes are counted within.
        levels_gy: rising dose levels.

    Returns:
        One value a level; nan where neither dose reaches it.
    """
    levels_gy = np.asarray(levels_gy, dtype=np.float64)
    first, second = (np.digitize(a[body], levels_gy) for a in (dose_gy, reference_dose_gy))

    def above(counts: np.ndarray) -> np.ndarray:
        return np.cumsum(counts[::-1])[::-1][1:].astype(np.float64)

    n = len(levels_gy) + 1
    a, b, both = (above(np.bincount(x, minlength=n)) for x in (first, second, np.minimum(first, second)))
    return np.divide(2 * both, a + b, out=np.full(n - 1, np.nan), where=a + b > 0)


def isodose_hausdorff95_mm(
    dose_gy: np.ndarray,
    reference_dose_gy: np.ndarray,
    body: np.ndarray,
    levels_gy: Sequence[float],
    spacing_mm: Sequence[float],
) -> np.ndarray:
    """Symmetric 95th-percentile Hausdorff distance between the isodose surfaces of each level, in mm.

    Arguments as in :func:`isodose_dice`; one value a level, nan where either dose does not reach it.
    """
    box = bounding_box(((dose_gy >= min(levels_gy)) | (reference_dose_gy >= min(levels_gy))) & body)
    if box is None:
        return np.full(len(levels_gy), np.nan)
    first, second, inside = dose_gy[box], reference_dose_gy[box], body[box]
    return np.array(
        [hausdorff95_mm((first >= gy) & inside, (second >= gy) & inside, spacing_mm) for gy in levels_gy], dtype=float
    )


def hausdorff95_mm(first: np.ndarray, second: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """95 % Hausdorff distance: the larger of the two directed 95th percentiles of surface distances.

    The surface is the set of mask voxels with a face neighbour outside, as in MONAI's ``compute_hausdorff_distance``
    (which needs two distance transforms of the whole volume; nearest neighbours among surface voxels need none).

    Args:
        first: boolean ``[i, j, k]``.
        second: boolean ``[i, j, k]``.
        spacing_mm: distance between voxels along each axis.

    Returns:
        The distance in mm; nan when either mask is empty.
    """
    a, b = _surface_mm(first, spacing_mm), _surface_mm(second, spacing_mm)
    if len(a) == 0 or len(b) == 0:
        return float("nan")
    there, back = cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def _surface_mm(mask: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Positions ``(n, 3)`` in mm of the mask's voxels that touch the outside by a face."""
    box = bounding_box(mask)
    if box is None:
        return np.empty((0, mask.ndim))
    part = mask[box]
    index = np.argwhere(part & ~ndimage.binary_erosion(part)) + [s.start for s in box]
    return index * np.asarray(spacing_mm, dtype=np.float64)
