"""RTPLAN of a synthetic case: prescriptions, beams and leaf positions (PS3.3 A.20)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence
from pydicom.uid import RTPlanStorage

from custom.case import Beam, Case, CaseError
from custom.phantom.headers import DATE, TIME, Study, number, reference, save
from custom.phantom.leaves import LEAF_BOUNDARIES_MM, SAD_MM, Delivery, conform, deliver_arc, deliver_field

if TYPE_CHECKING:
    from custom.physics.fluence import Plan

__all__ = ["write_plan"]

DEFAULT_FRACTIONS = 30
DEVICE_DISTANCE_MM = {"ASYMX": 367, "ASYMY": 278, "MLCX": 509}
NO_ROTATION = "NONE"


def write_plan(case: Case, study: Study, structures: FileDataset, path: Path, fluence: Plan | None) -> FileDataset:
    """Write the plan of ``case.beams``, and return the dataset.

    Args:
        structures: the RTSTRUCT dataset the plan refers to.
        fluence: delivered by sliding windows; None fits the leaves to the targets.

    Raises:
        CaseError: when the fluence has not one direction for each angle of the beams.
    """
    fractions = int(case.source.get("fractions", DEFAULT_FRACTIONS))
    deliveries = _deliveries(case, fractions, fluence)
    ds = study.header(RTPlanStorage, study.uid("RTPLAN"), "RTPLAN", 3, "RTPLAN synthetic")
    ds.RTPlanLabel, ds.RTPlanName = "SYNTHETIC", f"{case.technique} synthetic"
    ds.RTPlanDescription = "Synthetic demonstration plan. Not for clinical use."
    ds.RTPlanDate, ds.RTPlanTime, ds.RTPlanGeometry, ds.PlanIntent = DATE, TIME, "PATIENT", "RESEARCH"
    ds.ApprovalStatus = "UNAPPROVED"
    ds.ReferencedStructureSetSequence = Sequence([reference(structures.SOPClassUID, structures.SOPInstanceUID)])
    ds.DoseReferenceSequence = Sequence(_prescriptions(case, study, structures))
    setup = Dataset()
    setup.PatientSetupNumber, setup.PatientPosition, setup.SetupTechnique = 1, "HFS", "ISOCENTRIC"
    ds.PatientSetupSequence = Sequence([setup])
    ds.BeamSequence = Sequence(_beam(n, beam, d) for n, (beam, d) in enumerate(zip(case.beams, deliveries), 1))
    ds.FractionGroupSequence = Sequence([_fraction_group(case, deliveries, fractions)])
    save(ds, path)
    return ds


def _deliveries(case: Case, fractions: int, plan: Plan | None) -> list[Delivery]:
    """One delivery a beam."""
    if plan is None:
        share_gy = case.highest_prescription_gy / fractions / len(case.beams)
        return [conform(case, beam, share_gy) for beam in case.beams]
    angles = [len(beam.gantry_deg) for beam in case.beams]
    if len(plan.fluences) != sum(angles):
        raise CaseError(f"case {case.name}: the fluence has {len(plan.fluences)} directions, the beams {sum(angles)} "
                        f"angles; plan every angle (raise max_directions)")  # fmt: skip
    out, first = [], 0
    for beam, count in zip(case.beams, angles):
        part = slice(first, first + count)
        parts = plan.fluences[part], plan.u_mm[part], plan.w_mm[part], list(beam.gantry_deg)
        out.append(deliver_arc(*parts, fractions) if beam.is_arc else deliver_field(*(p[0] for p in parts), fractions))
        first += count
    return out


def _prescriptions(case: Case, study: Study, structures: FileDataset) -> list[Dataset]:
    """One Dose Reference a target (PS3.3 C.8.8.10)."""
    roi_number = {str(roi.ROIName): roi.ROINumber for roi in structures.StructureSetROISequence}
    items = []
    for n, (name, dose_gy) in enumerate(case.targets.items(), 1):
        item = Dataset()
        item.DoseReferenceNumber, item.DoseReferenceUID = n, study.uid("dose reference", name)
        item.DoseReferenceStructureType, item.ReferencedROINumber = "VOLUME", roi_number[name]
        item.DoseReferenceDescription, item.DoseReferenceType = name, "TARGET"
        item.TargetPrescriptionDose = number(dose_gy)
        items.append(item)
    return items


def _fraction_group(case: Case, deliveries: list[Delivery], fractions: int) -> Dataset:
    """Fractions and monitor units (PS3.3 C.8.8.13); the dose is shared evenly between the beams."""
    group = Dataset()
    group.FractionGroupNumber, group.NumberOfFractionsPlanned = 1, fractions
    group.NumberOfBeams, group.NumberOfBrachyApplicationSetups = len(deliveries), 0
    group.ReferencedBeamSequence = Sequence()
    for n, delivery in enumerate(deliveries, 1):
        item = Dataset()
        item.ReferencedBeamNumber, item.BeamMeterset = n, number(delivery.meterset[-1])
        item.BeamDose = number(case.highest_prescription_gy / fractions / len(deliveries), 5)
        group.ReferencedBeamSequence.append(item)
    return group


def _beam(n: int, beam: Beam, delivery: Delivery) -> Dataset:
    """One item of the Beam Sequence (PS3.3 C.8.8.14)."""
    item = Dataset()
    item.Manufacturer, item.TreatmentMachineName, item.ManufacturerModelName = "synthetic", "GENERIC6MV", "generic"
    item.PrimaryDosimeterUnit, item.SourceAxisDistance = "MU", number(SAD_MM)
    item.BeamLimitingDeviceSequence = Sequence(_device(kind) for kind in DEVICE_DISTANCE_MM)
    item.BeamNumber, item.BeamName = n, beam.name[:64]
    moving = beam.is_arc or bool(np.ptp(delivery.x1_mm, axis=0).any() or np.ptp(delivery.x2_mm, axis=0).any())
    item.BeamType, item.RadiationType = "DYNAMIC" if moving else "STATIC", "PHOTON"
    item.TreatmentDeliveryType = "TREATMENT"
    item.NumberOfWedges = item.NumberOfCompensators = item.NumberOfBoli = item.NumberOfBlocks = 0
    item.ReferencedPatientSetupNumber = 1
    count = len(delivery.meterset)
    item.FinalCumulativeMetersetWeight, item.NumberOfControlPoints = "1", count
    item.ControlPointSequence = Sequence(_control_point(k, beam, delivery, moving) for k in range(count))
    return item


def _device(kind: str) -> Dataset:
    item = Dataset()
    item.RTBeamLimitingDeviceType, item.NumberOfLeafJawPairs = kind, 1
    item.SourceToBeamLimitingDeviceDistance = number(DEVICE_DISTANCE_MM[kind])
    if kind == "MLCX":
        item.NumberOfLeafJawPairs = LEAF_BOUNDARIES_MM.size - 1
        item.LeafPositionBoundaries = [number(v) for v in LEAF_BOUNDARIES_MM]
    return item


def _positions(kind: str, values_mm) -> Dataset:
    item = Dataset()
    item.RTBeamLimitingDeviceType = kind
    item.LeafJawPositions = [number(v, 1) for v in values_mm]
    return item


def _control_point(k: int, beam: Beam, delivery: Delivery, moving: bool) -> Dataset:
    """One control point; the first states everything, the others only what changes (PS3.3 C.8.8.14.5)."""
    point = Dataset()
    point.ControlPointIndex = k
    point.CumulativeMetersetWeight = number(delivery.meterset[k] / delivery.meterset[-1], 6)
    leaves = _positions("MLCX", np.concatenate((delivery.x1_mm[k], delivery.x2_mm[k])))
    if k == 0 or beam.is_arc:
        last = k == len(delivery.meterset) - 1
        point.GantryAngle = number(delivery.gantry_deg[k] % 360, 1)
        point.GantryRotationDirection = "CW" if beam.is_arc and not last else NO_ROTATION
    if k == 0:
        x, y = delivery.jaws_mm()
        point.BeamLimitingDevicePositionSequence = Sequence([_positions("ASYMX", x), _positions("ASYMY", y), leaves])
        point.NominalBeamEnergy, point.DoseRateSet = "6", "600"
        point.IsocenterPosition = [number(v) for v in beam.isocenter_mm]
        point.BeamLimitingDeviceAngle = point.PatientSupportAngle = point.TableTopEccentricAngle = "0"
        point.BeamLimitingDeviceRotationDirection = point.PatientSupportRotationDirection = NO_ROTATION
        point.TableTopEccentricRotationDirection = NO_ROTATION
        point.TableTopVerticalPosition = point.TableTopLongitudinalPosition = point.TableTopLateralPosition = None
        point.TableTopPitchAngle = point.TableTopRollAngle = 0.0
        point.TableTopPitchRotationDirection = point.TableTopRollRotationDirection = NO_ROTATION
    elif moving:
        point.BeamLimitingDevicePositionSequence = Sequence([leaves])
    return point
