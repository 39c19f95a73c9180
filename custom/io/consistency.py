"""Whether the objects of a study belong together: one patient, one study, one frame of reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from custom.case import Beam, CaseError, Grid

__all__ = ["check_isocentres", "check_same_patient", "check_same_frame"]

FAR_MM = 1000.0


def check_same_patient(objects: Mapping[Path, Dataset], notes: list[str]) -> None:
    """Refuse objects of two patients; note those of two studies. The identifiers themselves are not told.

    Args:
        objects: file -> header.

    Raises:
        CaseError: naming two files with different patient ids.
    """
    for keyword in ("PatientID", "StudyInstanceUID"):
        named = [(path, str(header.get(keyword) or "").strip()) for path, header in objects.items()]
        named = [(path, value) for path, value in named if value]
        for path, value in named[1:]:
            if value == named[0][1]:
                continue
            if keyword == "PatientID":
                raise CaseError(f"{path}: another PatientID than {named[0][0].name}; expected the files of one "
                                "patient. Remove the file of the other patient, or de-identify all of them alike")
            notes.append(f"{path.name} belongs to another study than {named[0][0].name}")


def check_same_frame(path: Path, frame_uid: str, expected: str) -> None:
    """Refuse an object in another frame of reference than the CT; an absent one counts as the same.

    Raises:
        CaseError: naming both.
    """
    if frame_uid and expected and frame_uid != expected:
        raise CaseError(f"{path}: lies in frame of reference {frame_uid}, the CT in {expected}; remove the file, or "
                        "export both from one plan")


def check_isocentres(beams: Sequence[Beam], body: np.ndarray, grid: Grid, path: Path, notes: list[str]) -> None:
    """Refuse isocentres far from the CT, note those outside the body's box.

    Raises:
        CaseError: more than a metre outside the image.
    """
    inside = [np.flatnonzero(body.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    low, high = np.array([(line[0] - 1, line[-1] + 1) for line in inside]).T
    for beam in beams:
        index = grid.to_index(np.array(beam.isocenter_mm))
        outside_mm = np.maximum(0, np.maximum(-index, index - np.array(grid.shape) + 1)) * grid.spacing_mm
        if not np.isfinite(outside_mm).all() or outside_mm.max() > FAR_MM:
            raise CaseError(f"{path}: the isocentre of beam {beam.name!r} at {beam.isocenter_mm} mm lies "
                            f"{outside_mm.max():.0f} mm outside the CT; expected one in the patient. Export the plan "
                            "made on this CT")
        if ((index < low) | (index > high)).any():
            notes.append(f"the isocentre of beam {beam.name!r} lies outside the body")
