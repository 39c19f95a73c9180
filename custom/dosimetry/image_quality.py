"""How alike two dose volumes look: PSNR, SSIM, and how much of the fine structure is there."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

__all__ = ["fine_structure_ratio", "psnr_db", "similarity", "ssim"]


def psnr_db(dose_gy: np.ndarray, reference_gy: np.ndarray, body: np.ndarray, range_gy: float) -> float:
    """Peak signal-to-noise ratio ``10 log10(range^2 / MSE)`` over the body's voxels, in dB.

    Args:
        dose_gy, reference_gy, body: arrays ``[i, j, k]``.
        range_gy: the peak, the highest prescription in most papers.

    Returns:
        dB; infinite for equal doses, nan without a body.
    """
    if not body.any():
        return float("nan")
    mse = float(np.square(dose_gy[body].astype(np.float64) - reference_gy[body]).mean())
    return float(10.0 * np.log10(range_gy**2 / mse)) if mse > 0 else float("inf")


def ssim(dose_gy: np.ndarray, reference_gy: np.ndarray, body: np.ndarray, range_gy: float, sigma: float = 1.5) -> float:
    """Mean structural similarity over the body's voxels (Wang et al., IEEE TIP 13, 2004, eq. 13).

    Gaussian windows in three dimensions, ``K1 = 0.01``, ``K2 = 0.03``, biased moments; windows at the skin see the
    zero dose outside.

    Args:
        dose_gy, reference_gy, body: arrays ``[i, j, k]``.
        range_gy: dynamic range.
        sigma: of the window, in voxels.
    """
    if not body.any():
        return float("nan")
    a, b = (np.asarray(d, dtype=np.float64) for d in (dose_gy, reference_gy))
    mean_a, mean_b, aa, bb, ab = (ndimage.gaussian_filter(x, sigma, truncate=3.5) for x in (a, b, a * a, b * b, a * b))
    c1, c2 = (0.01 * range_gy) ** 2, (0.03 * range_gy) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (aa - mean_a**2 + bb - mean_b**2 + c2)
    return float(similarity[body].mean())


def similarity(dose_gy: np.ndarray, reference_gy: np.ndarray, body: np.ndarray, range_gy: float) -> dict[str, float]:
    """``psnr_db`` and ``ssim``, worked out on the body's box and what its windows see, which saves most of the time."""
    if not body.any():
        return {"psnr_db": float("nan"), "ssim": float("nan")}
    reach = 6  # voxels: 3.5 sigma, rounded up
    box = tuple(
        slice(max(0, s.start - reach), s.stop + reach) for s in ndimage.find_objects(body.astype(np.int8))[0]
    )
    arrays = dose_gy[box], reference_gy[box], body[box]
    return {"psnr_db": psnr_db(*arrays, range_gy), "ssim": ssim(*arrays, range_gy)}


def fine_structure_ratio(
    dose_gy: np.ndarray, reference_gy: np.ndarray, body: np.ndarray, spacing_mm, sigma_mm: float = 6.0
) -> float:
    """Energy of what a Gaussian of ``sigma_mm`` takes away, of the dose over that of the reference, within the body.

    Below 1 the dose is smoother than the reference, as a regression's is; noise raises it above 1.
    """
    def energy(dose: np.ndarray) -> float:
        rest = dose - ndimage.gaussian_filter(dose, [sigma_mm / s for s in spacing_mm])
        return float(np.square(rest[body], dtype=np.float64).sum())

    reference = energy(np.asarray(reference_gy, dtype=np.float32))
    return energy(np.asarray(dose_gy, dtype=np.float32)) / reference if reference > 0 else float("nan")
