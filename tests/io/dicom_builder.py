"""Small DICOM studies for the reader's tests: any orientation, written slice by slice in a shuffled order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from custom.case import Grid
from custom.io.ct import CT_SOP_CLASS
from custom.io.rtplan import RTPLAN_SOP_CLASS
from custom.io.rtstruct import RTSTRUCT_SOP_CLASS

AXES = {  # directions of i (along a row) and j (down a column) in LPS, as scanners store the patient positions
    "HFS": ([1, 0, 0], [0, 1, 0]), "HFP": ([-1, 0, 0], [0, -1, 0]),
    "FFS": ([-1, 0, 0], [0, 1, 0]), "FFP": ([1, 0, 0], [0, -1, 0]),
    "oblique": ([0.8, 0.6, 0.0], [-0.36, 0.48, 0.8]), "HFDL": ([0, -1, 0], [1, 0, 0]),
    "sagittal": ([0, 1, 0], [0, 0, -1]),
}


def oriented_grid(orientation: str = "HFS", shape=(24, 20, 12), spacing_mm=(2.0, 2.5, 3.0),
                  origin_mm=(-20.0, 7.5, 31.0)) -> Grid:
    """A grid as a CT of this orientation has it."""
    i, j = (np.array(v, dtype=float) for v in AXES[orientation])
    affine = np.eye(4)
    affine[:3, :3] = np.stack([i, j, np.cross(i, j)], axis=1) * np.array(spacing_mm)
    affine[:3, 3] = origin_mm
    return Grid(shape, affine)


class Study:
    """Identifiers shared by the objects of one patient."""

    def __init__(self, folder: Path, grid: Grid, name: str = "Doe^Jane") -> None:
        self.folder, self.grid, self.name = Path(folder), grid, name
        self.study, self.series, self.frame = generate_uid(), generate_uid(), generate_uid()
        self.structures, self.plan = generate_uid(), generate_uid()
        self.folder.mkdir(parents=True, exist_ok=True)

    def header(self, sop_class: str, sop_uid: str, modality: str) -> FileDataset:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, sop_uid
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = sop_class, sop_uid, modality
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = self.name, "P1", "19700101", "F"
        ds.StudyInstanceUID, ds.StudyDate, ds.StudyTime, ds.StudyID = self.study, "20240102", "101112", "7"
        ds.AccessionNumber = ds.ReferringPhysicianName = ""
        ds.SeriesInstanceUID, ds.FrameOfReferenceUID = generate_uid(), self.frame
        ds.PositionReferenceIndicator = ""
        return ds

    def save(self, ds: FileDataset, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if int(pydicom.__version_info__[0]) >= 3:
            ds.save_as(path, enforce_file_format=True)
        else:
            ds.is_little_endian, ds.is_implicit_VR = True, False
            ds.save_as(path, write_like_original=False)
        return path

    def ct_slice(self, hu: np.ndarray, k: int) -> FileDataset:
        """Header and pixels of slice ``k``; ``hu`` is ``[i, j, k]``."""
        g = self.grid
        ds = self.header(CT_SOP_CLASS, generate_uid(), "CT")
        ds.SeriesInstanceUID, ds.ImageType = self.series, ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.ImageOrientationPatient = [round(float(v), 6) for v in (g.affine[:3, :2] / g.spacing_mm[:2]).T.ravel()]
        ds.ImagePositionPatient = [round(float(v), 6) for v in g.to_world((0, 0, k))]
        ds.PixelSpacing, ds.SliceThickness = [float(g.spacing_mm[1]), float(g.spacing_mm[0])], float(g.spacing_mm[2])
        ds.InstanceNumber = g.shape[2] - k
        ds.Columns, ds.Rows = g.shape[:2]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleIntercept, ds.RescaleSlope = -1000 - k, 2  # another rescale in every slice
        ds.PixelData = np.rint((hu[:, :, k].T + 1000 + k) / 2).astype("<u2").tobytes()
        return ds

    def write_ct(self, hu: np.ndarray, skip=(), subfolder: str = "CT") -> list[Path]:
        order = np.random.default_rng(0).permutation(self.grid.shape[2])
        kept = [(n, k) for n, k in enumerate(order) if k not in skip]
        return [self.save(self.ct_slice(hu, k), f"{subfolder}/{n:03d}.dcm") for n, k in kept]

    def write_structures(self, rois: dict[str, list[np.ndarray]], kinds=None, name: str = "RS.dcm", **changes) -> Path:
        """``rois``: name -> contours ``(n, 3)`` in voxel indices."""
        ds = self.header(RTSTRUCT_SOP_CLASS, self.structures, "RTSTRUCT")
        ds.StructureSetLabel = "TEST"
        series, study, frame = Dataset(), Dataset(), Dataset()
        series.SeriesInstanceUID, series.ContourImageSequence = self.series, []
        study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = "1.2.840.10008.3.1.2.3.1", self.study
        study.RTReferencedSeriesSequence = [series]
        frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = self.frame, [study]
        ds.ReferencedFrameOfReferenceSequence = [frame]
        ds.StructureSetROISequence, ds.ROIContourSequence, ds.RTROIObservationsSequence = [], [], []
        for number, (roi, contours) in enumerate(rois.items(), 1):
            item, shape, observation = Dataset(), Dataset(), Dataset()
            item.ROINumber, item.ROIName, item.ReferencedFrameOfReferenceUID = number, roi.strip("!"), self.frame
            shape.ReferencedROINumber, shape.ContourSequence = number, [self._contour(c) for c in contours]
            observation.ObservationNumber = observation.ReferencedROINumber = number
            observation.RTROIInterpretedType, observation.ROIInterpreter = (kinds or {}).get(roi, ""), ""
            ds.StructureSetROISequence.append(item)
            if contours:
                ds.ROIContourSequence.append(shape)
            ds.RTROIObservationsSequence.append(observation)
        for keyword, value in changes.items():
            setattr(ds, keyword, value)
        return self.save(ds, name)

    def _contour(self, indices: np.ndarray) -> Dataset:
        item = Dataset()
        item.ContourGeometricType = "CLOSED_PLANAR" if len(indices) > 1 else "POINT"
        item.NumberOfContourPoints = len(indices)
        item.ContourData = [f"{v:.5f}" for v in self.grid.to_world(indices).ravel()]
        return item

    def write_plan(self, beams: list[dict], position: str = "HFS", prescription=(), name: str = "RP.dcm") -> Path:
        """``beams``: dicts with ``name``, ``angles``, and optionally direction, kind, delivery, meterset."""
        ds = self.header(RTPLAN_SOP_CLASS, self.plan, "RTPLAN")
        ds.RTPlanLabel = "PLAN"
        setup, group, reference = Dataset(), Dataset(), Dataset()
        setup.PatientPosition = position
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = RTSTRUCT_SOP_CLASS, self.structures
        ds.PatientSetupSequence, ds.ReferencedStructureSetSequence = [setup], [reference]
        group.FractionGroupNumber, group.NumberOfFractionsPlanned, group.ReferencedBeamSequence = 1, 35, []
        ds.FractionGroupSequence, ds.BeamSequence, ds.DoseReferenceSequence = [group], [], []
        for number, beam in reversed(list(enumerate(beams, 1))):
            ds.BeamSequence.append(self._beam(number, beam))
            link = Dataset()
            link.ReferencedBeamNumber = number
            if beam.get("meterset", 100) is not None:
                link.BeamMeterset = beam.get("meterset", 100)
            group.ReferencedBeamSequence.append(link)
        for item in prescription:
            entry = Dataset()
            for keyword, value in item.items():
                setattr(entry, keyword, value)
            ds.DoseReferenceSequence.append(entry)
        return self.save(ds, name)

    def _beam(self, number: int, beam: dict) -> Dataset:
        item = Dataset()
        item.BeamNumber, item.BeamName, item.BeamType = number, beam["name"], beam.get("kind", "STATIC")
        item.TreatmentDeliveryType, item.RadiationType = beam.get("delivery", "TREATMENT"), "PHOTON"
        item.ControlPointSequence = []
        for n, angle in enumerate(beam["angles"]):
            point = Dataset()
            point.ControlPointIndex = n
            if n == 0:
                point.IsocenterPosition = [1.0, 2.0, 3.0]
                point.PatientSupportAngle = 0
                point.GantryRotationDirection = beam.get("direction", "NONE")
            if n == 0 or angle != beam["angles"][n - 1]:
                point.GantryAngle = angle
            item.ControlPointSequence.append(point)
        return item


def box(low, high, slices) -> list[np.ndarray]:
    """Rectangles between the corners ``low`` and ``high`` (index units) in every slice."""
    (a, b), (c, d) = low, high
    return [np.array([[a, b, k], [c, b, k], [c, d, k], [a, d, k]], dtype=float) for k in slices]


def head_and_neck(folder: Path, orientation: str = "HFS", **grid_options):
    """CT + RTSTRUCT with Body, PTV70, PTV56 and a cord; returns the study and its Hounsfield units."""
    study = Study(folder, oriented_grid(orientation, **grid_options))
    hu = np.random.default_rng(1).integers(-400, 400, study.grid.shape).astype(float) * 2
    hu -= hu % 2
    study.write_ct(hu + (np.arange(study.grid.shape[2]) % 2))  # the parity that each slice's own intercept can store
    slices = range(study.grid.shape[2])
    study.write_structures({
        "External ROI_1": box((0.6, 0.6), (22.4, 18.4), slices), "PTV70": box((5.5, 5.5), (9.5, 8.5), slices[3:8]),
        "PTV56": box((4.5, 4.5), (12.5, 9.5), slices[2:9]), "Cord": box((14.5, 12.5), (16.5, 14.5), slices),
        "Ring": box((1.5, 1.5), (3.5, 3.5), slices), "Parotid_L": [], "Isocentre": [np.array([[3.0, 3.0, 3.0]])],
    })
    return study, hu + (np.arange(study.grid.shape[2]) % 2)
