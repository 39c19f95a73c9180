"""How good a predicted dose is: OpenKBP's scores, GDP-HMM's MAE, and the table of the ADDiff-Dose paper.

Every figure of a case is one entry of a flat dictionary, its unit at the end of its name; nan means *not applicable*
(no such organ, no reference). :func:`summarise` pools cases, :func:`write_metrics` writes the table.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import CumulativeIterationMetric
from scipy import stats

from custom.case import Case, CaseError
from custom.dosimetry.constraints import Constraint, check, compliance
from custom.dosimetry.dvh import parse_metric
from custom.dosimetry.image_quality import similarity
from custom.dosimetry.indices import conformity_paddick, homogeneity_icru83, isodose_dice, isodose_hausdorff95_mm
from custom.dosimetry.structure_scores import structure_scores
from custom.whole import write_json, write_whole

__all__ = [
    "DoseScore",
    "case_metrics",
    "gdp_hmm_mae_gy",
    "openkbp_dose_error_gy",
    "openkbp_dvh",
    "summarise",
    "write_metrics",
]

OPENKBP_OARS = ("Brainstem", "SpinalCord", "Parotid_R", "Parotid_L", "Esophagus", "Larynx", "Bone_Mandible")
DVH_ERROR = "openkbp_dvh_error"
ISODOSE_LEVELS = tuple(i / 10 for i in range(1, 11))
CONFORMITY_LEVEL = 0.95  # of the prescription: the isodose of ICRU 62/83 for the conformity of a treated volume
LUNGS = (("Lungs",), ("Lung_L", "Lung_R"))  # the first set of which any is present
# Table 2 and 3 of the ADDiff-Dose paper: name in our table -> structures and metric.
ORGAN_METRICS = {
    "lung_v20_abs_diff_percent": (LUNGS, "V20Gy[%]"),
    "heart_v30_abs_diff_percent": ((("Heart",),), "V30Gy[%]"),
    "esophagus_v30_abs_diff_percent": ((("Esophagus",),), "V30Gy[%]"),
    "spinalcord_max_abs_diff_gy": ((("SpinalCord",),), "Max[Gy]"),
    "brainstem_max_abs_diff_gy": ((("Brainstem",),), "Max[Gy]"),
}
TARGET_METRICS = {
    "ptv_high_d98_abs_diff_gy": "D98%[Gy]",
    "ptv_high_d95_abs_diff_gy": "D95%[Gy]",
    "ptv_high_d2_abs_diff_gy": "D2%[Gy]",
    "ptv_high_max_abs_diff_gy": "Max[Gy]",
    "ptv_high_mean_abs_diff_gy": "Mean[Gy]",
}


def case_metrics(case: Case, dose_gy: np.ndarray, constraints: Sequence[Constraint] = ()) -> dict[str, float]:
    """Compare a dose with the case's reference dose.

    Args:
        case: the patient; :attr:`Case.body` is OpenKBP's possible dose mask.
        dose_gy: predicted dose ``[i, j, k]``. Dose outside the body counts as error, as in OpenKBP's own score.
        constraints: rows whose compliance is measured too, of the dose and of the reference.

    Returns:
        Flat dictionary of figures; nan where not applicable.

    Raises:
        CaseError: the case has no reference dose, or the dose has another shape.
    """
    if case.dose_gy is None:
        raise CaseError(f"case {case.name}: evaluation needs a reference dose (RTDOSE, dose.csv, npz), and found none")
    if dose_gy.shape != case.grid.shape:
        raise CaseError(f"case {case.name}: the dose has shape {dose_gy.shape}, the case {case.grid.shape}")
    dose_gy = np.asarray(dose_gy, dtype=np.float32)
    reference_gy = np.asarray(case.dose_gy, dtype=np.float32)
    row = {"openkbp_dose_error_gy": openkbp_dose_error_gy(dose_gy, reference_gy, case.body)}
    row |= _region_mae(case, dose_gy, reference_gy)
    row |= _organ_differences(case, dose_gy, reference_gy)
    row |= _target_differences(case, dose_gy, reference_gy)
    row |= _isodose_agreement(case, dose_gy, reference_gy)
    if constraints:
        known: dict = {}
        row["constraints_met_percent"] = compliance(check(constraints, case, dose_gy, known))
        row["reference_constraints_met_percent"] = compliance(check(constraints, case, reference_gy, known))
    row |= similarity(dose_gy, reference_gy, case.body, case.highest_prescription_gy)
    row |= structure_scores(case, dose_gy, reference_gy)
    row |= _openkbp_dvh_errors(case, dose_gy, reference_gy)
    return row


def openkbp_dose_error_gy(dose_gy: np.ndarray, reference_gy: np.ndarray, possible_dose_mask: np.ndarray) -> float:
    """OpenKBP's dose error of one patient (Babier et al., Med Phys 48, 2021; ``EvaluateDose`` of the challenge).

    The absolute error is summed over the *whole* volume and divided by the voxels of the possible dose mask.
    """
    total = np.abs(dose_gy - reference_gy).sum(dtype=np.float64)
    voxels = np.count_nonzero(possible_dose_mask)
    return float(total / voxels) if voxels else float("nan")


def openkbp_dvh(dose_in_roi_gy: np.ndarray, voxel_mm3: float, is_target: bool) -> dict[str, float]:
    """OpenKBP's DVH metrics of one structure, with the challenge's own percentile rules.

    Args:
        dose_in_roi_gy: dose of the structure's voxels, any shape.
        voxel_mm3: volume of one voxel.
        is_target: targets have D99, D95 and D1, organs D0.1cc and the mean.
    """
    dose_gy = np.asarray(dose_in_roi_gy, dtype=np.float64).ravel()
    if is_target:
        d99, d95, d1 = np.percentile(dose_gy, (1, 5, 99))
        return {"d99_gy": float(d99), "d95_gy": float(d95), "d1_gy": float(d1)}
    voxels = max(1, round(100 / voxel_mm3))
    share = 100 - 100 * voxels / dose_gy.size
    return {"d0.1cc_gy": float(np.percentile(dose_gy, max(share, 0.0))), "mean_gy": float(dose_gy.mean())}


def gdp_hmm_mae_gy(
    dose_gy: np.ndarray, reference_gy: np.ndarray, body: np.ndarray, ptv_high: np.ndarray, prescription_gy: float
) -> float:
    """MAE of the GDP-HMM challenge (AAPM 2025; the batch cell of its ``evaluation.ipynb``).

    The reference is first rescaled so that 97 % of the high-dose target receive the prescription. Errors are summed
    where *either* dose exceeds 5 Gy, but divided by the voxels where the *reference* does.
    """
    if not ptv_high.any():
        return float("nan")
    scale = prescription_gy / (np.percentile(reference_gy[ptv_high], 3) + 1e-5)
    reference, predicted = reference_gy[body].astype(np.float64) * scale, dose_gy[body].astype(np.float64)
    either = (reference > 5) | (predicted > 5)
    voxels = np.count_nonzero(reference > 5)
    return float(np.abs(reference - predicted)[either].sum() / voxels) if voxels else float("nan")


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Pool the figures of many cases.

    Args:
        rows: what :func:`case_metrics` gave for each case; other entries that are not numbers are passed over.

    Returns:
        ``dose_score`` (mean over cases, Gy), ``dvh_score`` (mean over *all* pooled (case, metric, structure) values, as
        OpenKBP has it, Gy), each with ``..._interval``, its 95 % interval by bootstrap over patients; ``cases``, and
        ``metrics``: name -> ``{"mean", "std", "cases"}``, nan where none applies.
    """
    metrics = {}
    for name in _numeric_names(rows):
        values = np.array([float(row.get(name, math.nan)) for row in rows])
        values = values[~np.isnan(values)]
        metrics[name] = {
            "mean": float(values.mean()) if values.size else math.nan,
            "std": float(values.std(ddof=1)) if values.size > 1 else math.nan,
            "cases": int(values.size),
        }
    errors = [[float(v) for k, v in row.items() if k.startswith(DVH_ERROR + "/") and not math.isnan(v)] for row in rows]
    pooled = [error for row in errors for error in row]
    doses = [[float(row.get("openkbp_dose_error_gy", math.nan))] for row in rows]
    return {
        "dose_score": metrics.get("openkbp_dose_error_gy", {"mean": math.nan})["mean"],
        "dose_score_interval": _interval(doses),
        "dvh_score": float(np.mean(pooled)) if pooled else math.nan,
        "dvh_score_interval": _interval(errors),
        "cases": len(rows),
        "metrics": metrics,
    }


