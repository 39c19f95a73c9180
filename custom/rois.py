"""Any ROI name -> its TG-263 name (AAPM TG-263, 2018), by the rows of ``bundle/configs/roi_aliases.json``.

Targets (PTV, CTV, GTV, ITV) are not rows: they follow one pattern, whose number is a dose (``PTV70``, ``PTV 50.4``,
``PTV4140``) unless it is too small to be one (``PTV_1``). Planning aids (``Cord +0.3cm``, ``Larynx-PTV``, ``zRing``)
are recognised as such and do not stand for the organ.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from custom.case import CaseError
from custom.places import bundle_folder

__all__ = ["RoiAssignment", "RoiMatch", "RoiTable", "assign_rois", "default_table_path", "mirror_order"]

SIDES = {"L": {"l", "lt", "left", "gauche", "g", "li"}, "R": {"r", "rt", "right", "droit", "droite", "d", "re"}}
LEVEL_WORDS = {
    "high": "High", "hi": "High", "mid": "Mid", "med": "Mid", "int": "Mid", "intermediate": "Mid", "medium": "Mid",
    "low": "Low", "lo": "Low",
}
UNITS = {"gy", "cgy"}
LOWEST_BARE_GY, LOWEST_BARE_CGY, HIGHEST_GY = 20.0, 1000, 100.0

_TARGET = re.compile(r"^(s?ptv|i?ctv|i?gtv|itv)s?(.*)$", re.IGNORECASE)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_FRACTIONATED = re.compile(r"(?<!\d)(\d{1,2}(?:\.\d+)?) ?gy ?x ?(\d{1,2})\b|(?<!\d)(\d{3,4})x(\d{1,2})\b")
_IN_CGY = re.compile(r"(?<![\d.])(\d{3,5}) ?cgy|(?<![\d.])(\d{4})(?![\d.])")
_IN_GY = re.compile(r"(?<![\d.])(\d{1,3}(?:[. ]\d{1,2})?) ?gy")
_BARE_GY = re.compile(r"(?<![\d.])(\d{2}(?:\.\d{1,2})?)(?![\d.])")


@dataclass(frozen=True)
class RoiMatch:
    """What one ROI name means.

    Args:
        raw: the name as the file has it.
        name: TG-263 name, or None when the name is not recognised. For a helper: of what it derives.
        is_helper: a planning aid, which does not stand for ``name``.
        is_target: PTV, CTV, GTV or ITV.
        dose_gy: dose in a target's name.
        extra: words of the name that say nothing known; fewer is a closer match.
    """

    raw: str
    name: str | None
    is_helper: bool = False
    is_target: bool = False
    dose_gy: float | None = None
    extra: int = 0


@dataclass(frozen=True)
class RoiAssignment:
    """Which ROI stands for which structure.

    Args:
        index: TG-263 name -> position in the list of raw names.
        dose_gy: target name -> dose in its name, or None.
        notes: sentences for the user: unrecognised names, helpers, several candidates.
    """

    index: dict[str, int] = field(default_factory=dict)
    dose_gy: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def targets(self) -> list[str]:
        """Names of all targets: PTVs, CTVs, GTVs."""
        return list(self.dose_gy)


def default_table_path() -> Path:
    """``configs/roi_aliases.json`` of the bundle.

    Raises:
        CaseError: when it is not there.
    """
    path = bundle_folder() / "configs" / "roi_aliases.json"
    if not path.is_file():
        raise CaseError(f"no roi_aliases.json; looked for {path}; give the path of the table")
    return path


def normalise(name: str) -> str:
    """Accents stripped, CamelCase split, lower case, separators to single spaces; dots between digits stay."""
    name = name.strip().replace("œ", "oe").replace("Œ", "OE")
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = _CAMEL.sub(" ", plain).lower()
    plain = re.sub(r"(?<=\d),(?=\d)", ".", plain)
    plain = re.sub(r"(?<!\d)\.|\.(?!\d)|[^a-z0-9.]", " ", plain)
    return " ".join(plain.split())


class RoiTable:
    """The rows of an alias table, ready to match.

    Args:
        path: another table than the bundle's own.

    Raises:
        CaseError: when the table cannot be read or a row is malformed.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else default_table_path()
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))["rows"]
            self.organs = [(r["name"], re.compile("|".join(f"(?:{m})" for m in r["match"])))
                           for r in rows if "name" in r]
            words = [m for r in rows if r.get("helper") == "words" for m in r["match"]]
            patterns = [m for r in rows if r.get("helper") == "patterns" for m in r["match"]]
        except (OSError, ValueError, KeyError, TypeError, re.error) as error:
            raise CaseError(f"{self.path}: cannot be used as ROI alias table ({error!r}); expected "
                            '{"rows": [{"name": ..., "match": [...]}, ...]}') from error
        self.helper_words = re.compile(rf"\b(?:{'|'.join(words)})\b") if words else re.compile(r"(?!)")
        self.helper_patterns = [re.compile(p if p.startswith("^z") else f"(?i:{p})") for p in patterns]

    def match(self, raw: str) -> RoiMatch:
        """Tell what an ROI name means."""
        raw_text = raw.strip()
        found = _TARGET.match(raw_text)
        if found:
            return self._match_target(raw, found)
        text = normalise(raw_text)
        organ = self._organ(text)
        pattern = next((p for p in self.helper_patterns if p.search(raw_text)), None)
        if organ is not None and pattern is None:
            return RoiMatch(raw, organ)
        if pattern is None and not self.helper_words.search(text):
            return RoiMatch(raw, None)
        base = raw_text
        for p in self.helper_patterns:
            cut = p.search(base)
            if cut:  # what stands before the mark ("Larynx-PTV"), or behind a leading one ("zLarynx")
                base = base[1:] if cut.start() == 0 and p.pattern.startswith(("^", "(?i:^")) else base[:cut.start() + 1]
        base = " ".join(self.helper_words.sub(" ", normalise(base)).split())
        return RoiMatch(raw, self._organ(base), is_helper=True)

    def _organ(self, text: str) -> str | None:
        """TG-263 name of a normalised organ name, or None."""
        for side, rest in _side_readings(text):
            for name, pattern in self.organs:
                sided = ("{side}" in name) == (side is not None)
                if sided and (pattern.fullmatch(rest) or pattern.fullmatch(rest.replace(" ", ""))):
                    return name.format(side=side)
        return None

    def _match_target(self, raw: str, found: re.Match) -> RoiMatch:
        kind, rest = found.group(1).upper(), found.group(2)
        text = normalise(rest)
        # the planning-aid patterns look behind the target's own prefix: "PTV_70" is no "_" helper, "PTV70-CTV" is
        helper = kind.startswith("S") or bool(self.helper_words.search(text)) or bool(
            re.search(r"(-|\bnot|\bminus) *(s?ptv|ctv|gtv|itv)", rest, re.IGNORECASE)
        ) or bool(re.search(r"[+-] *\d+([.,]\d+)? *[cm]m", rest, re.IGNORECASE)) or "~" in rest
        kind = kind.removeprefix("S")
        dose_gy, text = _dose_in(text)
        words = [w for w in self.helper_words.sub(" ", text).split() if w not in UNITS]
        level = next((LEVEL_WORDS[w] for w in words if w in LEVEL_WORDS), None)
        extra = [w for w in words if w not in LEVEL_WORDS]
        if dose_gy is not None:
            name = f"{kind}_{round(dose_gy * 100):04d}"
        elif level is not None:
            name = f"{kind}_{level}"
        else:
            spelt = {w.lower(): w for w in re.findall(r"[A-Za-z0-9.]+", _CAMEL.sub(" ", rest))}
            name = "_".join([kind, *(spelt.get(w, w).replace(".", "_") for w in extra)])
        return RoiMatch(raw, name, helper, True, dose_gy, len(extra))


