"""What a physicist wants to know of one dose: a plain record with every number, and the files made of it.

:func:`make_report` measures, :func:`write_report` writes ``report.json`` and ``report.html``. Doses are in Gy, volumes
in cm^3; a metric's name ends with its unit in brackets (``custom.dosimetry.dvh``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from custom import __version__
from custom.case import BODY, Case, CaseError
from custom.dosimetry.constraints import (
    FAILED,
    NOT_APPLICABLE,
    Constraint,
    Verdict,
    check,
    compliance,
    load_constraints,
)
from custom.dosimetry.dvh import cumulative_dvh, parse_metric
from custom.dosimetry.indices import (
    conformity_paddick,
    conformity_rtog,
    homogeneity_icru83,
    isodose_dice,
    isodose_hausdorff95_mm,
)
from custom.dosimetry.partial import dose_samples
from custom.dosimetry.regions import Region, bounding_box, drawn, regions
from custom.report_views import find_views
from custom.whole import write_whole

__all__ = ["BANNER", "make_report", "write_report"]

BANNER = "Predicted dose. Research use only, not for clinical use."
TARGET_METRICS = ("D98%[Gy]", "D95%[Gy]", "D50%[Gy]", "D2%[Gy]", "Mean[Gy]", "Max[Gy]", "V95%[%]")
ORGAN_METRICS = ("Mean[Gy]", "Max[Gy]", "D0.1cc[Gy]", "D2%[Gy]", "V20Gy[%]", "V40Gy[%]")
TUMOUR_VOLUMES = ("GTV", "CTV", "ITV")  # listed with the targets, judged by the highest prescription
CONFORMITY_LEVEL = 0.95  # of the target's prescription
ISODOSE_LEVELS = (0.2, 0.5, 0.8, 0.95, 1.0)  # of the highest prescription
DVH_STEP_GY = 0.25
SINGLE_STEP = (
    "The uncertainty bands are no error bars: samples of a single step hardly differ. The spread is calibrated for "
    "--num_inference_steps 4 --num_samples 8."
)

TARGET_COLOURS = ("#d62728", "#ff7f0e", "#bc8f00", "#8c564b")
ORGAN_COLOURS = (
    "#1f77b4", "#2ca02c", "#9467bd", "#17becf", "#e377c2", "#7f7f7f", "#393b79", "#637939", "#843c39", "#7b4173",
    "#3182bd", "#31a354", "#756bb1", "#0e7c86", "#a55194", "#5254a3", "#8ca252", "#ad494a", "#6b6ecf", "#969696",
)  # fmt: skip


def make_report(
    case: Case,
    dose_gy: np.ndarray,
    *,
    dose_std_gy: np.ndarray | None = None,
    warnings: Sequence[str] = (),
    constraints: Sequence[Constraint] | None = None,
    model: Mapping[str, Any] | None = None,
    gamma: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Measure a dose.

    Args:
        case: the patient; with a reference dose everything is given for both.
        dose_gy: predicted dose ``[i, j, k]``.
        dose_std_gy: standard deviation of the prediction over its samples, ``[i, j, k]``.
        warnings: what the user should know before trusting the dose.
        constraints: the protocol; by default the bundle's ``constraints.json``.
        model: JSON-able facts about how the dose was made, see :func:`custom.report_model.model_facts`.
        gamma: pass rates against the reference dose, each with its criterion (``dose_percent``, ``distance_mm``,
            ``is_local``, ``cutoff_percent``, ``pass_percent``); they take long, so they are not measured here.

    Returns:
        A record of plain JSON types; nan stands for *not applicable* (null in the file).

    Raises:
        CaseError: arrays that do not fit the case, or doses that are not finite.
    """
    _check_dose(case, dose_gy, "dose")
    if dose_std_gy is not None:
        _check_dose(case, dose_std_gy, "standard deviation")
    constraints = load_constraints() if constraints is None else constraints
    doses = {"predicted": dose_gy} | ({} if case.dose_gy is None else {"reference": case.dose_gy})
    found = _structures(case)
    known: dict[str, list[Region]] = {}
    verdicts = {key: check(constraints, case, dose, known) for key, dose in doses.items()}
    structures = [_structure(region, case, doses) for region in found]
    return {
        "banner": BANNER,
        "case": case.name,
        "site": case.site,
        "technique": case.technique,
        "input_format": case.source.get("format", "unknown"),
        "software": f"rt-ct-dose-prediction {__version__}",
        "model": dict(model or {}),
        "grid": {"shape": list(case.grid.shape), "spacing_mm": _rounded(case.grid.spacing_mm, 4)},
        "beams": [{"name": b.name, "is_arc": b.is_arc, "gantry_deg": _beam_angles(b.gantry_deg)} for b in case.beams],
        "prescription_gy": {roi: float(gy) for roi, gy in case.targets.items()},
        "has_ct": case.ct_hu is not None,
        "has_reference": case.dose_gy is not None,
        "warnings": [str(text) for text in (*warnings, *_own_warnings(dose_std_gy, model or {}))],
        "notes": [str(text) for text in case.source.get("notes", ())],
        "structures": structures,
        "colours": _colours([s["name"] for s in structures], [s["name"] for s in structures if s["role"] == "target"]),
        "dvh": _dvh(found, case, doses, dose_std_gy),
        "indices": [_indices(region, case, doses) for region in found if region.name in case.prescription_gy],
        "constraints": _protocol(verdicts),
        "constraints_met_percent": {key: compliance(v) for key, v in verdicts.items()},
        "comparison": _comparison(case, dose_gy, gamma),
        "uncertainty": _uncertainty(case, dose_std_gy),
        "views": find_views(case, dose_gy, verdicts["predicted"]),
    }


