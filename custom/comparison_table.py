"""From the scores of several systems on the same cases to one table: means, paired differences, their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from custom.case import CaseError
from custom.dosimetry.structure_scores import STRUCTURE_METRICS

__all__ = ["COLUMNS", "case_figures", "compare", "markdown", "structure_errors"]

# Figure of a case -> title and digits in the table.
COLUMNS: dict[str, tuple[str, int]] = {
    "dose_score_gy": ("dose score, Gy", 3),
    "dvh_score_gy": ("DVH score, Gy", 3),
    "mae_body_gy": ("MAE, Gy", 3),
    "ssim": ("SSIM", 4),
    "psnr_db": ("PSNR, dB", 2),
    "ptv_mae_gy": ("PTV error, Gy", 3),
    "oar_mae_gy": ("OAR error, Gy", 3),
    "dosediff_dose_score_gy": ("DoseDiff's dose score, Gy", 3),
    "dosediff_volume_score_percent": ("volume score, %", 2),
    "seconds": ("seconds a case", 2),
}
RESAMPLES = 9999


def case_figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The table's figures of one case, from a row of ``metrics.json``; nan where one does not apply.

    The DVH score of a case is the mean of its own errors; OpenKBP's pools the errors of all cases.
    """
    def mean(prefix: str, keep=lambda name: True) -> float:
        values = [v for k, v in row.items() if k.startswith(prefix) and v is not None and keep(k[len(prefix):])]
        return float(np.mean(values)) if values else math.nan

    def one(name: str) -> float:
        value = row.get(name)
        return math.nan if value is None else float(value)

    return {
        "dose_score_gy": one("openkbp_dose_error_gy"),
        "dvh_score_gy": mean("openkbp_dvh_error/"),
        "mae_body_gy": one("mae_body_gy"),
        "ssim": one("ssim"),
        "psnr_db": one("psnr_db"),
        "ptv_mae_gy": mean("roi_mae/", lambda name: name.removesuffix("_gy") not in STRUCTURE_METRICS),
        "oar_mae_gy": mean("roi_mae/", lambda name: name.removesuffix("_gy") in STRUCTURE_METRICS),
        "dosediff_dose_score_gy": one("dosediff_dose_score_gy"),
        "dosediff_volume_score_percent": one("dosediff_volume_score_percent"),
        "seconds": one("prediction_seconds"),
    }


def compare(found: Mapping[str, Mapping[str, Any]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Compare every system with the first one, case by case.

    Args:
        found: system -> what ``metrics.json`` holds, and ``parameters``.
        seed: of the bootstrap.

    Returns:
        System -> ``cases``, ``parameters``, ``dvh_score_gy`` (pooled as OpenKBP does) and ``figures``: name ->
        ``{"mean", "std"}`` and, but for the first system, the mean paired ``difference`` to it, its 95 % interval
        ``low`` and ``high`` by BCa bootstrap over cases, and ``p`` of the paired t-test.

    Raises:
        CaseError: the systems were not scored on the same cases.
    """
    first = next(iter(found))
    names = [row["case"] for row in found[first]["per_case"]]
    table = {}
    for system, scores in found.items():
        rows = {row["case"]: row for row in scores["per_case"]}
        if set(rows) != set(names):
            odd = sorted(set(rows) ^ set(names))
            raise CaseError(f"comparison: {system} and {first} were not scored on the same cases; {odd[:3]} are in one "
                            "only. Score both on the same folder")
        columns = {name: np.array([case_figures(rows[case])[name] for case in names]) for name in COLUMNS}
        table[system] = {
            "cases": len(names), "parameters": scores.get("parameters"), "dvh_score_gy": scores["dvh_score"],
            "columns": columns,
        }
    base = table[first]["columns"]
    for system, entry in table.items():
        columns = entry.pop("columns")
        entry["figures"] = {
            name: _summary(values) | ({} if system == first else _paired(values, base[name], seed))
            for name, values in columns.items()
        }
    return table


def _summary(values: np.ndarray) -> dict[str, float]:
    values = values[~np.isnan(values)]
    return {"mean": float(values.mean()) if values.size else math.nan,
            "std": float(values.std(ddof=1)) if values.size > 1 else math.nan}


def _paired(values: np.ndarray, base: np.ndarray, seed: int) -> dict[str, float]:
    """Mean, bootstrap interval and t-test of paired differences."""
    both = ~np.isnan(values) & ~np.isnan(base)
    values, base = values[both], base[both]
    difference = values - base
    out = {"difference": math.nan, "low": math.nan, "high": math.nan, "p": math.nan}
    if difference.size:
        out["difference"] = float(difference.mean())
    if difference.size < 2:
        return out
    if np.ptp(difference) <= 1e-9 * np.abs(base).max():  # no spread to resample; certain only as far as these cases go
        return out | {"low": out["difference"], "high": out["difference"]}
    interval = stats.bootstrap(
        (difference,), np.mean, n_resamples=RESAMPLES, method="BCa", vectorized=True, random_state=seed
    ).confidence_interval
    p = float(stats.ttest_rel(values, base).pvalue)
    return out | {"low": float(interval.low), "high": float(interval.high), "p": p}


def markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown: scores, then differences to the first system with interval and p."""
    first = next(iter(table))
    titles = [title for title, _ in COLUMNS.values()]
    lines = [f"Mean over {table[first]['cases']} cases (the DVH score over all cases' errors).", "",
             f"| system | {' | '.join(titles)} | parameters |", "|" + "---|" * (len(titles) + 2)]
    for system, entry in table.items():
        cells = []
        for name, (_, digits) in COLUMNS.items():
            value = entry["dvh_score_gy"] if name == "dvh_score_gy" else entry["figures"][name]["mean"]
            cells.append(_number(value, digits))
        parameters = entry["parameters"]
        cells.append("" if parameters is None else f"{parameters / 1e6:.2f} M")
        lines.append(f"| {system} | {' | '.join(cells)} |")
    lines += ["", f"Mean paired difference to {first} [95 % interval, bootstrap over cases], p of the paired t-test.",
              "",
              f"| system | {' | '.join(titles[:-1])} |", "|" + "---|" * len(titles)]
    for system, entry in table.items():
        if system != first:
            cells = [_difference(entry["figures"][name], digits) for name, (_, digits) in list(COLUMNS.items())[:-1]]
            lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def structure_errors(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table of the mean absolute error by structure, a column a system: where a calibration helps."""
    prefix = "roi_mae/"
    structures = dict.fromkeys(
        name for scores in found.values() for row in scores["per_case"] for name in row if name.startswith(prefix)
    )
    lines = ["Mean absolute dose error within each structure, Gy.", "", f"| structure | cases | {' | '.join(found)} |",
             "|" + "---|" * (len(found) + 2)]
    for name in structures:
        cells, cases = [], 0
        for scores in found.values():
            values = [row[name] for row in scores["per_case"] if row.get(name) is not None]
            cells.append(_number(float(np.mean(values)) if values else math.nan, 3))
            cases = max(cases, len(values))
        lines.append(f"| {name.removeprefix(prefix).removesuffix('_gy')} | {cases} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _difference(figure: Mapping[str, float], digits: int) -> str:
    if math.isnan(figure["difference"]):
        return ""
    text = f"{figure['difference']:+.{digits}f}"
    if math.isnan(figure["low"]):
        return text
    text += f" [{figure['low']:+.{digits}f}, {figure['high']:+.{digits}f}]"
    return text if math.isnan(figure["p"]) else f"{text}, p {figure['p']:.2g}"