def _side_readings(text: str):
    """``(side or None, text without it)``, the likeliest first."""
    words = text.split()
    for position in [len(words) - 1, *range(len(words) - 1)]:
        for side, tokens in SIDES.items():
            if words and words[position] in tokens:
                yield side, " ".join(words[:position] + words[position + 1:])
    yield None, text
    if len(words) == 1:  # "lparotid", "parotidr"
        for side, token in (("L", "l"), ("R", "r")):
            for prefix in (f"{token}t", token):
                if text.startswith(prefix):
                    yield side, text[len(prefix):]
            if text.endswith(token):
                yield side, text[:-1]


def _dose_in(text: str) -> tuple[float | None, str]:
    """Dose (Gy) in a target's normalised name, and the name without it."""
    for pattern in (_FRACTIONATED, _IN_CGY, _IN_GY, _BARE_GY):
        found = pattern.search(text)
        if not found:
            continue
        values = [float(v.replace(" ", ".")) for v in found.groups() if v]
        if pattern is _FRACTIONATED:
            gy = values[0] * values[1] / (100 if found.group(3) else 1)
        else:
            gy = values[0] / (100 if pattern is _IN_CGY else 1)
        lowest = {_BARE_GY: LOWEST_BARE_GY, _IN_CGY: LOWEST_BARE_CGY / 100}.get(pattern, 1.0)
        if lowest <= gy <= HIGHEST_GY:
            return gy, " ".join((text[:found.start()] + " " + text[found.end():]).split())
    return None, text


