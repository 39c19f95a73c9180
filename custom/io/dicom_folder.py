"""A DICOM folder, nested or mixed -> one case: CT + RTSTRUCT, and RTPLAN and RTDOSE where they are there.

``case.source["references"]`` holds what an RTDOSE of the same patient has to repeat, under DICOM keywords and as plain
strings and numbers: PatientName, PatientID, PatientBirthDate, PatientSex, StudyInstanceUID, StudyDate, StudyTime,
StudyID, StudyDescription, AccessionNumber, ReferringPhysicianName, FrameOfReferenceUID, PositionReferenceIndicator,
PatientPosition; RTPlanSOPInstanceUID and RTPlanLabel where a plan came along; RTStructureSetSOPInstanceUID,
PrescriptionGy, NumberOfFractions; CTSeriesInstanceUID and, in the order of ``k``, CTSOPInstanceUIDs.

``case.source["fine_masks"]`` holds small structures on finer pixels, for ``custom.dosimetry.partial``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from custom.case import BODY, Case, CaseError, Grid, resample
from custom.io.consistency import check_isocentres, check_same_frame, check_same_patient
from custom.io.course import (
    ReadOptions,
    beams_by_name,
    body_from_ct,
    case_name,
    check_dose,
    check_hu,
    default_isocenter_mm,
    guess_site,
    prescribe,
    technique_of,
)
from custom.io.ct import CT_SOP_CLASS, ENHANCED_CT_SOP_CLASS, CtSeries, read_ct
from custom.io.masks import BoxedMasks
from custom.io.rtdose import RTDOSE_SOP_CLASS, combine_doses, read_rtdose
from custom.io.rtplan import ION_PLAN_SOP_CLASS, RTPLAN_SOP_CLASS, Plan, read_rtplan
from custom.io.rtstruct import (
    RTSTRUCT_SOP_CLASS,
    StructureSet,
    rasterise,
    rasterise_finely,
    read_rtstruct,
    rt_utils_mask,
)
from custom.io.scan import DicomFile, scan_dicom
from custom.rois import RoiAssignment, assign_rois

__all__ = ["DicomFile", "read_dicom", "scan_dicom"]

DEFAULT_BEAMS = {"VMAT": "vmat2", "IMRT": "imrt9"}
KEPT_INSIDE = 0.5
LEVELS_UP = 3  # folders in which the CT of an RTSTRUCT file is looked for: its own, and two above
MAX_LOST_TARGET = 0.01
_VALID = {
    "StudyDate": r"\d{8}", "PatientBirthDate": r"\d{8}", "StudyTime": r"\d{2,6}(\.\d{1,6})?", "PatientSex": "[MFO]",
    "StudyID": r"[^\\]{1,16}", "AccessionNumber": r"[^\\]{1,16}",
}


def read_dicom(path: str | Path, options: ReadOptions | None = None) -> Case:
    """Read the one study under ``path``.

    Args:
        path: a folder, searched to any depth, or an RTSTRUCT file whose folder (or the one above) holds the rest.
        options: what the user tells.

    Raises:
        CaseError: when there is no CT, no RTSTRUCT, or more than one that fits.
    """
    path, options = Path(path), options or ReadOptions()
    files = _files_around(path)
    notes: list[str] = []
    plans = _read_plans(files, notes)
    structures = _choose_structures(path, files, plans)
    plan = _choose_plan(plans, structures, notes)
    ct = read_ct([f.path for f in _choose_ct_series(path, files, structures, notes)])
    _check_together(ct, structures, plan, notes)
    notes += ct.notes + structures.notes + (plan.notes if plan else [])

    rois = [r for r in structures.rois if r.contours]
    names = [r.name for r in rois]
    chosen = assign_rois(names, options.table, options.roi_map)
    plan_gy = _plan_prescription(plan, structures, chosen)
    notes += chosen.notes
    levels, more = _prescribe(structures, names, chosen, plan_gy, options)
    notes += more
    masks = BoxedMasks(ct.grid.shape)
    for name, i in chosen.index.items():
        masks.add(name, _mask(structures, rois[i], ct, options.mask_engine, notes, name in levels))
    exact = options.mask_engine == "exact"
    fine = {name: rasterise_finely(rois[i], ct.grid, masks[name]) for name, i in chosen.index.items() if exact}
    if BODY not in masks:
        masks.add(BODY, _body(rois, ct, [masks[target] for target in levels], notes))
    check_hu(ct.hu, masks[BODY], path)
    beams = _beams(plan, options, masks, levels, ct.grid, notes)
    check_isocentres(beams, masks[BODY], ct.grid, plan.path if plan else path, notes)
    site = options.site
    if site is None:
        site, note = guess_site(masks)
        notes += [note] if note else []
    dose_gy, dose_grid = _dose(files, plan, ct, notes)
    return Case(
        name=case_name(path), grid=ct.grid, ct_hu=ct.hu, masks=masks, prescription_gy=levels, beams=beams,
        technique=options.technique or technique_of(beams), site=site, dose_gy=dose_gy, dose_grid=dose_grid,
        source={"format": "dicom", "path": str(path), "notes": list(dict.fromkeys(notes)),
                "fine_masks": {name: found for name, found in fine.items() if found is not None},
                "references": _references(ct, structures, plan, max(levels.values()))},
    )


def _check_together(ct: CtSeries, structures: StructureSet, plan: Plan | None, notes: list[str]) -> None:
    objects = {ct.files[0]: ct.header, structures.path: structures.dataset}
    if plan is not None:
        objects[plan.path] = plan.dataset
        check_same_frame(plan.path, str(plan.dataset.get("FrameOfReferenceUID") or ""),
                         str(ct.header.get("FrameOfReferenceUID") or ""))
    check_same_patient(objects, notes)
    _check_contours_hit(structures, ct.grid)


def _prescribe(structures: StructureSet, names: list[str], chosen: RoiAssignment, plan_gy, options: ReadOptions):
    """Prescription by target, and notes; where there is none, the error also names the ROIs without contours."""
    try:
        return prescribe(chosen, names, options.prescription_gy, plan_gy, options.table)
    except CaseError as error:
        empty = [r.name for r in structures.rois if not r.contours]
        more = f" (ROIs without a closed contour: {', '.join(map(repr, empty))})" if empty else ""
        raise CaseError(f"{structures.path}: {error}{more}") from error


def _mask(structures: StructureSet, roi, ct: CtSeries, engine: str, notes: list[str], is_target: bool) -> np.ndarray:
    if engine == "rt_utils":
        return rt_utils_mask(structures, roi, ct.files, ct.grid)
    return rasterise(roi, ct.grid, notes, max_lost=MAX_LOST_TARGET if is_target else 1.0)


def _files_around(path: Path) -> list[DicomFile]:
    """Files of the folder; for an RTSTRUCT file those of the nearest folder above that has a CT, or other patients."""
    folder = path if path.is_dir() else path.parent
    for _ in range(1 if path.is_dir() else LEVELS_UP):
        damaged: list[Path] = []
        files = scan_dicom(folder, damaged)
        if any(f.sop_class == CT_SOP_CLASS for f in files) or len({f.patient_id for f in files if f.patient_id}) > 1:
            break
        folder = folder.parent
    if damaged:
        raise CaseError(f"{damaged[0]}: empty, cut short, deflated or no DICOM file at all ({len(damaged)} such "
                        "file(s)); expected only whole DICOM files. Copy it anew, or delete it")
    return files


def _read_plans(files: Sequence[DicomFile], notes: list[str]) -> list[Plan]:
    ions = [f.path.name for f in files if f.sop_class == ION_PLAN_SOP_CLASS]
    if ions:
        notes.append(f"RT Ion Plan left out, only photon plans are read: {', '.join(ions)}")
    return [read_rtplan(f.path) for f in files if f.sop_class == RTPLAN_SOP_CLASS]


def _choose_structures(path: Path, files: Sequence[DicomFile], plans: Sequence[Plan]) -> StructureSet:
    found = [f for f in files if f.sop_class == RTSTRUCT_SOP_CLASS]
    if path.is_file():
        return read_rtstruct(path)
    if len(found) > 1:
        wanted = {p.structure_set_uid for p in plans}
        referenced = [f for f in found if f.sop_uid in wanted]
        found = referenced if len(referenced) == 1 else found
    if not found:
        kinds = sorted({f.modality or f.sop_class for f in files})
        raise CaseError(f"{path}: no RTSTRUCT; found {', '.join(kinds) or 'no DICOM file'}. "
                        "A case needs a CT series and an RTSTRUCT")
    if len(found) > 1:
        raise CaseError(f"{path}: {len(found)} RTSTRUCTs ({', '.join(f.path.name for f in found)}); "
                        "give the path of the one to use")
    return read_rtstruct(found[0].path)


def _choose_plan(plans: Sequence[Plan], structures: StructureSet, notes: list[str]) -> Plan | None:
    """The plan made on these structures; with beams."""
    usable = [p for p in plans if p.beams]
    notes += [f"{p.path.name}: no treating photon beam, left out" for p in plans if not p.beams]
    own = [p for p in usable if p.structure_set_uid == structures.sop_uid]
    if len(own) > 1:
        raise CaseError(f"{len(own)} RTPLANs on the same structures ({', '.join(p.path.name for p in own)}); "
                        "keep the one to use")
    if own:
        return own[0]
    if len(usable) == 1 and not usable[0].structure_set_uid:
        return usable[0]
    same_frame = [p for p in usable if str(p.dataset.get("FrameOfReferenceUID") or "") in structures.frame_uids]
    if len(usable) == len(same_frame) == 1:
        notes.append(f"{usable[0].path.name} refers to another RTSTRUCT in the same frame of reference; used")
        return usable[0]
    notes += [f"{p.path.name} belongs to another RTSTRUCT, left out" for p in usable]
    return None


def _choose_ct_series(path: Path, files: Sequence[DicomFile], structures: StructureSet,
                      notes: list[str]) -> list[DicomFile]:
    """The CT series the structures were drawn on."""
    if any(f.sop_class == ENHANCED_CT_SOP_CLASS for f in files) and not any(f.sop_class == CT_SOP_CLASS for f in files):
        raise CaseError(f"{path}: an enhanced multi-frame CT; convert it to single-frame CT images "
                        "(for example with dcm2dcm or the scanner's export)")
    series: dict[str, list[DicomFile]] = {}
    for f in files:
        if f.sop_class == CT_SOP_CLASS:
            series.setdefault(f.series_uid, []).append(f)
    if not series:
        kinds = sorted({f.modality or f.sop_class for f in files})
        raise CaseError(f"{path}: no CT image; found {', '.join(kinds)}. Add the planning CT the RTSTRUCT was drawn on")
    frames = structures.frame_uids
    referenced = [uid for uid in series if uid in structures.series_uids]
    if len(referenced) == 1:
        found = referenced
    else:
        found = [uid for uid, fs in series.items() if not frames or not fs[0].frame_uid or fs[0].frame_uid in frames]
        if found and structures.series_uids:
            notes.append("the RTSTRUCT names another image series; the CT in its frame of reference is used")
    if not found:
        others = ", ".join(sorted({f[0].frame_uid for f in series.values()}))
        raise CaseError(f"{path}: no CT series in the frame of reference of {structures.path.name} "
                        f"({', '.join(sorted(frames))}); found {others}. "
                        "Add the CT the structures were drawn on")
    if len(found) > 1:
        listed = "; ".join(f"{uid} ({len(series[uid])} images)" for uid in found)
        raise CaseError(f"{path}: several CT series fit {structures.path.name}: {listed}. Keep one of them")
    if len(series) > 1:
        notes.append(f"{len(series) - 1} other CT series left out")
    chosen = series[found[0]]
    if frames and chosen[0].frame_uid and chosen[0].frame_uid not in frames:
        raise CaseError(f"{path}: the CT {found[0]} is referenced by {structures.path.name} but lies in another frame "
                        f"of reference ({chosen[0].frame_uid}); export both anew")
    if not frames or not chosen[0].frame_uid:
        notes.append("the frame of reference is not named in both CT and RTSTRUCT; taken as the same")
    return chosen


def _check_contours_hit(structures: StructureSet, grid: Grid) -> None:
    contours = [c for r in structures.rois for c in r.contours]
    if not contours:
        raise CaseError(f"{structures.path}: no ROI has a closed contour; expected a target and organs")
    k = grid.to_index(np.array([c.mean(axis=0) for c in contours]))[:, 2]
    inside = float(np.mean((k >= -0.5) & (k <= grid.shape[2] - 0.5)))
    if inside < KEPT_INSIDE:
        raise CaseError(f"{structures.path}: only {100 * inside:.0f} % of the contours lie in the slices of the CT; "
                        "the structures belong to another image")


def _plan_prescription(plan: Plan | None, structures: StructureSet, chosen: RoiAssignment):
    """The plan's prescription by structure name; ROIs only the plan knows as targets join the structures."""
    rois = [r for r in structures.rois if r.contours]
    if plan is None or not isinstance(plan.prescription_gy, dict):
        return plan.prescription_gy if plan else None
    by_name = {}
    for number, gy in plan.prescription_gy.items():
        position = next((i for i, r in enumerate(rois) if r.number == number), None)
        if position is None:
            empty = [r.name for r in structures.rois if r.number == number]
            if empty:
                raise CaseError(f"{plan.path}: prescribes {gy:g} Gy to {empty[0]!r}, which has no closed contour in "
                                f"{structures.path.name}; draw it, or delete the dose reference")
            chosen.notes.append(f"the RTPLAN prescribes {gy:g} Gy to ROI {number}, which {structures.path.name} lacks")
            continue
        name = next((n for n, i in chosen.index.items() if i == position), None)
        if name is None:
            name = plain = re.sub(r"[^A-Za-z0-9+-]+", "_", rois[position].name).strip("_") or f"ROI_{number}"
            while name in chosen.index:
                name = f"{plain}_{number}" if name == plain else f"{name}_"
            chosen.index[name] = position
            chosen.notes.append(f"{rois[position].name!r} is a target of the RTPLAN and used as {name}")
        by_name[name] = gy
    return by_name or max(plan.prescription_gy.values())