def write_report(record: Mapping[str, Any], case: Case, dose_gy: np.ndarray, out_dir: str | Path) -> list[Path]:
    """Write ``report.json`` and a self-contained ``report.html``; each is written whole or not at all.

    Args:
        record: what :func:`make_report` gave.
        case: the same case, for the pictures.
        dose_gy: the same dose.
        out_dir: made when missing.

    Returns:
        The two files.
    """
    from custom.report_html import render_html  # matplotlib is slow to load, and only needed here
    from custom.report_pictures import draw_views

    outlined = {name: colour for name, colour in record["colours"].items() if name != BODY}
    contents = {
        "report.json": json.dumps(_plain(record), indent=1, allow_nan=False),
        "report.html": render_html(_plain(record), draw_views(record["views"], case, dose_gy, outlined)),
    }
    written = [Path(out_dir) / name for name in contents]
    for path, text in zip(written, contents.values(), strict=True):
        write_whole(path, text)
    return written


def _own_warnings(dose_std_gy: np.ndarray | None, model: Mapping[str, Any]) -> list[str]:
    return [SINGLE_STEP] if dose_std_gy is not None and model.get("num_inference_steps") == 1 else []


def _check_dose(case: Case, array: np.ndarray, what: str) -> None:
    if array.shape != case.grid.shape:
        raise CaseError(f"case {case.name}: the {what} has shape {array.shape}, the case {case.grid.shape}")
    if not np.isfinite(array.sum(dtype=np.float64)):
        raise CaseError(f"case {case.name}: the {what} holds values that are not finite; expected Gy")


def _structures(case: Case) -> list[Region]:
    """Everything drawn: targets by falling prescription, then tumour volumes, organs by name, and the body.

    Both lungs are one organ for every limit, so they get their common histogram, too.
    """
    others = {roi: drawn(roi, case) for roi in case.masks if roi not in case.prescription_gy and roi != BODY}
    if {"Lung_L", "Lung_R"} <= others.keys() and "Lungs" not in others:
        others["Lungs"] = next(iter(regions("Lungs", case)), None)
    names = sorted(others, key=lambda roi: (not roi.startswith(TUMOUR_VOLUMES), roi))
    found = [*(drawn(roi, case) for roi in case.targets), *(others[roi] for roi in names), drawn(BODY, case)]
    return [region for region in found if region is not None]


def _colours(names: Sequence[str], targets: Sequence[str]) -> dict[str, str]:
    """A colour for each structure: warm ones for targets, grey for the body."""
    organs = [name for name in names if name not in targets and name != BODY]
    colours = {name: ORGAN_COLOURS[n % len(ORGAN_COLOURS)] for n, name in enumerate(organs)}
    colours |= {name: TARGET_COLOURS[n % len(TARGET_COLOURS)] for n, name in enumerate(targets)}
    return colours | {BODY: "#999999"}


