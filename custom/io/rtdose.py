"""RTDOSE <-> dose array (PS3.3 C.8.8.3); reading sums beams, writing marks the dose as predicted."""

from __future__ import annotations

import datetime
import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from custom import __version__
from custom.case import CaseError, Grid, resample
from custom.io.dataset import check_bounds, numbers, read_dataset, reading
from custom.whole import whole_file

__all__ = ["PREDICTED", "RTDOSE_SOP_CLASS", "Dose", "combine_doses", "read_rtdose", "write_rtdose"]

RTDOSE_SOP_CLASS = "1.2.840.10008.5.1.4.1.1.481.2"
RTPLAN_SOP_CLASS, RTSTRUCT_SOP_CLASS = "1.2.840.10008.5.1.4.1.1.481.5", "1.2.840.10008.5.1.4.1.1.481.3"
PREDICTED = "PREDICTED DOSE - NOT FOR CLINICAL USE"
IMPLEMENTATION_UID = "1.2.826.0.1.3680043.8.498.72947202530513462047517316414105470265"
HIGHEST_GY = 200.0
FINEST_GY = 1e-6
TOP = {32: 2**31 - 1, 16: 2**16 - 1}  # highest stored value by bits


@dataclass(frozen=True)
class Dose:
    """One dose grid of a file.

    Args:
        gy: float32 ``[i, j, k]``.
        grid: its geometry, as stored.
        summation: DoseSummationType.
        plan_uid: SOPInstanceUID of the referenced RTPLAN, or "".
        notes: what the user should know.
    """

    path: Path
    gy: np.ndarray
    grid: Grid
    summation: str
    plan_uid: str
    frame_uid: str
    notes: list[str] = field(default_factory=list)


def read_rtdose(path: str | Path) -> Dose:
    """Read one RTDOSE in Gy.

    Raises:
        CaseError: for relative or planar doses, an uneven grid, or a file that cannot be decoded.
    """
    path = Path(path)
    dataset = read_dataset(path)
    with reading(path):
        return _dose(path, dataset)


def _dose(path: Path, dataset: Dataset) -> Dose:
    if dataset.get("SOPClassUID") != RTDOSE_SOP_CLASS:
        raise CaseError(f"{path}: SOP class {dataset.get('SOPClassUID')}; expected RT Dose")
    notes: list[str] = []
    kind = str(dataset.get("DoseType") or "PHYSICAL").upper()
    if kind == "ERROR":
        raise CaseError(f"{path}: DoseType {kind}, a difference of doses; expected PHYSICAL. Remove the file")
    if kind != "PHYSICAL":
        notes.append(f"{path.name}: a dose of the type {kind}, compared as if it were physical")
    if dataset.get("DoseGridScaling") in (None, ""):
        raise CaseError(f"{path}: no DoseGridScaling; expected a dose grid (not only DVHs)")
    scaling = float(numbers(dataset, "DoseGridScaling", 1, path)[0])
    check_bounds((dataset.Columns, dataset.Rows, dataset.get("NumberOfFrames") or 1), path)
    try:
        stored = dataset.pixel_array
    except Exception as error:  # pydicom's decoders raise many kinds; each means an unreadable dose
        raise CaseError(f"{path}: the dose pixels cannot be decoded ({type(error).__name__}: {error})") from error
    if stored.ndim != 3 or stored.shape[0] < 2:
        raise CaseError(f"{path}: a planar dose of shape {stored.shape}; expected a volume")
    gy = np.multiply(stored, scaling, dtype=np.float64)
    units = str(dataset.get("DoseUnits") or "").upper()
    if units == "CGY" or (units != "GY" and gy.max() > HIGHEST_GY and units != "RELATIVE"):
        gy *= 0.01
        notes.append(f"{path.name}: dose units {units or 'missing'}, taken as cGy")
    elif units not in ("GY", ""):
        raise CaseError(f"{path}: dose units {units!r}; expected GY. Export the dose in absolute units")
    grid, flip = _read_grid(dataset, path)
    gy = gy[::-1] if flip else gy
    plans = dataset.get("ReferencedRTPlanSequence") or []
    return Dose(path, np.ascontiguousarray(gy.transpose(2, 1, 0), dtype=np.float32), grid,
                str(dataset.get("DoseSummationType") or "").upper(),
                str(plans[0].get("ReferencedSOPInstanceUID", "")) if plans else "",
                str(dataset.get("FrameOfReferenceUID") or ""), notes)