def _interval(patients: Sequence[Sequence[float]]) -> list[float]:
    """95 % percentile bootstrap interval of the pooled mean, drawing patients with all their figures; nan for one."""
    values = [np.asarray(own)[~np.isnan(own)] for own in patients]
    values = [own for own in values if own.size]
    if len(values) < 2:
        return [math.nan, math.nan]
    sums, counts = np.array([own.sum() for own in values]), np.array([float(own.size) for own in values])
    found = stats.bootstrap((sums, counts), lambda s, n, axis=-1: s.sum(axis) / n.sum(axis), paired=True,
                            vectorized=True, method="percentile", random_state=0)
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def write_metrics(rows: Sequence[Mapping[str, Any]], out_dir: str | Path) -> dict[str, Any]:
    """Write ``metrics.csv`` (a line a case, then mean and std) and ``metrics.json``, each whole or not at all.

    Args:
        rows: one dictionary a case; an entry ``"case"`` names it.
        out_dir: made when missing.

    Returns:
        The summary, with the rows under ``"per_case"``; not-applicable figures are null in the JSON, empty in the CSV.

    Raises:
        CaseError: no rows.
    """
    if not rows:
        raise CaseError("metrics: no case was evaluated, so there is nothing to write; does the data set have doses?")
    out_dir = Path(out_dir)
    summary = summarise(rows) | {"per_case": [dict(row) for row in rows]}
    names = _numeric_names(rows)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", *names])
    for number, row in enumerate(rows):
        table.writerow([row.get("case", number), *(_cell(row.get(name)) for name in names)])
    for statistic in ("mean", "std"):
        table.writerow([statistic, *(_cell(summary["metrics"][name][statistic]) for name in names)])
    write_whole(out_dir / "metrics.csv", text.getvalue())
    write_json(out_dir / "metrics.json", summary)
    return summary