def _body(rois, ct: CtSeries, targets: list[np.ndarray], notes: list[str]) -> np.ndarray:
    external = [r for r in rois if r.kind == "EXTERNAL"]
    if len(external) == 1:
        notes.append(f"Body: the ROI {external[0].name!r} of type EXTERNAL")
        return rasterise(external[0], ct.grid, notes)
    found = "several external contours" if external else "no external contour"
    notes.append(f"{found}: Body is taken from the CT (above -400 HU, largest part, holes filled)")
    body, target = body_from_ct(ct.hu), np.logical_or.reduce(targets)
    outside_cc = float((target & ~body).sum() * ct.grid.voxel_cc)
    if outside_cc > 0:
        notes.append(f"{outside_cc:.1f} cc of the targets lie outside the Body taken from the CT, as in a lung that "
                     "the image cuts; they are counted to it")
    return body | target


def _beams(plan: Plan | None, options: ReadOptions, masks, levels, grid: Grid, notes: list[str]):
    if plan is not None:
        return plan.beams
    name = options.default_beams or DEFAULT_BEAMS.get(options.technique or "IMRT", "imrt9")
    notes.append(f"no RTPLAN: default beams {name!r} around the centre of the targets")
    return beams_by_name(name, default_isocenter_mm(masks, levels, grid))


