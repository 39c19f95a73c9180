"""DoseDiff's dose and volume score: absolute differences of a few dose metrics, by structure (paper, section III-B)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from custom.case import Case
from custom.dosimetry.dvh import parse_metric

__all__ = ["STRUCTURE_METRICS", "structure_scores"]

TARGET = ("D95%[Gy]", "V95%[%]")
# The paper's choices; those for structures that it does not have (Esophagus, Larynx) are ours.
STRUCTURE_METRICS: dict[str, tuple[str, str | None]] = {
    "Parotid_L": ("Mean[Gy]", "V30Gy[%]"),
    "Parotid_R": ("Mean[Gy]", "V30Gy[%]"),
    "Heart": ("Mean[Gy]", "V30Gy[%]"),
    "Lungs": ("Mean[Gy]", "V20Gy[%]"),
    "Lung_L": ("Mean[Gy]", "V20Gy[%]"),
    "Lung_R": ("Mean[Gy]", "V20Gy[%]"),
    "Brainstem": ("Max[Gy]", None),
    "SpinalCord": ("Max[Gy]", None),
    "Bone_Mandible": ("Min[Gy]", None),
    "Esophagus": ("Mean[Gy]", None),
    "Larynx": ("Mean[Gy]", None),
}
DOSE_UNIT, VOLUME_UNIT = "gy", "percent"


def structure_scores(case: Case, dose_gy: np.ndarray, reference_gy: np.ndarray) -> dict[str, float]:
    """Errors of every structure, and their means over structures.

    Args:
        case: the patient.
        dose_gy, reference_gy: doses ``[i, j, k]``.

    Returns:
        ``roi_mae/<structure>_gy`` (mean absolute error of its voxels), ``dosediff_dose/<structure>_gy`` and
        ``dosediff_volume/<structure>_percent`` (absolute difference of its metrics), and the means over structures
        ``dosediff_dose_score_gy`` and ``dosediff_volume_score_percent``; nan where there is none.
    """
    row: dict[str, float] = {}
    for roi, (dose_metric, volume_metric) in _structures(case).items():
        mask = case.masks[roi]
        if not mask.any():
            continue
        inside, reference = dose_gy[mask], reference_gy[mask]
        row[f"roi_mae/{roi}_{DOSE_UNIT}"] = float(np.abs(inside - reference).mean(dtype=np.float64))
        for text, kind, unit in ((dose_metric, "dose", DOSE_UNIT), (volume_metric, "volume", VOLUME_UNIT)):
            if text is not None:
                metric = parse_metric(text)
                values = [metric.evaluate(d, case.grid.voxel_cc, case.prescription_gy.get(roi)) for d in
                          (inside, reference)]
                row[f"dosediff_{kind}/{roi}_{unit}"] = abs(values[0] - values[1])
    return row | {
        "dosediff_dose_score_gy": _mean(row, "dosediff_dose/"),
        "dosediff_volume_score_percent": _mean(row, "dosediff_volume/"),
    }


def _structures(case: Case) -> Mapping[str, tuple[str, str | None]]:
    """Metrics of the case's structures, targets first."""
    organs = {roi: metrics for roi, metrics in STRUCTURE_METRICS.items() if roi in case.masks}
    return {**dict.fromkeys(case.targets, TARGET), **organs}


def _mean(row: Mapping[str, float], prefix: str) -> float:
    values = [value for name, value in row.items() if name.startswith(prefix)]
    return float(np.mean(values)) if values else math.nan
