"""Clinical limits as data: read the rows of ``constraints.json``, and judge a dose by them.

A row limits one metric of one structure; its fields are those of :class:`Constraint`. Structures are TG-263 names, or
are derived from masks and spacing by :func:`regions`, whose docstring has the grammar. An absent structure is *not
applicable*, never passed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from custom.case import Case, CaseError
from custom.dosimetry.dvh import Metric, parse_metric
from custom.dosimetry.partial import dose_samples
from custom.dosimetry.regions import Region, check_structure, regions
from custom.places import bundle_folder

__all__ = ["FAILED", "NOT_APPLICABLE", "PASSED", "Constraint", "Verdict", "check", "compliance", "load_constraints"]

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not_applicable"
ANY_SITE = "any"
REQUIRED = {"structure", "metric", "direction", "limit", "weight", "site", "source"}
OPTIONAL = {"any_of", "note", "plan_weight"}
NUMBERS = {"limit", "weight", "plan_weight"}
_SHARE = re.compile(r"^(\d+(?:\.\d+)?)%Rx$")


@dataclass(frozen=True)
class Constraint:
    """One clinical limit.

    Args:
        structure: TG-263 name or derived structure (:func:`custom.dosimetry.regions.regions`).
        metric: what is limited.
        at_most: True for an upper limit (``<=``), False for a lower one (``>=``).
        limit: in the metric's unit, or a share of the prescription when ``limit_is_share``.
        limit_is_share: the limit is ``limit`` times the prescription (the target's own, else the case's highest).
        weight: priority, 0 to 1.
        site: :class:`custom.case.Site` it applies to, or ``"any"``.
        source: where the limit stands.
        any_of: rows with the same text here are met when one of them is ("at least one side").
        note: what a reader should know, such as that the source is not legible.
        plan_weight: weight of an objective at this limit in the plan prior (``custom.physics.limits``); 0 for none.
        line: line in the file.
    """

    structure: str
    metric: Metric
    at_most: bool
    limit: float
    limit_is_share: bool
    weight: float
    site: str
    source: str
    any_of: str = ""
    note: str = ""
    plan_weight: float = 0.0
    line: int = 0

    def limit_for(self, prescription_gy: float) -> float:
        """The limit in the metric's unit."""
        return self.limit * prescription_gy if self.limit_is_share else self.limit

    @property
    def limit_text(self) -> str:
        """The limit as a reader wants it: ``"<= 45 Gy"``, ``">= 95% of Rx"``."""
        value = f"{100 * self.limit:g}% of Rx" if self.limit_is_share else f"{self.limit:g} {self.metric.unit}"
        return f"{'<=' if self.at_most else '>='} {value}"


@dataclass(frozen=True)
class Verdict:
    """What one constraint says of one dose.

    Args:
        constraint: the row.
        structure: the structure it was evaluated on (a row on ``PTV`` has a verdict for each target).
        status: ``"passed"``, ``"failed"`` or ``"not_applicable"``.
        limit: in the metric's unit; nan when not applicable, as are ``value`` and ``margin``.
        value: the metric's value.
        margin: room left before the limit, in the metric's unit; negative beyond it.
        note: why the status is not what the margin says.
    """

    constraint: Constraint
    structure: str
    status: str
    limit: float = math.nan
    value: float = math.nan
    margin: float = math.nan
    note: str = ""

    @property
    def severity(self) -> float:
        """How bad a miss is: the weighted excess relative to the limit; 0 for what is met or not applicable."""
        if self.status != FAILED:
            return 0.0
        return self.constraint.weight * -self.margin / max(abs(self.limit), 1.0)


def load_constraints(path: str | Path | None = None) -> tuple[Constraint, ...]:
    """Read constraint rows.

    Args:
        path: a file like the default, ``configs/constraints.json`` of the bundle.

    Raises:
        CaseError: an unreadable file, or a bad row; the message names file and line.
    """
    path = default_path() if path is None else Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        message = f"constraints: cannot read {path} ({error.strerror}); name a file like configs/constraints.json"
        raise CaseError(message) from error
    rows = _rows_with_lines(text, path)
    if not rows:
        raise CaseError(f"{path}: no rows under 'constraints'; give at least one, or leave the file out")
    return tuple(_parse_row(row, line, path) for row, line in rows)


def default_path() -> Path:
    """``configs/constraints.json`` of the bundle."""
    return bundle_folder() / "configs" / "constraints.json"


def check(
    constraints: Sequence[Constraint], case: Case, dose_gy: np.ndarray, known: dict[str, list[Region]] | None = None
) -> list[Verdict]:
    """Judge a dose.

    Args:
        constraints: rows; those of other sites than the case's are left out.
        case: structures, prescription and spacing.
        dose_gy: dose ``[i, j, k]``.
        known: structures made so far, filled here; pass the same dictionary to judge several doses of one case.

    Returns:
        One verdict a row, or one a target for rows on ``PTV``, in the order of the rows.
    """
    known = {} if known is None else known
    verdicts = []
    for row in constraints:
        if row.site not in (ANY_SITE, case.site):
            continue
        if row.structure not in known:
            known[row.structure] = regions(row.structure, case)
        found = known[row.structure]
        verdicts += [_judge(row, region, case, dose_gy) for region in found]
        if not found:
            verdicts.append(Verdict(row, row.structure, NOT_APPLICABLE))
    return _meet_alternatives(verdicts)