class DoseScore(CumulativeIterationMetric):
    """Mean over cases of the mean absolute dose error within the body, in Gy: OpenKBP's dose score for training.

    Call it with ``y_pred`` and ``y``, ``(B, 1, X, Y, Z)`` doses as fractions of the prescription, and the keywords
    ``body`` (``(B, 1, X, Y, Z)``, non-zero inside; by default everywhere) and ``scale_gy`` (the prescription, a number
    or one an item; by default the constructor's). MONAI's ignite handler passes two arguments only: there, let ``y``
    have a second channel, made by :meth:`pack`.

    Args:
        scale_gy: Gy of a network dose of 1.0 where a call does not say.
    """

    def __init__(self, scale_gy: float = 1.0) -> None:
        super().__init__()
        self.scale_gy = scale_gy

    @staticmethod
    def pack(y: torch.Tensor, body: torch.Tensor, scale_gy: float | torch.Tensor) -> torch.Tensor:
        """``y`` with a second channel that holds ``scale_gy`` within the body and 0 outside.

        Args:
            y: ``(B, 1, X, Y, Z)``, or ``(1, X, Y, Z)`` for one item.
            body: same shape, non-zero inside.
            scale_gy: a number, or one an item.
        """
        scale = torch.as_tensor(scale_gy, dtype=y.dtype, device=y.device).reshape(-1, *[1] * (y.ndim - 1))
        return torch.cat([y, (body != 0) * (scale if scale.numel() > 1 else scale.reshape(()))], dim=y.ndim - 4)

    def _compute_list(self, y_pred, y=None, **kwargs):
        """Items one by one, each with its own ``body`` and ``scale_gy``."""
        out = []
        for n, (p, t) in enumerate(zip(y_pred, y)):
            own = {k: v[n] if isinstance(v, (list, tuple)) else v for k, v in kwargs.items()}
            if isinstance(own.get("body"), torch.Tensor) and own["body"].ndim == p.ndim:
                own["body"] = own["body"][None]
            out.append(self._compute_tensor(p.detach()[None], t.detach()[None], **own))
        return torch.cat(out)

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, body=None, scale_gy=None):
        """``(B, 1)`` errors in Gy.

        Raises:
            ValueError: shapes that do not fit, or a body without voxels.
        """
        if y is None or y_pred.shape[1] != 1 or y.shape[1] not in (1, 2) or y.shape[2:] != y_pred.shape[2:]:
            found = None if y is None else tuple(y.shape)
            raise ValueError(
                f"DoseScore: expected (B, 1, ...) and (B, 1 or 2, ...), got {tuple(y_pred.shape)}, {found}"
            )
        if y.shape[1] == 2:
            y, packed = y[:, :1], y[:, 1:]
            body, scale_gy = packed, packed.flatten(1).amax(1)
        inside = torch.ones_like(y_pred, dtype=torch.bool) if body is None else torch.as_tensor(body) != 0
        inside = inside.to(y_pred.device).expand(y_pred.shape).flatten(1)
        if not inside.any(1).all():
            raise ValueError("DoseScore: a case has no body voxels, so its error has no meaning")
        scale = torch.as_tensor(self.scale_gy if scale_gy is None else scale_gy, dtype=torch.float32)
        error = (y_pred.float() - y.float()).abs().flatten(1) * inside
        return (error.sum(1) / inside.sum(1) * scale.to(y_pred.device).flatten())[:, None]

    def aggregate(self) -> torch.Tensor:
        """Mean over all cases seen since the last reset, in Gy (nan when none was)."""
        data = self.get_buffer()
        return torch.tensor(math.nan) if data is None else data.mean()


