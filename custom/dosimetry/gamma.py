"""Gamma index of two doses on one grid, by pymedphys (optional: ``pip install 'rt-ct-dose-prediction[gamma]'``)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from custom.case import CaseError, Grid
from custom.dosimetry.regions import bounding_box

__all__ = ["GammaCriterion", "gamma_pass_percent", "parse_criteria"]

CUTOFF_PERCENT = 10.0
MISSING = "gamma: pymedphys is not installed; pip install 'rt-ct-dose-prediction[gamma]'"
_CRITERION = re.compile(r"^(\d+(?:\.\d+)?)%/(\d+(?:\.\d+)?)mm(?: (global|local))?$")


@dataclass(frozen=True)
class GammaCriterion:
    """What counts as agreement.

    Args:
        dose_percent: of the reference's maximum, or where ``is_local`` of each voxel's reference dose.
        distance_mm: distance to agreement.
        is_local: see above.
    """

    dose_percent: float
    distance_mm: float
    is_local: bool = False

    @property
    def name(self) -> str:
        """As the table of the evaluation names it: ``gamma_3percent_3mm_global_pass_percent``."""
        kind = "local" if self.is_local else "global"
        return f"gamma_{self.dose_percent:g}percent_{self.distance_mm:g}mm_{kind}_pass_percent"

    def pass_percent(self, dose_gy: np.ndarray, reference_gy: np.ndarray, grid: Grid, body: np.ndarray) -> float:
        """:func:`gamma_pass_percent` by this criterion."""
        return gamma_pass_percent(dose_gy, reference_gy, grid, body, dose_percent=self.dose_percent,
                                  distance_mm=self.distance_mm, is_local=self.is_local)


def parse_criteria(texts: Sequence[str]) -> tuple[GammaCriterion, ...]:
    """Read ``"3%/3mm"`` (global) and ``"2%/2mm local"``.

    Raises:
        CaseError: another text, or pymedphys is not installed and there is a criterion.
    """
    if isinstance(texts, str):
        texts = [texts]
    if texts and not _is_installed():
        raise CaseError(MISSING)
    matches = [_CRITERION.match(text) for text in texts]
    if None in matches:
        raise CaseError(f"gamma: criterion {texts[matches.index(None)]!r}; expected a text like '3%/3mm' or "
                        "'2%/2mm local'")
    return tuple(GammaCriterion(float(m[1]), float(m[2]), m[3] == "local") for m in matches)


def _is_installed() -> bool:
    return importlib.util.find_spec("pymedphys") is not None


def gamma_pass_percent(
    dose_gy: np.ndarray,
    reference_gy: np.ndarray,
    grid: Grid,
    body: np.ndarray,
    *,
    dose_percent: float = 3.0,
    distance_mm: float = 3.0,
    is_local: bool = False,
    normalise_gy: float | None = None,
    cutoff_percent: float = CUTOFF_PERCENT,
) -> float:
    """Share of the voxels whose gamma is at most 1, in percent (Low et al., Med Phys 25, 1998).

    Args:
        dose_gy: evaluated dose ``[i, j, k]``, interpolated to a tenth of the distance.
        reference_gy: reference dose ``[i, j, k]``; its voxels above the cutoff count.
        grid: of both.
        body: boolean ``[i, j, k]``; voxels outside do not count.
        dose_percent: dose criterion, in percent of the global normalisation, or of each voxel's reference dose.
        distance_mm: distance to agreement.
        is_local: which of the two dose criteria.
        normalise_gy: global normalisation and what the cutoff refers to; the reference's maximum by default.
        cutoff_percent: voxels below this share of the normalisation do not count.

    Returns:
        The pass rate; nan where no voxel counts.

    Raises:
        CaseError: pymedphys is not installed, or arrays that do not fit.
    """
    if not dose_gy.shape == reference_gy.shape == body.shape == grid.shape:
        found = [a.shape for a in (dose_gy, reference_gy, body)]
        raise CaseError(f"gamma: expected three arrays of the grid's shape {grid.shape}, found {found}")
    try:
        import pymedphys  # optional, and slow to load
    except ImportError as error:
        raise CaseError(MISSING) from error
    top_gy = float(reference_gy.max()) if normalise_gy is None else float(normalise_gy)
    counted = body & (reference_gy >= cutoff_percent / 100 * top_gy)
    box = bounding_box(counted)
    if box is None:
        return float("nan")
    pad = np.ceil(2 * distance_mm / grid.spacing_mm).astype(int) + 1
    box = tuple(slice(max(s.start - p, 0), min(s.stop + p, n)) for s, p, n in zip(box, pad, grid.shape))
    axes = tuple(grid.spacing_mm[a] * np.arange(s.stop - s.start, dtype=np.float64) for a, s in enumerate(box))
    gamma = pymedphys.gamma(
        axes,
        np.where(counted, reference_gy, 0)[box].astype(np.float64),  # zero is below the cutoff: not computed
        axes,
        dose_gy[box].astype(np.float64),
        dose_percent,
        distance_mm,
        lower_percent_dose_cutoff=cutoff_percent,
        local_gamma=is_local,
        global_normalisation=top_gy,
        max_gamma=1.1,
        skip_once_passed=True,
        quiet=True,
    )
    values = gamma[counted[box]]
    values = values[~np.isnan(values)]
    return float(100 * np.mean(values <= 1)) if values.size else float("nan")
