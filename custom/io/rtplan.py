"""RTPLAN -> beams, technique, prescription (PS3.3 C.8.8.9 to C.8.8.14)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from custom.case import Beam, CaseError
from custom.io.course import ARC_STEP_DEG
from custom.io.dataset import read_dataset, reading

__all__ = ["ION_PLAN_SOP_CLASS", "RTPLAN_SOP_CLASS", "Plan", "read_rtplan", "to_head_first_supine_deg"]

RTPLAN_SOP_CLASS, ION_PLAN_SOP_CLASS = "1.2.840.10008.5.1.4.1.1.481.5", "1.2.840.10008.5.1.4.1.1.481.8"
TREATING = {"TREATMENT", "CONTINUATION", ""}
ARC_TRAVEL_DEG = 1.0

# gantry angle in the frame of a head-first-supine patient = offset + sign * IEC angle: the source stands at
# sin(angle) Xf + cos(angle) Zf of the IEC fixed system (IEC 61217), in which the patient lies as the key says
_FRAMES = {
    "HFS": (0.0, 1.0), "HFP": (180.0, 1.0), "FFS": (0.0, -1.0), "FFP": (180.0, -1.0),
    "HFDL": (-90.0, 1.0), "HFDR": (90.0, 1.0), "FFDL": (-90.0, -1.0), "FFDR": (90.0, -1.0),
}


@dataclass(frozen=True)
class Plan:
    """What the prediction needs of a plan.

    Args:
        beams: treating beams, gantry in the head-first-supine frame.
        techniques: delivery of each beam: "arc", "sliding window", "step and shoot" or "static".
        prescription_gy: ROINumber -> Gy where dose references name an ROI, else the highest target dose, else None.
        fractions: planned number of fractions, or None.
        patient_position: "HFS", ...
        structure_set_uid: SOPInstanceUID of its RTSTRUCT, or "".
        notes: what the user should know.
    """

    path: Path
    dataset: Dataset
    beams: tuple[Beam, ...]
    techniques: tuple[str, ...]
    prescription_gy: Mapping[int, float] | float | None
    fractions: int | None
    patient_position: str
    structure_set_uid: str
    notes: list[str] = field(default_factory=list)

    @property
    def sop_uid(self) -> str:
        return str(self.dataset.SOPInstanceUID)


def to_head_first_supine_deg(gantry_deg: float, patient_position: str) -> float:
    """IEC gantry angle of a patient in any position -> the angle that looks alike on a head-first-supine patient.

    Raises:
        CaseError: for an unknown patient position.
    """
    if patient_position not in _FRAMES:
        raise CaseError(f"patient position {patient_position!r}; expected one of {sorted(_FRAMES)}")
    offset, sign = _FRAMES[patient_position]
    return round((offset + sign * gantry_deg) % 360.0, 6) % 360.0


def read_rtplan(path: str | Path) -> Plan:
    """Read a photon (or electron) plan.

    Raises:
        CaseError: for an ion plan or another object.
    """
    path = Path(path)
    dataset = read_dataset(path)
    with reading(path):
        return _plan(path, dataset)


def _plan(path: Path, dataset: Dataset) -> Plan:
    sop = dataset.get("SOPClassUID")
    if sop == ION_PLAN_SOP_CLASS:
        raise CaseError(f"{path}: an RT Ion Plan; expected a photon RTPLAN. Leave it out to use default beams")
    if sop != RTPLAN_SOP_CLASS:
        raise CaseError(f"{path}: SOP class {sop}; expected RT Plan")
    notes: list[str] = []
    group = (dataset.get("FractionGroupSequence") or [Dataset()])[0]
    if len(dataset.get("FractionGroupSequence") or []) > 1:
        notes.append("the RTPLAN has several fraction groups, the first is used")
    position = _patient_position(dataset, notes)
    beams, techniques = _treating_beams(dataset, group, position, notes)
    if not np.isfinite([v for b in beams for v in (*b.gantry_deg, *b.isocenter_mm)]).all():
        raise CaseError(f"{path}: a gantry angle or an isocentre is not a finite number; export the plan anew")
    if len({b.isocenter_mm for b in beams}) > 1:
        notes.append("the RTPLAN has several isocentres")
    fractions = group.get("NumberOfFractionsPlanned")
    references = dataset.get("ReferencedStructureSetSequence") or []
    return Plan(
        path, dataset, tuple(beams), tuple(techniques), _prescription_gy(dataset),
        int(fractions) if fractions not in (None, "") else None, position,
        str(references[0].get("ReferencedSOPInstanceUID", "")) if references else "", notes,
    )


def _patient_position(dataset: Dataset, notes: list[str]) -> str:
    for setup in dataset.get("PatientSetupSequence") or []:
        position = str(setup.get("PatientPosition") or "").upper()
        if position in _FRAMES:
            return position
        if position:
            notes.append(f"patient position {position!r} of the RTPLAN is unknown; HFS is assumed")
            return "HFS"
    notes.append("the RTPLAN names no patient position; HFS is assumed")
    return "HFS"


def _treating_beams(dataset: Dataset, group: Dataset, position: str, notes: list[str]) -> tuple[list[Beam], list[str]]:
    """Beams with a meterset and a treatment delivery type; setup fields often carry one but not both."""
    metersets = {int(r.ReferencedBeamNumber): float(r.BeamMeterset) for r in group.get("ReferencedBeamSequence") or []
                 if r.get("BeamMeterset") not in (None, "")}
    beams, techniques, dropped = [], [], []
    for item in dataset.get("BeamSequence") or []:
        name = str(item.get("BeamName") or item.get("BeamDescription") or f"Beam {item.BeamNumber}").strip()
        delivery = str(item.get("TreatmentDeliveryType") or "").upper()
        if metersets.get(int(item.BeamNumber), 0.0) <= 0 or delivery not in TREATING:
            dropped.append(name)
            continue
        angles, isocenter, couch_deg = _follow(item)
        if not angles or isocenter is None:
            notes.append(f"beam {name!r} has no gantry angle or no isocentre, left out")
            continue
        if abs((couch_deg + 180) % 360 - 180) > 1:
            notes.append(f"beam {name!r}: the couch angle of {couch_deg:g} degrees is not modelled")
        travel = float(np.abs(np.diff(angles)).sum())
        techniques.append(_delivery(item, travel))
        sampled = _sample_arc(np.array(angles)) if travel > ARC_TRAVEL_DEG else angles[:1]
        beams.append(Beam(name, tuple(to_head_first_supine_deg(a, position) for a in sampled), isocenter))
    if dropped:
        notes.append(f"beams that do not treat, left out: {', '.join(dropped)}")
    return beams, techniques


def _follow(item: Dataset) -> tuple[list[float], tuple[float, float, float] | None, float]:
    """Gantry angles unrolled along the rotation, isocentre and couch angle of a beam.

    The first control point carries everything, the later ones only what changes.
    """
    angles: list[float] = []
    isocenter, couch_deg, direction = None, 0.0, "NONE"
    for point in item.get("ControlPointSequence") or []:
        if isocenter is None and point.get("IsocenterPosition"):
            isocenter = tuple(float(v) for v in point.IsocenterPosition)
        if point.get("PatientSupportAngle") not in (None, "") and not angles:
            couch_deg = float(point.PatientSupportAngle)
        if point.get("GantryAngle") not in (None, ""):
            angle = float(point.GantryAngle)
            if angles:
                turn = (angle - angles[-1]) % 360.0
                if turn > 360.0 - 1e-3:
                    turn -= 360.0
                if direction in ("CC", "CCW"):
                    turn = turn - 360.0 if turn > 1e-3 else turn
                elif direction != "CW":
                    turn = (turn + 180.0) % 360.0 - 180.0
                angle = angles[-1] + turn
            angles.append(angle)
        direction = str(point.get("GantryRotationDirection") or direction).upper()
    return angles, isocenter, couch_deg


def _delivery(item: Dataset, travel_deg: float) -> str:
    if travel_deg > ARC_TRAVEL_DEG:
        return "arc"
    if len(item.get("ControlPointSequence") or []) > 2:
        return "sliding window" if str(item.get("BeamType") or "").upper() == "DYNAMIC" else "step and shoot"
    return "static"


def _sample_arc(angles: np.ndarray) -> list[float]:
    """Evenly spaced angles along the arc, both ends included, at most 15 degrees apart."""
    path = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(angles)))])
    count = int(np.ceil(path[-1] / ARC_STEP_DEG - 1e-6)) + 1
    return [float(a) for a in np.interp(np.linspace(0.0, path[-1], max(count, 2)), path, angles)]


def _prescription_gy(dataset: Dataset) -> dict[int, float] | float | None:
    """Target doses of the DoseReferenceSequence; doses of points and organs at risk do not count."""
    by_roi: dict[int, float] = {}
    volume_gy, other_gy = [], []
    for item in dataset.get("DoseReferenceSequence") or []:
        dose = item.get("TargetPrescriptionDose")
        if str(item.get("DoseReferenceType") or "").upper() != "TARGET" or dose in (None, "") or float(dose) <= 0:
            continue
        structure = str(item.get("DoseReferenceStructureType") or "").upper()
        if structure == "VOLUME" and item.get("ReferencedROINumber") is not None:
            number = int(item.ReferencedROINumber)
            by_roi[number] = max(float(dose), by_roi.get(number, 0.0))
        (volume_gy if structure in ("VOLUME", "SITE") else other_gy).append(float(dose))
    if by_roi:
        return by_roi
    doses = volume_gy or other_gy
    return max(doses) if doses else None