def _read_grid(dataset: Dataset, path: Path) -> tuple[Grid, bool]:
    """Grid with ascending frame positions, and whether the frames have to be reversed for it.

    GridFrameOffsetVector is either relative to the first frame, along row x column, or holds the patient z of axial
    frames (PS3.3 C.8.8.3.2).
    """
    row, column = numbers(dataset, "ImageOrientationPatient", 6, path).reshape(2, 3)
    normal = np.cross(row, column)
    origin, spacing = numbers(dataset, "ImagePositionPatient", 3, path), numbers(dataset, "PixelSpacing", 2, path)
    value = dataset.get("GridFrameOffsetVector")
    offsets = np.atleast_1d(np.array(value if value is not None else [], dtype=np.float64))
    frames = int(dataset.get("NumberOfFrames") or 1)
    if offsets.size != frames or not np.isfinite(offsets).all():
        raise CaseError(f"{path}: {offsets.size} values in GridFrameOffsetVector for {frames} frames; expected one "
                        "finite number a frame")
    if abs(offsets[0]) > 1e-4:
        axial = abs(abs(normal[2]) - 1) < 1e-4
        if not axial or abs(offsets[0] - origin[2]) > 0.1:
            raise CaseError(f"{path}: GridFrameOffsetVector starts at {offsets[0]:g}; expected 0, or the z of the "
                            f"first frame ({origin[2]:g} mm) of an axial dose")
        offsets = (offsets - offsets[0]) * np.sign(normal[2])  # patient z -> along the normal
    gaps = np.diff(offsets)
    step = (offsets[-1] - offsets[0]) / (frames - 1)
    if step == 0 or np.abs(gaps - step).max() > max(0.01 * abs(step), 0.1):
        raise CaseError(f"{path}: frame distances range from {gaps.min():g} to {gaps.max():g} mm; expected a uniform "
                        "dose grid. Export the dose on one")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * spacing[1], column * spacing[0], normal * abs(step)
    affine[:3, 3] = origin + (normal * offsets[-1] if step < 0 else 0)
    return Grid((int(dataset.Columns), int(dataset.Rows), frames), affine), bool(step < 0)


def combine_doses(doses: Sequence[Dose], plan_uid: str = "", fractions: int | None = None) -> tuple[Dose, list[str]]:
    """The dose of the whole plan out of the files of a study: its PLAN dose, else the sum of its beams.

    Args:
        doses: all that were found.
        plan_uid: the RTPLAN in use; doses of other plans are left out where one is of this plan, or names none.
        fractions: number of fractions, for doses of one FRACTION.

    Raises:
        CaseError: when the files do not tell which dose is the plan's.
    """
    notes = [n for d in doses for n in d.notes]
    chosen = [d for d in doses if not plan_uid or d.plan_uid in ("", plan_uid)] or list(doses)
    if plan_uid and all(d.plan_uid not in ("", plan_uid) for d in chosen):
        notes.append("no RTDOSE refers to the RTPLAN in use; that of a plan which is not there is taken")
    if len(chosen) < len(doses):
        notes.append(f"{len(doses) - len(chosen)} RTDOSE file(s) of other plans left out")
    whole = [d for d in chosen if d.summation in ("PLAN", "MULTI_PLAN", "PLAN_OVERVIEW", "RECORD", "")]
    if len(whole) > 1:
        referring = [d for d in whole if plan_uid and d.plan_uid == plan_uid]
        if len(referring) != 1:
            listed = ", ".join(d.path.name for d in whole)
            raise CaseError(f"several plan doses: {listed}; keep the one to compare with")
        whole = referring
    if whole:
        if len(chosen) > 1:
            notes.append(f"{whole[0].path.name} is the plan's dose; the other doses are left out")
        return whole[0], notes
    kinds = {d.summation for d in chosen}
    if len(kinds) > 1:
        raise CaseError(f"doses of mixed kinds {sorted(kinds)}; expected one PLAN dose or the BEAM doses of one plan")
    first = chosen[0]
    if kinds == {"FRACTION"}:
        if len(chosen) > 1 or not fractions:
            raise CaseError(f"{first.path}: the dose of one FRACTION, and no number of fractions to multiply it with")
        notes.append(f"the dose of one fraction times {fractions}")
        return Dose(first.path, first.gy * fractions, first.grid, "PLAN", first.plan_uid, first.frame_uid), notes
    total = first.gy.copy()
    for other in chosen[1:]:
        total += resample(other.gy, other.grid, first.grid)
    if len(chosen) > 1:
        notes.append(f"the doses of {len(chosen)} {first.summation} files are summed")
    return Dose(first.path, total, first.grid, "PLAN", first.plan_uid, first.frame_uid), notes


