"""Write a case as a DICOM study: CT series, RTSTRUCT, RTPLAN and, where the case has a dose, RTDOSE."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import contourpy
import numpy as np
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, RTDoseStorage, RTPlanStorage
from rt_utils import RTStructBuilder

from custom.case import BODY, Case, CaseError, Site
from custom.phantom.headers import DATE, TIME, Study, number, reference, save
from custom.phantom.plan_writer import write_plan

if TYPE_CHECKING:
    from custom.physics.fluence import Plan

__all__ = ["write_study"]

logger = logging.getLogger(__name__)

BODY_PART = {Site.HEAD_NECK: "HEADNECK", Site.LUNG: "CHEST"}
STORED_ZERO_HU = 1024
DOSE_LEVELS = 2**16 - 2
CROP_SHARE = 0.01


def write_study(case: Case, out_dir: str | Path, *, patient_id: str, fluence: Plan | None = None) -> Path:
    """Write ``CT/*.dcm``, ``RTSTRUCT.dcm``, ``RTPLAN.dcm`` and, with ``case.dose_gy``, ``RTDOSE.dcm``.

    The same case and patient id give the same bytes; what an earlier call wrote there goes first.

    Args:
        case: on an axis-aligned grid, with a CT in whole HU from -1024.
        out_dir: folder of this study; made if absent.
        patient_id: up to 16 characters.
        fluence: the plan's fluence, delivered as sliding windows; without it the leaves are fitted to the targets.

    Returns:
        ``out_dir``.

    Raises:
        CaseError: when the case cannot be written without loss (no CT, oblique grid).
    """
    if case.ct_hu is None or not case.grid.is_axis_aligned:
        raise CaseError(f"case {case.name}: a study needs a CT on an axis-aligned grid; found the affine\n"
                        f"{case.grid.affine} and {'no CT' if case.ct_hu is None else 'a CT'}")  # fmt: skip
    if not 0 < len(patient_id) <= 16:
        raise CaseError(f"case {case.name}: patient id {patient_id!r}; expected 1 to 16 characters")
    out_dir, study = Path(out_dir), Study(patient_id)
    for earlier in (*(out_dir / "CT").glob("CT_*.dcm"), *(out_dir / f"RT{k}.dcm" for k in ("STRUCT", "PLAN", "DOSE"))):
        earlier.unlink(missing_ok=True)
    write_ct(case, study, out_dir / "CT")
    structures = write_rtstruct(case, study, out_dir / "CT", out_dir / "RTSTRUCT.dcm")
    plan = write_plan(case, study, structures, out_dir / "RTPLAN.dcm", fluence)
    if case.dose_gy is not None:
        write_rtdose(case, study, str(plan.SOPInstanceUID), out_dir / "RTDOSE.dcm")
    logger.info("wrote %s (%d slices%s)", out_dir, case.grid.shape[2], "" if case.dose_gy is None else ", dose")
    return out_dir


def write_ct(case: Case, study: Study, folder: Path) -> None:
    """One file a slice, from inferior to superior; rows run along ``j``, columns along ``i``."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.rint(case.ct_hu).astype(np.int32) + STORED_ZERO_HU
    if stored.min() < 0 or stored.max() > 65535:
        raise CaseError(f"case {case.name}: CT from {case.ct_hu.min():g} to {case.ct_hu.max():g} HU; expected -1024 up")
    dx, dy, dz = case.grid.spacing_mm
    for k in range(case.grid.shape[2]):
        ds = study.header(CTImageStorage, study.uid("CT", k), "CT", 1, "CT synthetic")
        ds.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
        ds.AcquisitionDate = ds.ContentDate = DATE
        ds.AcquisitionTime = ds.ContentTime = TIME
        ds.AcquisitionNumber, ds.InstanceNumber = 1, k + 1
        ds.BodyPartExamined = BODY_PART.get(case.site, "")
        ds.KVP, ds.ScanOptions, ds.PatientPosition, ds.SliceThickness = "120", "", "HFS", number(dz, 4)
        position = case.grid.to_world((0, 0, k))
        ds.ImagePositionPatient = [number(v, 4) for v in position]
        ds.SliceLocation = number(position[2], 4)
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = str(-STORED_ZERO_HU), "1", "HU"
        ds.WindowCenter, ds.WindowWidth = "40", "400"
        _pixels(ds, stored[:, :, k].T, (dy, dx))
        save(ds, folder / f"CT_{k + 1:03d}.dcm")


def write_rtstruct(case: Case, study: Study, ct_folder: Path, path: Path) -> FileDataset:
    """Structures by rt-utils, with the contours redrawn on the true boundary and the missing attributes added.

    rt-utils puts contours through the centres of the boundary pixels; drawn halfway between pixels, as a planning
    system does, a reader that asks which pixel centres lie inside gets every mask back exactly.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = RTStructBuilder.create_new(dicom_series_path=str(ct_folder))
        for name, mask in case.masks.items():
            builder.add_roi(mask=np.ascontiguousarray(mask.transpose(1, 0, 2)), name=name, approximate_contours=False)
    ds = builder.ds
    names = {int(roi.ROINumber): str(roi.ROIName) for roi in ds.StructureSetROISequence}
    for contour in ds.ROIContourSequence:
        mask = case.masks[names[int(contour.ReferencedROINumber)]]
        contour.ContourSequence = Sequence(_boundaries(case, study, mask))
    for observation in ds.RTROIObservationsSequence:
        observation.RTROIInterpretedType = _interpreted_type(names[int(observation.ReferencedROINumber)])
        observation.ROIInterpreter = ""
    study.stamp(ds, "RTSTRUCT synthetic")
    ds.StructureSetLabel, ds.StructureSetDate, ds.StructureSetTime = "SYNTHETIC", DATE, TIME
    ds.FrameOfReferenceUID = study.uid("frame of reference")
    ds.ApprovalStatus = "UNAPPROVED"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = study.uid("RTSTRUCT")
    ds.SeriesInstanceUID, ds.SeriesNumber = study.uid("RTSTRUCT", "series"), 2
    save(ds, path)
    return ds


def _boundaries(case: Case, study: Study, mask: np.ndarray) -> list[Dataset]:
    """Closed outlines by marching squares, holes as outlines of their own, slice by slice."""
    items = []
    for k in np.flatnonzero(mask.any(axis=(0, 1))):
        plane = np.pad(mask[:, :, k].T.astype(float), 1)
        for line in contourpy.contour_generator(z=plane).lines(0.5):
            index = np.column_stack((line[:-1] - 1, np.full(len(line) - 1, k)))
            item = Dataset()
            item.ContourImageSequence = Sequence([reference(CTImageStorage, study.uid("CT", k))])
            item.ContourGeometricType, item.NumberOfContourPoints = "CLOSED_PLANAR", len(index)
            item.ContourData = [number(v) for v in case.grid.to_world(index).ravel()]
            items.append(item)
    return items


def _interpreted_type(name: str) -> str:
    """RT ROI Interpreted Type (3006,00A4) of a TG-263 name."""
    if name == BODY:
        return "EXTERNAL"
    return name[:3] if name[:3] in ("PTV", "CTV", "GTV") else "ORGAN"


def write_rtdose(case: Case, study: Study, plan_uid: str, path: Path) -> None:
    """16-bit RTDOSE of the box that holds every voxel above 1 % of the maximum, as a planning system keeps."""
    high = np.nonzero(case.dose_gy > CROP_SHARE * case.dose_gy.max())
    box = tuple(slice(max(0, int(a.min()) - 1), min(n, int(a.max()) + 2)) for a, n in zip(high, case.grid.shape))
    grid, dose = case.grid.crop(box), case.dose_gy[box].astype(np.float64)
    dx, dy, dz = grid.spacing_mm
    ds = study.header(RTDoseStorage, study.uid("RTDOSE"), "RTDOSE", 4, "RTDOSE synthetic")
    ds.InstanceNumber, ds.ContentDate, ds.ContentTime = 1, DATE, TIME
    ds.SliceThickness = number(dz, 4)
    ds.ImagePositionPatient = [number(v, 4) for v in grid.origin_mm]
    ds.NumberOfFrames, ds.FrameIncrementPointer = grid.shape[2], 0x3004000C
    ds.GridFrameOffsetVector = [number(dz * k, 4) for k in range(grid.shape[2])]
    ds.DoseUnits, ds.DoseType, ds.DoseSummationType = "GY", "PHYSICAL", "PLAN"
    ds.TissueHeterogeneityCorrection = "IMAGE"
    ds.DoseGridScaling = f"{dose.max() / DOSE_LEVELS:.8e}"
    _pixels(ds, np.rint(dose.transpose(2, 1, 0) / float(ds.DoseGridScaling)), (dy, dx))
    ds.ReferencedRTPlanSequence = Sequence([reference(RTPlanStorage, plan_uid)])
    save(ds, path)


def _pixels(ds: FileDataset, stored: np.ndarray, spacing_mm: tuple[float, float]) -> None:
    """Unsigned 16-bit axial pixels ``[..., row, column]`` and their image plane (PS3.3 C.7.6.2, C.7.6.3)."""
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [number(v, 4) for v in spacing_mm]  # between rows, then between columns
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelData = stored.astype("<u2").tobytes()