def _ptv_high(case: Case) -> np.ndarray:
    """Union of the targets with the highest prescription."""
    top = case.highest_prescription_gy
    return np.logical_or.reduce([case.masks[roi] for roi, gy in case.prescription_gy.items() if gy == top])


def _region_mae(case: Case, dose_gy: np.ndarray, reference_gy: np.ndarray) -> dict[str, float]:
    """Mean absolute errors by region; "ADDiff units" are Gy / 10, the likely unit of that paper's MAE."""
    error = np.abs(dose_gy - reference_gy)
    ptv_high = _ptv_high(case)
    high = _mean(error[ptv_high])
    return {
        "mae_body_gy": _mean(error[case.body]),
        "mae_body_above_5gy_gy": _mean(error[case.body & (reference_gy > 5)]),
        "mae_ptv_high_gy": high,
        "mae_ptv_high_addiff_units": high / 10,
        "gdp_hmm_mae_gy": gdp_hmm_mae_gy(dose_gy, reference_gy, case.body, ptv_high, case.highest_prescription_gy),
    }


def _organ_differences(case: Case, dose_gy: np.ndarray, reference_gy: np.ndarray) -> dict[str, float]:
    row = {}
    for name, (choices, text) in ORGAN_METRICS.items():
        present = next((c for c in choices if any(roi in case.masks for roi in c)), ())
        masks = [case.masks[roi] for roi in present if roi in case.masks]
        row[name] = math.nan
        if masks:
            mask, metric = np.logical_or.reduce(masks), parse_metric(text)
            a, b = (metric.evaluate(d[mask], case.grid.voxel_cc) for d in (dose_gy, reference_gy))
            row[name] = abs(a - b)
    return row


def _target_differences(case: Case, dose_gy: np.ndarray, reference_gy: np.ndarray) -> dict[str, float]:
    mask = _ptv_high(case)
    row = {}
    for name, text in TARGET_METRICS.items():
        a, b = (parse_metric(text).evaluate(d[mask], case.grid.voxel_cc) for d in (dose_gy, reference_gy))
        row[name] = abs(a - b)
    row["ptv_high_hi_abs_diff"] = abs(homogeneity_icru83(dose_gy[mask]) - homogeneity_icru83(reference_gy[mask]))
    at_gy = CONFORMITY_LEVEL * case.highest_prescription_gy
    a, b = (conformity_paddick(d, mask, case.body, at_gy) for d in (dose_gy, reference_gy))
    row["ptv_high_ci_paddick_abs_diff"] = abs(a - b)
    return row


def _isodose_agreement(case: Case, dose_gy: np.ndarray, reference_gy: np.ndarray) -> dict[str, float]:
    """Dice and HD95 of the isodoses at 10 to 100 % of the highest prescription, and their means over levels."""
    levels_gy = [share * case.highest_prescription_gy for share in ISODOSE_LEVELS]
    dice = isodose_dice(dose_gy, reference_gy, case.body, levels_gy)
    hd95 = isodose_hausdorff95_mm(dose_gy, reference_gy, case.body, levels_gy, case.grid.spacing_mm)
    row = {"isodose_dice_mean": _mean(dice), "isodose_hd95_mean_mm": _mean(hd95)}
    for share, d, h in zip(ISODOSE_LEVELS, dice, hd95):
        row[f"isodose_{100 * share:.0f}_dice"] = float(d)
        row[f"isodose_{100 * share:.0f}_hd95_mm"] = float(h)
    return row


def _openkbp_dvh_errors(case: Case, dose_gy: np.ndarray, reference_gy: np.ndarray) -> dict[str, float]:
    row = {}
    for roi in (*OPENKBP_OARS, *case.targets):
        mask = case.masks.get(roi)
        if mask is None or not mask.any():
            continue
        target = roi in case.prescription_gy
        a, b = (openkbp_dvh(d[mask], 1000 * case.grid.voxel_cc, target) for d in (dose_gy, reference_gy))
        row |= {f"{DVH_ERROR}/{roi}/{name}": abs(a[name] - b[name]) for name in a}
    return row


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not nan; nan when there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean(dtype=np.float64)) if values.size else math.nan


def _numeric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all numeric entries, in order of first appearance."""
    names = {k: None for row in rows for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return list(names)


def _cell(value: Any) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"