def write_rtdose(
    path: str | Path,
    dose_gy: np.ndarray,
    grid: Grid,
    references: Mapping[str, Any],
    *,
    bits: int = 32,
    description: str = PREDICTED,
) -> None:
    """Write a predicted dose as RTDOSE; whole or not at all.

    Args:
        path: the file to write.
        dose_gy: ``grid.shape``; negative values become 0.
        grid: right-angled, any orientation; frames run along its most axial axis.
        references: ``case.source["references"]`` of a DICOM case (see ``custom.io.dicom_folder``). Without an RTPLAN
            the dose is written as PLAN_OVERVIEW.
        bits: 32, or 16 for validators that know no more.
        description: SeriesDescription, at most 64 characters.

    Raises:
        CaseError: when the array does not fit the grid, the dose is not finite, or the grid is sheared.
    """
    path = Path(path)
    if dose_gy.shape != grid.shape:
        raise CaseError(f"RTDOSE: the dose has shape {dose_gy.shape}, its grid {grid.shape}")
    if bits not in (16, 32):
        raise CaseError(f"RTDOSE: {bits} bits; expected 16 or 32")
    if not np.isfinite(dose_gy).all():
        raise CaseError("RTDOSE: the dose holds values that are not finite; nothing is written")
    dose_gy, affine = _to_frames(np.asarray(dose_gy), grid)
    dataset = _header(references, description)
    _fill_geometry(dataset, dose_gy.shape, affine)
    _fill_scaling(dataset, dose_gy, bits)
    _fill_plan(dataset, references)
    _save_whole(dataset, path, dose_gy)


