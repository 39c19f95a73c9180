"""Which cases a folder holds."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pydicom

from custom.case import CaseError
from custom.io.ct import CT_SOP_CLASS, ENHANCED_CT_SOP_CLASS
from custom.io.openkbp import is_openkbp_folder
from custom.io.packed import is_packed_file
from custom.io.rtplan import RTPLAN_SOP_CLASS
from custom.io.rtstruct import RTSTRUCT_SOP_CLASS
from custom.io.scan import DicomFile, scan_dicom

__all__ = ["find_cases", "is_gdp_hmm_file"]

MR_SOP_CLASS, PET_SOP_CLASS = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128"
IMAGES_AND_STRUCTURES = {CT_SOP_CLASS, ENHANCED_CT_SOP_CLASS, MR_SOP_CLASS, PET_SOP_CLASS, RTSTRUCT_SOP_CLASS}


def is_gdp_hmm_file(path: Path) -> bool:
    """True for an ``.npz`` whose one entry is ``arr_0``, and for a damaged one: its reader says so."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist() == ["arr_0.npy"]
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return True


def find_cases(dataset_dir: str | Path) -> list[Path]:
    """Paths of all cases in a folder, each to be given to :func:`custom.io.read_case`; sorted.

    OpenKBP patient folders, GDP-HMM files and packed cases are cases by themselves. A folder is a DICOM case when a CT
    and an RTSTRUCT lie in it, at any depth, and no folder inside holds both; folders above that add files (a plan
    beside the folder of images) and neither another case nor other structures belong to it. Several RTSTRUCTs in one
    such folder are one case each, unless the RTPLANs refer to a single one of them. Folders with images or structures
    of patients who have no such case are listed too: their reader says what is missing.

    Raises:
        CaseError: when there is nothing that could be a case.
    """
    root = Path(dataset_dir)
    if not root.exists():
        raise CaseError(f"{root}: there is no such file or folder")
    if root.is_file() or is_openkbp_folder(root):
        return [root]
    cases: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(d for d in folders if not d.startswith("."))
        here = Path(folder)
        if is_openkbp_folder(here):
            cases.append(here)
            folders[:] = []
            continue
        shown = [here / f for f in sorted(files) if not f.startswith(".")]
        cases += [path for path in shown if is_packed_file(path) or is_gdp_hmm_file(path)]
    dicom = scan_dicom(root)
    cases += _dicom_cases(root, dicom)
    if not cases and dicom:
        return [root]  # its reader says what is missing
    cases += _incomplete(root, dicom, cases)
    if not cases:
        raise CaseError(f"{root}: no case found; expected DICOM (CT + RTSTRUCT), OpenKBP folders, GDP-HMM npz "
                        "files or packed cases")
    return sorted(cases)


def _dicom_cases(root: Path, files: list[DicomFile]) -> list[Path]:
    below: dict[Path, list[DicomFile]] = {}
    for file in files:
        for folder in [file.path.parent, *file.path.parent.parents]:
            below.setdefault(folder, []).append(file)
            if folder == root:
                break
    whole = {folder for folder, inside in below.items() if _is_whole(inside)}
    smallest = sorted(f for f in whole if not any(f in other.parents for other in whole))
    cases: list[Path] = []
    for case in smallest:
        folder = case
        while folder != root:
            folder = folder.parent
            several = sum(folder in other.parents for other in smallest) > 1
            more = _structures(below[folder]) > _structures(below[case])
            if several or more or _patients(below[folder]) != _patients(below[case]):
                break
            if len(below[folder]) > len(below[case]):
                case = folder
        structures = [f for f in below[case] if f.sop_class == RTSTRUCT_SOP_CLASS]
        referenced = _structures_of_plans(below[case])
        alone = len(structures) == 1 or len([s for s in structures if s.sop_uid in referenced]) == 1
        cases += [case] if alone else [s.path for s in structures]
    return cases


def _incomplete(root: Path, files: list[DicomFile], cases: list[Path]) -> list[Path]:
    """The highest folders with images or structures that hold no case and belong to no patient who has one."""
    folders = {case if case.is_dir() else case.parent for case in cases if case.suffix.lower() != ".npz"}
    above = {parent for folder in folders for parent in folder.parents} | {root}
    within = [f for f in files if folders & {f.path.parent, *f.path.parent.parents}]
    patients, inside = _patients(within), {f.path for f in within}
    found: set[Path] = set()
    for file in files:
        folder = file.path.parent
        if file.sop_class not in IMAGES_AND_STRUCTURES or file.patient_id in patients or file.path in inside:
            continue
        while folder not in above and folder.parent not in above:
            folder = folder.parent
        if folder not in above:
            found.add(folder)
    return sorted(found)


def _patients(files: list[DicomFile]) -> set[str]:
    return {file.patient_id for file in files if file.patient_id}


def _structures(files: list[DicomFile]) -> int:
    return sum(f.sop_class == RTSTRUCT_SOP_CLASS for f in files)


def _is_whole(files: list[DicomFile]) -> bool:
    kinds = {f.sop_class for f in files}
    return RTSTRUCT_SOP_CLASS in kinds and bool(kinds & {CT_SOP_CLASS, ENHANCED_CT_SOP_CLASS})


def _structures_of_plans(files: list[DicomFile]) -> set[str]:
    """SOPInstanceUIDs of the RTSTRUCTs that the RTPLANs refer to."""
    uids = set()
    for file in files:
        if file.sop_class == RTPLAN_SOP_CLASS:
            plan = pydicom.dcmread(file.path, specific_tags=["ReferencedStructureSetSequence"], force=True)
            uids |= {str(r.get("ReferencedSOPInstanceUID")) for r in plan.get("ReferencedStructureSetSequence") or []}
    return uids