def assign_rois(
    raw_names: Sequence[str], table: RoiTable | None = None, roi_map: Mapping[str, str | None] | None = None
) -> RoiAssignment:
    """Choose one ROI for every structure; what is ambiguous or unknown goes to the notes.

    Args:
        raw_names: names of the non-empty ROIs, as the file has them.
        table: alias table; the bundle's own by default.
        roi_map: the user's ROI name -> TG-263 name, which wins; None or "" leaves the ROI out.

    Raises:
        CaseError: when two target ROIs carry the very same name.
    """
    table = table or RoiTable()
    result = RoiAssignment()
    taken = _apply_user_map(raw_names, dict(roi_map or {}), table, result)
    matches = {i: table.match(raw) for i, raw in enumerate(raw_names) if i not in taken}
    candidates: dict[str, list[int]] = {}
    for i, match in matches.items():
        if match.name is not None and not match.is_helper:
            candidates.setdefault(match.name, []).append(i)
    if not any(name.startswith("PTV") for name in [*candidates, *result.dose_gy]):
        _fall_back_to_helper_targets(matches, candidates, result)
    for name, indices in candidates.items():
        _choose(name, indices, matches, result)
    used = set(result.index.values()) | taken
    helpers = [m.raw for i, m in matches.items() if m.is_helper and i not in used]
    unknown = [m.raw for m in matches.values() if m.name is None and not m.is_helper]
    if unknown:
        result.notes.append(f"ROIs not recognised, left out: {', '.join(unknown)}; name them in roi_map to use them")
    if helpers:
        result.notes.append(f"planning aids, left out: {', '.join(helpers)}")
    for m in matches.values():
        if m.is_helper and not m.is_target and m.name and m.name not in result.index:
            result.notes.append(f"{m.name} is absent; only the derived {m.raw!r} is there (roi_map can name it)")
    return result


def _apply_user_map(raw_names: Sequence[str], roi_map: dict, table: RoiTable, result: RoiAssignment) -> set[int]:
    """Enter the user's own choices; returns the positions they decide on."""
    taken: set[int] = set()
    lowered = [raw.strip().lower() for raw in raw_names]
    for raw, name in roi_map.items():
        exact = [i for i, r in enumerate(raw_names) if r == raw]
        indices = exact or [i for i, r in enumerate(lowered) if r == raw.strip().lower()]
        if not indices:
            result.notes.append(f"roi_map names {raw!r}, which is not among the ROIs")
            continue
        taken.update(indices)
        if not name:
            continue
        if len(indices) > 1 or name in result.index:
            result.notes.append(f"roi_map: several ROIs for {name}; {raw_names[indices[0]]!r} is used")
        result.index[name] = indices[0]
        match = table.match(name)
        if match.is_target:
            result.dose_gy[name] = match.dose_gy
    return taken


def _fall_back_to_helper_targets(matches: dict[int, RoiMatch], candidates: dict, result: RoiAssignment) -> None:
    """Without any plain PTV, derived ones (``PTV_Eval``, ``PTVHighOPT``) stand in, with a note."""
    for i, match in matches.items():
        if match.is_helper and match.is_target and match.name.startswith("PTV"):
            candidates.setdefault(match.name, []).append(i)
            result.notes.append(f"no plain PTV; the derived {match.raw!r} is used as {match.name}")


def _choose(name: str, indices: list[int], matches: dict[int, RoiMatch], result: RoiAssignment) -> None:
    """Enter the closest of several ROIs for one structure; equally close targets are all kept."""
    if name in result.index:
        result.notes.append(f"{name}: roi_map decides; not used: {', '.join(matches[i].raw for i in indices)}")
        return
    first = matches[indices[0]]
    best = min(matches[i].extra for i in indices)
    close = [i for i in indices if matches[i].extra == best]
    if first.is_target:
        raws = [matches[i].raw for i in close]
        if len(set(raws)) < len(raws):
            raise CaseError(f"two target ROIs carry the same name {raws[0]!r} (ROIs {[i + 1 for i in close]} of the "
                            "structure set); rename or delete one of them")
        for n, i in enumerate(close):
            entry = name if n == 0 else f"{name}_{n + 1}"
            result.index[entry], result.dose_gy[entry] = i, matches[i].dose_gy
    else:
        close = close[:1]
        result.index[name] = close[0]
    if len(indices) > 1:
        chosen = ", ".join(repr(matches[i].raw) for i in close)
        all_of_them = ", ".join(repr(matches[i].raw) for i in indices)
        result.notes.append(f"{name}: several candidates ({all_of_them}); used: {chosen}")


def mirror_order(names: Sequence[str], pairs: Sequence[Sequence[str]]) -> list[int]:
    """Index of what takes each name's place in the mirror.

    Args:
        names: of channels, or of structures.
        pairs: names that change places. ``("has_Parotid_L", "has_Parotid_R")`` tells so of the structures, too.
    """
    names = list(names)
    order = list(range(len(names)))
    for pair in pairs:
        places = [[i for i, name in enumerate(names) if asked == name or asked.endswith(f"_{name}")] for asked in pair]
        if all(len(place) == 1 for place in places):
            (a,), (b,) = places
            order[a], order[b] = b, a
    return order
