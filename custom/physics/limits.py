"""How the plan prior follows the clinical limits: an edited line of ``constraints.json`` moves its objectives.

The objectives of ``plan_objectives.json`` are tuned, not prescribed: a cord objective at 38.4 Gy gives plans that look
like those of a clinic whose limit is 45 Gy. A row that says ``"follows": "SpinalCord Max[Gy] <= 45"`` names the limit
it was tuned under; where the protocol has another number there, its dose is scaled by the ratio of the two. With the
numbers it names, a row stays as it is, to the last bit.

A row of the protocol with a ``plan_weight`` is an objective of its own, at its limit.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom.case import CaseError
from custom.places import bundle_folder

__all__ = ["Limit", "edited", "follow", "own_objectives", "protocol_path", "read_protocol"]

logger = logging.getLogger(__name__)

_FOLLOWS = re.compile(r"^(\S.*) (\S+\[(?:Gy|%|cc)\]) (<=|>=) (\d+(?:\.\d+)?)(%Rx)?$")
_SHARE = re.compile(r"^(\d+(?:\.\d+)?)%Rx$")
_AT_DOSE = re.compile(r"^V(\d+(?:\.\d+)?)(Gy|%)\[(?:%|cc)\]$")
_DERIVED = re.compile(r"_(Ipsi|Contra)$|_PRV\d+$|^(Lungs|Parotids)$")  # what custom.dosimetry.regions makes
_DRAWN = re.compile(r"^[A-Za-z][A-Za-z0-9_~^+]*$")
TARGETS = {"PTV": None, "PTV_High": "high", "PTV_Mid": "mid", "PTV_Low": "low"}
EXAMPLE = "'SpinalCord Max[Gy] <= 45' or 'PTV_High D95%[Gy] >= 100%Rx'"


@dataclass(frozen=True)
class Limit:
    """A number of the protocol.

    Args:
        value: in the metric's unit, or a share of the prescription (1 = all of it) when ``is_share``.
        is_share: which of the two.
    """

    value: float
    is_share: bool


def protocol_path() -> Path:
    """``configs/constraints.json`` of the bundle."""
    return bundle_folder() / "configs" / "constraints.json"


def read_protocol(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file like ``constraints.json``; their grammar is checked by ``custom.dosimetry.constraints``.

    Raises:
        CaseError: a file without such rows.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["constraints"]
        if not all({"structure", "metric", "direction", "limit"} <= set(row) for row in rows):
            raise KeyError("structure, metric, direction or limit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CaseError(f"{path}: expected {{'constraints': [rows with structure, metric, direction and limit]}}, "
                        f"found: {error!r}") from error
    return rows


def edited(protocol: list[dict[str, Any]], limits: Mapping[str, float | str]) -> list[dict[str, Any]]:
    """The protocol with other limits.

    Args:
        protocol: :func:`read_protocol`'s rows.
        limits: new limit by structure and metric, as ``{"SpinalCord Max[Gy]": 30}``.

    Raises:
        CaseError: a limit on what no row limits.
    """
    names = [f"{row['structure']} {row['metric']}" for row in protocol]
    if unknown := sorted(set(limits) - set(names)):
        raise CaseError(f"edited limits: no row on {unknown}; expected 'structure metric' as in {names[:3]}")
    return [{**row, "limit": limits.get(name, row["limit"])} for name, row in zip(names, protocol)]


def follow(row: Mapping[str, Any], protocol: list[dict[str, Any]]) -> dict[str, Any]:
    """An objective's fields, with its dose moved to where the protocol's limit has moved.

    Args:
        row: fields of an objective, perhaps with ``"follows"``.
        protocol: :func:`read_protocol`'s rows. The first of the same structure, metric and direction counts; without
            one, or with a limit in another unit, the row stays as it was tuned.

    Raises:
        CaseError: a ``"follows"`` that cannot be read.
    """
    row = dict(row)
    text = row.pop("follows", None)
    if text is None:
        return row
    match = _FOLLOWS.match(text) if isinstance(text, str) else None
    if not match or not float(match[4]) > 0:
        raise CaseError(f"follows {text!r}; expected a limit like {EXAMPLE}")
    tuned = Limit(float(match[4]) / (100 if match[5] else 1), match[5] is not None)
    named = match[1], match[2], match[3]
    found = next((r for r in protocol if (r["structure"], r["metric"], r["direction"]) == named), None)
    if found is None:
        return row
    now = _limit(found["limit"])
    if now.is_share != tuned.is_share:
        logger.warning("plan objective of %s: the protocol's %s %s is in another unit than %r, so it is not followed",
                       row.get("structure"), named[0], named[1], text)
        return row
    if now.value != tuned.value:
        for key in ("dose_gy", "dose_share"):
            if row.get(key) is not None:
                row[key] = row[key] * now.value / tuned.value
    return row


def own_objectives(protocol: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Objectives of the rows that carry a ``plan_weight``, at their limit: fields of an objective.

    A volume limited at a dose (``V20Gy[%]``) becomes an objective at that dose.

    Raises:
        CaseError: a derived structure, which the planner does not make.
    """
    found = []
    for row in protocol:
        weight = row.get("plan_weight")
        if not weight:
            continue
        structure = row["structure"]
        if not _DRAWN.match(structure) or _DERIVED.search(structure):
            raise CaseError(f"constraint on {structure}: plan_weight wants a drawn structure or one of {list(TARGETS)}")
        objective = {"structure": "Target" if structure in TARGETS else structure, "weight": weight,
                     "kind": "max" if row["direction"] == "<=" else "min", "level": TARGETS.get(structure)}
        limit = _dose_limit(row)
        objective["dose_share" if limit.is_share else "dose_gy"] = limit.value
        found.append(objective)
    return found


def _limit(limit: Any) -> Limit:
    match = _SHARE.match(limit) if isinstance(limit, str) else None
    if match:
        return Limit(float(match[1]) / 100, True)
    try:
        return Limit(float(limit), False)
    except (TypeError, ValueError) as error:
        raise CaseError(f"limit {limit!r}; expected a number, or a text like '95%Rx'") from error


def _dose_limit(row: Mapping[str, Any]) -> Limit:
    """The dose a row is about: its limit, or the dose at which it limits a volume."""
    if at := _AT_DOSE.match(row["metric"]):
        return Limit(float(at[1]) / 100, True) if at[2] == "%" else Limit(float(at[1]), False)
    limit = _limit(row["limit"])
    return Limit(limit.value / 100, True) if row["metric"].endswith("[%]") else limit