def _to_frames(dose_gy: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Array and affine with ``k`` along the most axial axis, in the sense of row x column."""
    direction = grid.affine[:3, :3] / grid.spacing_mm
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-4):
        raise CaseError(f"RTDOSE: the grid is sheared, its axes are\n{direction}\nexpected right angles")
    k = int(np.abs(direction[2]).argmax())
    i = max((a for a in range(3) if a != k), key=lambda a: abs(direction[0, a]))
    order = [i, 3 - i - k, k]
    affine = grid.affine[:, [*order, 3]].copy()
    dose_gy = dose_gy.transpose(order)
    if np.cross(affine[:3, 0], affine[:3, 1]) @ affine[:3, 2] < 0:
        affine[:3, 3] += affine[:3, 2] * (dose_gy.shape[2] - 1)
        affine[:3, 2] *= -1
        dose_gy = dose_gy[:, :, ::-1]
    return dose_gy, affine


def _header(references: Mapping[str, Any], description: str) -> FileDataset:
    """Patient, study, series, equipment, frame of reference and SOP common modules."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTDOSE_SOP_CLASS, generate_uid()
    meta.TransferSyntaxUID, meta.ImplementationClassUID = ExplicitVRLittleEndian, IMPLEMENTATION_UID
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    now = datetime.datetime.now()
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = RTDOSE_SOP_CLASS, meta.MediaStorageSOPInstanceUID, "RTDOSE"
    ds.InstanceCreationDate = ds.SeriesDate = ds.ContentDate = date
    ds.InstanceCreationTime = ds.SeriesTime = ds.ContentTime = time
    for keyword in ("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "PatientName", "PatientID",
                    "PatientBirthDate", "PatientSex", "StudyID", "PositionReferenceIndicator"):
        setattr(ds, keyword, references.get(keyword) or "")
    for keyword in ("StudyDescription", "PatientIdentityRemoved", "DeidentificationMethod"):
        if references.get(keyword):
            setattr(ds, keyword, references[keyword])
    ds.StudyInstanceUID = references.get("StudyInstanceUID") or generate_uid()
    ds.FrameOfReferenceUID = references.get("FrameOfReferenceUID") or generate_uid()
    ds.SeriesInstanceUID, ds.SeriesNumber, ds.InstanceNumber = generate_uid(), 1, 1
    ds.OperatorsName = ""
    ds.SeriesDescription = description[:64]
    ds.Manufacturer, ds.ManufacturerModelName = "RT dose prediction (open source)", "MONAI bundle"
    ds.DeviceSerialNumber, ds.SoftwareVersions = "0", __version__
    ds.ContentQualification = "RESEARCH"
    ds.ContributingEquipmentSequence = [_equipment()]
    return ds


def _equipment() -> Dataset:
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = "109102", "DCM", "Processing Equipment"
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [purpose]
    item.Manufacturer, item.ManufacturerModelName = "RT dose prediction (open source)", "MONAI bundle"
    item.SoftwareVersions, item.ContributionDescription = __version__, (
        f"{PREDICTED}. Predicted by a neural network from CT and structures, not by a dose engine."
    )
    return item


def _fill_geometry(ds: Dataset, shape: tuple[int, int, int], affine: np.ndarray) -> None:
    """Image plane and multi-frame modules; offsets are relative and ascending (PS3.3 C.8.8.3.2, option a)."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = (affine[:3, :2] / spacing[:2]).T.ravel()
    ds.ImageOrientationPatient = [_ds(v) for v in cosines]
    ds.ImagePositionPatient = [_ds(v) for v in affine[:3, 3]]
    ds.PixelSpacing = [_ds(spacing[1]), _ds(spacing[0])]
    ds.SliceThickness = _ds(spacing[2])
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Columns, ds.Rows, ds.NumberOfFrames = shape
    ds.FrameIncrementPointer = 0x3004000C
    ds.GridFrameOffsetVector = [_ds(spacing[2] * k) for k in range(shape[2])]


def _fill_scaling(ds: Dataset, dose_gy: np.ndarray, bits: int) -> None:
    """The scaling as it is written; stored values stay below 2^31 for signed readers."""
    highest = max(float(dose_gy.max()), 0.0)
    exact = max(highest / TOP[bits], FINEST_GY if bits == 32 else 1e-9)
    scaling = float(_ds(exact))
    if scaling < exact:  # rounded down: the maximum would not fit
        scaling = float(_ds(exact * (1 + 1e-8)))
    ds.DoseUnits, ds.DoseType = "GY", "PHYSICAL"
    ds.DoseComment = PREDICTED
    ds.DoseGridScaling = _ds(scaling)
    ds.BitsAllocated = ds.BitsStored = bits
    ds.HighBit, ds.PixelRepresentation = bits - 1, 0


def _write_pixels(file: BinaryIO, dose_gy: np.ndarray, scaling: float, bits: int) -> None:
    """Pixel Data, the last element, frame by frame behind the others: pydicom would hold a large dose three times.

    Explicit VR Little Endian (PS3.5 7.1.2): tag, ``OW``, two reserved bytes, 32-bit length, which is even.
    """
    length = dose_gy.size * bits // 8
    file.write(struct.pack("<HH2s2xI", 0x7FE0, 0x0010, b"OW", length + length % 2))
    for k in range(dose_gy.shape[2]):
        plane = np.clip(dose_gy[:, :, k].T.astype(np.float64), 0.0, None)
        file.write(np.minimum(np.rint(plane / scaling), TOP[bits]).astype(f"<u{bits // 8}").tobytes())
    file.write(b"\0" * (length % 2))


def _fill_plan(ds: Dataset, references: Mapping[str, Any]) -> None:
    """Reference to the RTPLAN, or without one the plan overview that PLAN_OVERVIEW doses need (PS3.3 C.8.8.3)."""
    if references.get("RTPlanSOPInstanceUID"):
        ds.DoseSummationType = "PLAN"
        ds.ReferencedRTPlanSequence = [_reference(RTPLAN_SOP_CLASS, references["RTPlanSOPInstanceUID"])]
        return
    ds.DoseSummationType = "PLAN_OVERVIEW"
    overview = Dataset()
    overview.PlanOverviewIndex = 1
    overview.RTPlanLabel = "PREDICTED"
    if references.get("RTStructureSetSOPInstanceUID"):
        overview.ReferencedStructureSetSequence = [
            _reference(RTSTRUCT_SOP_CLASS, references["RTStructureSetSOPInstanceUID"])
        ]
    prescription = Dataset()
    if references.get("PrescriptionGy"):
        prescription.TotalPrescriptionDose = float(references["PrescriptionGy"])
        prescription.EntityLongLabel = "Highest prescribed dose"
        overview.PrescriptionOverviewSequence = [prescription]
    else:
        overview.PrescriptionOverviewSequence = []
    overview.TreatmentSite, overview.TreatmentSiteCodeSequence = "", []
    overview.NumberOfFractionsIncluded = int(references.get("NumberOfFractions") or 1)
    ds.PlanOverviewSequence = [overview]


def _reference(sop_class: str, sop_uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, str(sop_uid)
    return item


def _ds(value: float) -> str:
    """Decimal string of at most 16 characters."""
    text = format_number_as_ds(float(value) + 0.0)
    return "0.0" if float(text) == 0 else text


def _save_whole(ds: FileDataset, path: Path, dose_gy: np.ndarray) -> None:
    with whole_file(path) as part, part.open("wb") as file:
        if int(pydicom.__version_info__[0]) >= 3:
            ds.save_as(file, enforce_file_format=True)
        else:
            ds.is_little_endian, ds.is_implicit_VR = True, False
            ds.save_as(file, write_like_original=False)
        file.seek(0, io.SEEK_END)
        _write_pixels(file, dose_gy, float(ds.DoseGridScaling), int(ds.BitsAllocated))
