"""What a reader settles after the geometry: prescription, site, default beams, the body."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import ndimage

from custom.case import BODY, Beam, CaseError, Grid, Site, Technique
from custom.rois import RoiAssignment, RoiTable

__all__ = [
    "ARC_STEP_DEG", "ReadOptions", "beams_by_name", "body_from_ct", "case_name", "check_dose", "check_hu",
    "default_isocenter_mm", "guess_site", "prescribe", "technique_of",
]

ARC_STEP_DEG = 15.0
AIR_BELOW_HU = -400.0
LEVELS_AGREE_GY = 0.5
TISSUE_HU = (-850.0, 600.0)
LOWEST_GY, HIGHEST_GY = -0.5, 200.0
GENERIC_FOLDERS = {"ct", "data", "dcm", "dicom", "dicoms", "image", "images", "input", "rtstruct", "scan", "study"}

_ARC_CW = tuple(181.0 + 358.0 * i / 24 for i in range(25))
DEFAULT_BEAMS: dict[str, list[tuple[str, tuple[float, ...]]]] = {
    "imrt9": [(f"G{a:03d}", (float(a),)) for a in range(0, 360, 40)],
    "imrt7": [(f"G{a:03d}", (float(a),)) for a in (0, 51, 103, 154, 206, 257, 309)],
    "vmat1": [("Arc CW", tuple(a % 360.0 for a in _ARC_CW))],
    "vmat2": [("Arc CW", tuple(a % 360.0 for a in _ARC_CW)), ("Arc CC", tuple(a % 360.0 for a in _ARC_CW[::-1]))],
}
LUNG_ROIS = {"Lung_L", "Lung_R", "Lungs", "Heart"}
HEAD_NECK_ROIS = {"Parotid_L", "Parotid_R", "Parotids", "Brainstem", "Larynx", "Bone_Mandible", "Cavity_Oral"}


@dataclass(frozen=True)
class ReadOptions:
    """What the user tells a reader; each entry wins over the files.

    Args:
        prescription_gy: dose by target (its name in the file or TG-263), or one number for the highest target.
        technique: "IMRT" or "VMAT".
        site: "HeadNeck" or "Lung".
        roi_map: ROI name -> TG-263 name, before the alias table; None or "" leaves the ROI out.
        default_beams: name of the beams for a case without an RTPLAN.
        table: ROI alias table; the bundle's own by default.
        mask_engine: "exact" or "rt_utils", for DICOM.

    Raises:
        CaseError: for a value that is none of these.
    """

    prescription_gy: Mapping[str, float] | float | None = None
    technique: str | None = None
    site: str | None = None
    roi_map: Mapping[str, str | None] | None = None
    default_beams: str | None = None
    table: RoiTable = field(default_factory=RoiTable)
    mask_engine: str = "exact"

    def __post_init__(self) -> None:
        allowed = {"technique": (None, Technique.IMRT, Technique.VMAT), "site": (None, Site.HEAD_NECK, Site.LUNG),
                   "default_beams": (None, *DEFAULT_BEAMS), "mask_engine": ("exact", "rt_utils")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise CaseError(f"{name} {getattr(self, name)!r} is unknown; expected one of "
                                f"{', '.join(repr(v) for v in values if v is not None)}")
        levels = self.prescription_gy
        if not isinstance(levels, Mapping):
            levels = {} if levels is None else {"the highest target": levels}
        for name, gy in levels.items():
            if isinstance(gy, bool) or not isinstance(gy, (int, float)) or not 0 < gy < HIGHEST_GY:
                raise CaseError(f"prescription_gy {gy!r} for {name}; expected a dose in Gy from 0 to {HIGHEST_GY:g}")
        if self.roi_map is not None and not isinstance(self.roi_map, Mapping):
            raise CaseError(f"roi_map {self.roi_map!r}; expected a dict of ROI names, as {{'my cord': 'SpinalCord'}}")


def check_hu(ct_hu: np.ndarray, body: np.ndarray, path: str | Path) -> None:
    """Refuse an image whose body cannot be tissue in Hounsfield units: a rescale that is missing or twice applied.

    Raises:
        CaseError: naming the median inside the body.
    """
    low, high = TISSUE_HU
    if not np.isfinite(ct_hu).all():
        raise CaseError(f"{path}: the CT holds values that are not finite; export it anew")
    step = tuple(slice(None, None, max(1, n // 128)) for n in body.shape)  # the median of a part will do
    inside = ct_hu[step][body[step]]
    median = float(np.median(inside)) if inside.size else 0.0
    if not low <= median <= high:
        raise CaseError(f"{path}: the median inside the body is {median:.0f} HU; expected {low:g} to {high:g}. The CT "
                        "is not in Hounsfield units (check its rescale slope and intercept), or is cut short")


def check_dose(dose_gy: np.ndarray, path: str | Path) -> None:
    """Refuse a reference dose that cannot be one.

    Raises:
        CaseError: for values that are not finite, negative or too high.
    """
    if not np.isfinite(dose_gy).all():
        raise CaseError(f"{path}: the dose holds values that are not finite; export it anew")
    if dose_gy.min() < LOWEST_GY or dose_gy.max() > HIGHEST_GY:
        raise CaseError(f"{path}: the dose ranges from {dose_gy.min():.4g} to {dose_gy.max():.4g} Gy; expected 0 to "
                        f"{HIGHEST_GY:g} Gy. Check its units, or remove it")


def beams_by_name(name: str, isocenter_mm) -> tuple[Beam, ...]:
    """The beams of a named default around an isocentre.

    Raises:
        CaseError: for an unknown name.
    """
    if name not in DEFAULT_BEAMS:
        raise CaseError(f"default_beams {name!r} is unknown; expected one of {sorted(DEFAULT_BEAMS)}")
    point = tuple(float(v) for v in isocenter_mm)
    return tuple(Beam(beam, angles, point) for beam, angles in DEFAULT_BEAMS[name])


def technique_of(beams) -> str:
    """VMAT when any beam is an arc, else IMRT."""
    return Technique.VMAT if any(beam.is_arc for beam in beams) else Technique.IMRT


def default_isocenter_mm(masks: Mapping[str, np.ndarray], targets, grid: Grid) -> tuple[float, float, float]:
    """Centre of mass of all targets, LPS mm."""
    union = np.logical_or.reduce([masks[roi] for roi in targets])
    if not union.any():
        raise CaseError(f"the targets {sorted(targets)} are empty: no centre for default beams")
    return tuple(float(v) for v in grid.to_world(ndimage.center_of_mass(union)))


def guess_site(names) -> tuple[str, str | None]:
    """Site from the structures that are there, and a note where they do not tell."""
    names = set(names)
    head_neck, lung = len(names & HEAD_NECK_ROIS), len(names & LUNG_ROIS)
    if head_neck == lung == 0:
        return Site.HEAD_NECK, "site: no structure tells; HeadNeck is assumed (give site to change it)"
    return (Site.HEAD_NECK if head_neck >= lung else Site.LUNG), None


def prescribe(
    rois: RoiAssignment,
    raw_names,
    user: Mapping[str, float] | float | None = None,
    plan_gy: Mapping[str, float] | float | None = None,
    table: RoiTable | None = None,
) -> tuple[dict[str, float], list[str]]:
    """Prescribed dose of every target: the user's, else the plan's, else the one in the target's name.

    A single number is the dose of the highest target. Where it differs from that target's name (one phase of a
    course), the levels in the lower targets' names are scaled alike.

    Args:
        rois: assignment that holds the targets.
        raw_names: ROI names as the file has them, by the positions in ``rois``.
        user: dose by target name (the file's or TG-263), or of the highest target.
        plan_gy: the same from the RTPLAN.

    Returns:
        target -> Gy, and notes.

    Raises:
        CaseError: when nothing tells a dose, or the user names an ROI that is not there.
    """
    notes: list[str] = []
    targets = [t for t in rois.targets if t.startswith("PTV")]
    if not targets:
        targets = _targets_without_ptv(rois)
        if targets:
            notes.append(f"no PTV; the prescription goes to {', '.join(targets)}")
    if isinstance(user, Mapping):
        levels = _levels_of_user(user, rois, raw_names, table)
        given = dict(levels)
        for target in targets:
            if target not in levels and rois.dose_gy.get(target) is not None and given:
                levels[target] = rois.dose_gy[target]
                notes.append(f"prescription of {target}: {levels[target]:g} Gy, from its name")
    elif user is not None:
        levels = _spread(float(user), targets, rois, notes, "the user")
    elif isinstance(plan_gy, Mapping) and plan_gy:
        levels = {t: gy for t, gy in plan_gy.items() if t in rois.index}
        for target, gy in _spread(max(plan_gy.values()), targets, rois, [], "the plan").items():
            levels.setdefault(target, gy)
        notes.append("prescription: from the RTPLAN" + ("" if set(levels) <= set(plan_gy) else " and target names"))
    elif isinstance(plan_gy, (int, float)) and not isinstance(plan_gy, bool):
        levels = _spread(float(plan_gy), targets, rois, notes, "the RTPLAN")
    else:
        levels = {t: rois.dose_gy[t] for t in targets if rois.dose_gy.get(t) is not None}
        if levels:
            listed = ", ".join(f"{t} {gy:g} Gy" for t, gy in levels.items())
            notes.append(f"prescription from the target names: {listed}")
    if not levels:
        found = f"ROIs found: {', '.join(map(repr, raw_names)) or 'none'}"
        if not targets:
            raise CaseError(f"no target among the structures, so no prescription. {found}. Name the target in roi_map, "
                            'as {"Tumor Bed": "PTV"}, and its dose in prescription_gy')
        raise CaseError(f"no prescription: neither given, nor in an RTPLAN, nor in a target's name. {found}. "
                        f"Give prescription_gy, as {{{targets[0]!r}: 70}} or one number")
    left_out = [t for t in targets if t not in levels]
    if left_out:
        notes.append(f"targets without a prescribed dose: {', '.join(left_out)} (give prescription_gy to use them)")
    return dict(sorted(levels.items(), key=lambda item: -item[1])), notes


def _targets_without_ptv(rois: RoiAssignment) -> list[str]:
    """Stand-ins for a PTV: the outermost kind of volume that is there."""
    for kind in ("ITV", "CTV", "GTV", "IGTV", "ICTV"):
        found = [t for t in rois.targets if t.startswith(kind)]
        if found:
            return found
    return []


def _levels_of_user(user: Mapping[str, float], rois: RoiAssignment, raw_names, table: RoiTable | None) -> dict:
    by_raw = {raw_names[i].strip().lower(): name for name, i in rois.index.items()}
    table = table or RoiTable()
    levels = {}
    for asked, gy in user.items():
        name = asked if asked in rois.index else by_raw.get(asked.strip().lower()) or table.match(asked).name
        if name not in rois.index:
            raise CaseError(f"prescription_gy names {asked!r}, which is not there; targets found: "
                            f"{', '.join(rois.targets) or 'none'}; all ROIs: {', '.join(map(repr, raw_names))}")
        levels[name] = float(gy)
    return levels


def _spread(highest_gy: float, targets: list[str], rois: RoiAssignment, notes: list[str], who: str) -> dict[str, float]:
    """Levels of all targets from the dose of the highest one."""
    named = {t: rois.dose_gy[t] for t in targets if rois.dose_gy.get(t) is not None}
    if not named:
        # high before mid before low: only the highest can have this dose when levels are told apart by words
        top = [t for t in targets if re.search(r"_High\b", t)] or targets
        return {t: highest_gy for t in top}
    top_gy = max(named.values())
    scale = 1.0
    if abs(top_gy - highest_gy) > LEVELS_AGREE_GY:
        scale = highest_gy / top_gy
        notes.append(f"prescription: {highest_gy:g} Gy by {who}, {top_gy:g} Gy by the target's name; "
                     f"{who} wins, lower levels are scaled by {scale:.3f}")
    return {t: highest_gy if gy == top_gy else gy * scale for t, gy in named.items()}


def body_from_ct(ct_hu: np.ndarray) -> np.ndarray:
    """Largest connected region denser than -400 HU, holes filled in each ``k`` slice; boolean ``[i, j, k]``."""
    dense = ct_hu > AIR_BELOW_HU
    cross = ndimage.generate_binary_structure(2, 1)[:, :, None]
    opened = ndimage.binary_opening(dense, structure=cross, iterations=2)
    labels, count = ndimage.label(opened if opened.any() else dense)
    if count == 0:
        raise CaseError(f"no body contour, and no voxel of the CT is denser than {AIR_BELOW_HU:g} HU: "
                        "add an EXTERNAL structure or check the rescale slope and intercept")
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    body = labels == sizes.argmax()
    for k in range(body.shape[2]):
        body[:, :, k] = ndimage.binary_fill_holes(body[:, :, k])
    return body


def case_name(path: Path) -> str:
    """A file-system-safe name for the case at ``path``; generic folder names ("dicom") give way to their parent's."""
    path = Path(path).resolve()
    stem = path.name if path.is_dir() else path.stem.removesuffix(".packed")
    while stem.lower() in GENERIC_FOLDERS and path.parent != path:
        path = path.parent
        stem = path.name
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", stem).strip("._") or BODY.lower()