def compliance(verdicts: Sequence[Verdict]) -> float:
    """Share of the applicable constraints that are met, in percent; nan when none applies."""
    applicable = [v for v in verdicts if v.status != NOT_APPLICABLE]
    return 100 * sum(v.status == PASSED for v in applicable) / len(applicable) if applicable else math.nan


def _judge(row: Constraint, region: Region, case: Case, dose_gy: np.ndarray) -> Verdict:
    inside_gy, sample_cc = dose_samples(region, dose_gy, case.grid)
    value = row.metric.evaluate(inside_gy, sample_cc, region.prescription_gy)
    limit = row.limit_for(region.prescription_gy)
    margin = limit - value if row.at_most else value - limit
    status = PASSED if margin >= -1e-6 * max(abs(limit), 1.0) else FAILED
    return Verdict(row, region.name, status, limit, value, margin)


def _meet_alternatives(verdicts: list[Verdict]) -> list[Verdict]:
    """Rows of one ``any_of`` group pass together as soon as one of them does."""
    met = {v.constraint.any_of for v in verdicts if v.status == PASSED and v.constraint.any_of}
    out = []
    for v in verdicts:
        if v.status == FAILED and v.constraint.any_of in met:
            note = f"met by another row of '{v.constraint.any_of}' (one is enough)"
            v = Verdict(v.constraint, v.structure, PASSED, v.limit, v.value, v.margin, note)
        out.append(v)
    return out


def _rows_with_lines(text: str, path: Path) -> list[tuple[object, int]]:
    """Every element of the list under ``"constraints"`` with the line it starts on."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise CaseError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(record, dict) or not isinstance(record.get("constraints"), list):
        raise CaseError(f"{path}: expected an object with a list 'constraints', one row a line")
    decoder, rows = json.JSONDecoder(), []
    at = re.compile(r'"constraints"\s*:\s*\[').search(text).end()
    for _ in record["constraints"]:
        at = re.compile(r"[\s,]*").match(text, at).end()
        row, end = decoder.raw_decode(text, at)
        rows.append((row, text.count("\n", 0, at) + 1))
        at = end
    return rows


def _parse_row(row: object, line: int, path: Path) -> Constraint:
    """One checked row."""
    try:
        if not isinstance(row, dict):
            raise CaseError(f"expected an object, found {row!r}")
        if missing := REQUIRED - row.keys():
            raise CaseError(f"missing {sorted(missing)}")
        if unknown := row.keys() - REQUIRED - OPTIONAL:
            raise CaseError(f"unknown {sorted(unknown)}; expected {sorted(REQUIRED | OPTIONAL)}")
        if not all(isinstance(row[key], str) for key in row.keys() - NUMBERS):
            raise CaseError(f"only {sorted(NUMBERS)} may be numbers, the rest are texts")
        metric = parse_metric(row["metric"])
        check_structure(row["structure"])
        if row["direction"] not in ("<=", ">="):
            raise CaseError(f"direction {row['direction']!r}; expected '<=' or '>='")
        limit, is_share = _parse_limit(row["limit"], metric)
        weight = row["weight"]
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
            raise CaseError(f"weight {weight!r}; expected a number from 0 to 1")
        plan_weight = row.get("plan_weight", 0)
        if isinstance(plan_weight, bool) or not isinstance(plan_weight, (int, float)) or not 0 <= plan_weight < 1e6:
            raise CaseError(f"plan_weight {plan_weight!r}; expected a number of at least 0, about 1 to 300")
    except CaseError as error:
        raise CaseError(f"{path}, line {line}: {error}") from None
    texts = {key: row[key] for key in ("structure", "site", "source", "any_of", "note") if key in row}
    return Constraint(
        metric=metric,
        at_most=row["direction"] == "<=",
        limit=limit,
        limit_is_share=is_share,
        weight=float(weight),
        plan_weight=float(plan_weight),
        line=line,
        **texts,
    )


def _parse_limit(limit: object, metric: Metric) -> tuple[float, bool]:
    """The number, and whether it is a share of the prescription."""
    if isinstance(limit, str):
        match = _SHARE.match(limit)
        if not match or not (metric.is_dose and metric.unit == "Gy"):
            raise CaseError(f"limit {limit!r} of {metric}; expected a number, or for a dose in Gy a text like '95%Rx'")
        return float(match[1]) / 100, True
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 <= limit < math.inf:
        raise CaseError(f"limit {limit!r}; expected a number of at least 0 in {metric.unit}, or a text like '95%Rx'")
    if metric.unit == "%" and not metric.is_dose and limit > 100:
        raise CaseError(f"limit {limit!r} of {metric}; a share of a volume is at most 100 %")
    return float(limit), False