def _dose(files: Sequence[DicomFile], plan: Plan | None, ct: CtSeries, notes: list[str]):
    """Reference dose on the CT's grid, and the grid it was stored on."""
    doses = [read_rtdose(f.path) for f in files if f.sop_class == RTDOSE_SOP_CLASS]
    others = {f.sop_uid for f in files if f.sop_class == RTPLAN_SOP_CLASS and plan and f.sop_uid != plan.sop_uid}
    foreign = [d.path.name for d in doses if d.plan_uid in others]
    if len(foreign) == len(doses) > 0:
        notes.append(f"{', '.join(foreign)}: of another RTPLAN, left out; no RTDOSE is the plan's")
        return None, None
    if not doses:
        return None, None
    dose, more = combine_doses(doses, plan.sop_uid if plan else "", plan.fractions if plan else None)
    notes += more
    check_same_frame(dose.path, dose.frame_uid, str(ct.header.get("FrameOfReferenceUID") or ""))
    check_dose(dose.gy, dose.path)
    return resample(dose.gy, dose.grid, ct.grid), dose.grid


def _references(ct: CtSeries, structures: StructureSet, plan: Plan | None, highest_gy: float) -> dict[str, Any]:
    header = ct.header
    out: dict[str, Any] = {}
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
                    "StudyTime", "StudyID", "StudyDescription", "AccessionNumber", "ReferringPhysicianName",
                    "FrameOfReferenceUID", "PositionReferenceIndicator"):
        text = str(header.get(keyword) or "").strip()
        valid = re.fullmatch(_VALID.get(keyword, r"[^\\]{1,64}"), text)  # values that break their VR are not passed on
        out[keyword] = text if valid else ""
    method = header.get("DeidentificationMethod")
    if header.get("PatientIdentityRemoved") == "YES" and method:
        out["PatientIdentityRemoved"] = "YES"
        out["DeidentificationMethod"] = str(method) if isinstance(method, str) else [str(m) for m in method]
    if not out["FrameOfReferenceUID"]:
        out["FrameOfReferenceUID"] = next(iter(sorted(structures.frame_uids)), "")
    out["RTStructureSetSOPInstanceUID"] = structures.sop_uid
    out["CTSeriesInstanceUID"] = str(header.get("SeriesInstanceUID") or "")
    out["CTSOPInstanceUIDs"] = list(ct.sop_uids)
    out["PrescriptionGy"] = float(highest_gy)
    if plan is not None:
        out["RTPlanSOPInstanceUID"] = plan.sop_uid
        out["RTPlanLabel"] = str(plan.dataset.get("RTPlanLabel") or "")
        out["NumberOfFractions"] = plan.fractions
    return out