def _structure(region: Region, case: Case, doses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    is_target = region.name in case.prescription_gy or region.name.startswith(TUMOUR_VOLUMES)
    role = "target" if is_target else "external" if region.name == BODY else "organ"
    samples = {key: dose_samples(region, dose, case.grid) for key, dose in doses.items()}
    sample_cc = samples["predicted"][1]
    metrics = {}
    for text in TARGET_METRICS if is_target else ORGAN_METRICS:
        metric = parse_metric(text)
        values = {k: metric.evaluate(v, sample_cc, region.prescription_gy) for k, (v, _) in samples.items()}
        metrics[text] = _pair(values)
    return {
        "name": region.name,
        "role": role,
        "prescription_gy": case.prescription_gy.get(region.name),
        "volume_cc": float(samples["predicted"][0].size * sample_cc),
        "metrics": metrics,
    }


def _pair(values: Mapping[str, float]) -> dict[str, float]:
    """The values, and predicted minus reference where both are known."""
    out = {key: float(value) for key, value in values.items()}
    if "reference" in out:
        out["difference"] = out["predicted"] - out["reference"]
    return out


def _dvh(found: Sequence[Region], case: Case, doses: Mapping[str, np.ndarray], std_gy: np.ndarray | None) -> dict:
    """DVH curves on common doses; with a standard deviation also those of dose minus and plus it."""
    top_gy = max(float(dose.max()) for dose in doses.values())
    stop_gy = DVH_STEP_GY * math.ceil(max(top_gy, 1.0) / DVH_STEP_GY + 1)

    def curve(values: np.ndarray) -> list[float]:
        inside = np.ones(values.shape, dtype=bool)
        return _rounded(cumulative_dvh(values, inside, case.grid.voxel_cc, DVH_STEP_GY, stop_gy).volume_percent, 2)

    def inside(region: Region, volume: np.ndarray) -> np.ndarray:
        return dose_samples(region, volume, case.grid)[0]

    curves = {}
    for region in found:
        own = {key: curve(inside(region, dose)) for key, dose in doses.items()}
        if std_gy is not None:
            mean, std = inside(region, doses["predicted"]), inside(region, std_gy)
            own |= {"lower": curve(mean - std), "upper": curve(mean + std)}
        curves[region.name] = own
    count = len(next(iter(curves.values()))["predicted"])
    return {"dose_gy": _rounded(DVH_STEP_GY * np.arange(count), 4), "volume_percent": curves}


def _indices(region: Region, case: Case, doses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    at_gy = CONFORMITY_LEVEL * region.prescription_gy
    target = case.masks[region.name]
    return {
        "name": region.name,
        "reference_isodose_gy": at_gy,
        "homogeneity_icru83": _pair(
            {k: homogeneity_icru83(dose_samples(region, d, case.grid)[0]) for k, d in doses.items()}
        ),
        "conformity_paddick": _pair({k: conformity_paddick(d, target, case.body, at_gy) for k, d in doses.items()}),
        "conformity_rtog": _pair({k: conformity_rtog(d, target, case.body, at_gy) for k, d in doses.items()}),
    }


def _protocol(verdicts: Mapping[str, Sequence[Verdict]]) -> list[dict[str, Any]]:
    """One entry a verdict, the worst misses first, then what is met by rising margin, then what does not apply."""
    rows = []
    references = verdicts.get("reference", [None] * len(verdicts["predicted"]))
    for verdict, reference in zip(verdicts["predicted"], references):
        row = verdict.constraint
        rows.append(
            {
                "structure": verdict.structure,
                "metric": str(row.metric),
                "limit": row.limit_text,
                "limit_value": verdict.limit,
                "unit": row.metric.unit,
                "status": verdict.status,
                "predicted": verdict.value,
                "margin": verdict.margin,
                "severity": verdict.severity,
                "reference": math.nan if reference is None else reference.value,
                "reference_status": None if reference is None else reference.status,
                "weight": row.weight,
                "source": row.source,
                "note": "; ".join(text for text in (verdict.note, row.note) if text),
            }
        )
    order = {FAILED: 0, NOT_APPLICABLE: 2}
    return sorted(rows, key=lambda r: (order.get(r["status"], 1), -r["severity"], _relative_margin(r)))


def _relative_margin(row: Mapping[str, Any]) -> float:
    margin = row["margin"] / max(abs(row["limit_value"]), 1.0)
    return 0.0 if math.isnan(margin) else margin


def _comparison(case: Case, dose_gy: np.ndarray, gamma: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How far the dose is from the reference, or None without one."""
    if case.dose_gy is None:
        return None
    box = bounding_box(case.body)
    body, predicted, reference = (array[box] for array in (case.body, dose_gy, case.dose_gy))
    error = np.abs(predicted - reference)
    levels_gy = [share * case.highest_prescription_gy for share in ISODOSE_LEVELS]
    dice = isodose_dice(predicted, reference, body, levels_gy)
    hd95 = isodose_hausdorff95_mm(predicted, reference, body, levels_gy, case.grid.spacing_mm)
    above = body & (reference > 5)
    return {
        "mae_body_gy": float(error[body].mean(dtype=np.float64)),
        "mae_body_above_5gy_gy": float(error[above].mean(dtype=np.float64)) if above.any() else math.nan,
        "mae_targets_gy": float(error[case.target_mask()[box]].mean(dtype=np.float64)),
        "isodoses": [
            {"percent": 100 * share, "dose_gy": gy, "dice": float(d), "hd95_mm": float(h)}
            for share, gy, d, h in zip(ISODOSE_LEVELS, levels_gy, dice, hd95)
        ],
        "gamma": [dict(row) for row in gamma],
    }


def _uncertainty(case: Case, std_gy: np.ndarray | None) -> dict[str, float] | None:
    if std_gy is None:
        return None
    inside = std_gy[case.body]
    return {"mean_std_in_body_gy": float(inside.mean(dtype=np.float64)), "max_std_in_body_gy": float(inside.max())}


def _beam_angles(angles: Sequence[float]) -> list[float]:
    """One angle of a fixed field, first and last of an arc."""
    return _rounded(angles if len(angles) < 2 else (angles[0], angles[-1]), 2)


def _rounded(values, digits: int) -> list[float]:
    return np.round(np.asarray(values, dtype=np.float64), digits).tolist()


def _plain(value: Any) -> Any:
    """The same nested record with null for nan and infinity, as JSON has neither."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None
