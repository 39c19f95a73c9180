"""Which DICOM files lie in a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydicom.config import disable_value_validation
from pydicom.filereader import read_partial
from pydicom.tag import Tag

from custom.io.dataset import is_bounded

__all__ = ["DicomFile", "scan_dicom"]

NOT_DICOM = {".csv", ".gz", ".html", ".jpg", ".json", ".md", ".nii", ".npy", ".npz", ".nrrd", ".pdf", ".png", ".py",
             ".txt", ".xlsx", ".xml", ".zip"}
# SOP class and UID, modality, series, frame of reference, patient
TAGS = [0x00080016, 0x00080018, 0x00080060, 0x0020000E, 0x00200052, 0x00100020]


@dataclass(frozen=True)
class DicomFile:
    """Identity of one DICOM file."""

    path: Path
    sop_class: str
    sop_uid: str
    modality: str
    series_uid: str
    frame_uid: str
    patient_id: str = ""


def scan_dicom(folder: Path, damaged: list[Path] | None = None) -> list[DicomFile]:
    """Every DICOM file under ``folder``, in a fixed order; other files and hidden ones are skipped.

    Args:
        damaged: files that claim to be DICOM, by their name or first bytes, and cannot be identified are added here.
    """
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(d for d in folders if not d.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith(".") or name.upper() == "DICOMDIR" or path.suffix.lower() in NOT_DICOM:
                continue
            entry = _identify(path)
            if entry is not None:
                found.append(entry)
            elif damaged is not None and _claims_dicom(path):
                damaged.append(path)
    return found


def _claims_dicom(path: Path) -> bool:
    if path.suffix.lower() == ".dcm":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _identify(path: Path) -> DicomFile | None:
    if not is_bounded(path):
        return None
    try:
        with path.open("rb") as file, disable_value_validation():
            header = read_partial(file, stop_when=lambda tag, vr, length: tag > max(TAGS),
                                  specific_tags=[Tag(t) for t in TAGS], force=path.suffix.lower() == ".dcm")
            values = [str(header[t].value or "") if t in header else "" for t in TAGS]
    except Exception:  # whatever is wrong with it: no DICOM file that can be identified
        return None
    return DicomFile(path, *values) if values[0] else None
