"""One small function for each way in which a good synthetic study goes bad; each takes the study's folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLSLossless, RLELossless, generate_uid

from custom.io import read_case, write_rtdose
from custom.io.rtplan import ION_PLAN_SOP_CLASS
from tests.io.dicom_builder import Study, head_and_neck, oriented_grid

MR, PET, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.2.1"
FIELDS = [{"name": f"F{a}", "angles": [a, a]} for a in (0, 90)]
TARGET = {"DoseReferenceType": "TARGET", "DoseReferenceStructureType": "VOLUME", "TargetPrescriptionDose": 70,
          "ReferencedROINumber": 2}


def good_study(folder: Path, orientation: str = "HFS") -> Study:
    """CT, RS.dcm, RP.dcm and RD.dcm of one patient; the dose rises along ``i``."""
    study, _ = head_and_neck(folder, orientation)
    study.write_plan(FIELDS, position=orientation if orientation in ("HFS", "FFS", "HFP") else "HFS",
                     prescription=[TARGET])
    for beam in (plan := pydicom.dcmread(folder / "RP.dcm")).BeamSequence:
        beam.ControlPointSequence[0].IsocenterPosition = [round(v, 3) for v in study.grid.to_world((8, 7, 5))]
    plan.save_as(folder / "RP.dcm")
    ramp = np.arange(24.0)[:, None, None] * np.ones(study.grid.shape)
    write_rtdose(folder / "RD.dcm", ramp, study.grid, read_case(folder).source["references"])
    return study


# ------------------------------------------------------------------------------------------------------ tools
def slices(folder: Path) -> list[Path]:
    """CT files in the order of ``k``."""
    return sorted((folder / "CT").iterdir(), key=lambda p: along_normal(pydicom.dcmread(p)))


def along_normal(ds: Dataset) -> float:
    row, column = np.array(ds.ImageOrientationPatient, dtype=float).reshape(2, 3)
    return float(np.cross(row, column) @ np.array(ds.ImagePositionPatient, dtype=float))


@contextmanager
def edit(path: Path) -> Iterator[Dataset]:
    ds = pydicom.dcmread(path, force=True)
    yield ds
    ds.save_as(path)


def on_every_slice(change: Callable[[Dataset], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for path in slices(folder):
            with edit(path) as ds:
                change(ds)
    return damage


def on_slice(change: Callable[[Dataset], None], number: int = 4) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with edit(slices(folder)[number]) as ds:
            change(ds)
    return damage


def on(name: str, change: Callable[[Dataset], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with edit(folder / name) as ds:
            change(ds)
    return damage


def put(**values) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        for keyword, value in values.items():
            setattr(ds, keyword, value)
    return change


def drop(*keywords: str) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        for keyword in keywords:
            delattr(ds, keyword)
    return change


def put_raw(tag: int, value: bytes) -> Callable[[Dataset], None]:
    """A value that pydicom would refuse to write."""
    def change(ds: Dataset) -> None:
        vr = ds[tag].VR
        ds[tag] = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(tag), vr, len(value), value, 0, False, True)
    return change


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:int(share * len(content))])
    return damage


def contours_of(ds: Dataset, name: str):
    number = next(int(r.ROINumber) for r in ds.StructureSetROISequence if r.ROIName == name)
    return next(c for c in ds.ROIContourSequence if int(c.ReferencedROINumber) == number).ContourSequence


def on_contours(name: str, change: Callable[[Dataset, np.ndarray], None]) -> Callable[[Path], None]:
    """``change(contour, points)`` on every contour of one ROI."""
    def damage(folder: Path) -> None:
        with edit(folder / "RS.dcm") as ds:
            for contour in contours_of(ds, name):
                change(contour, np.array(contour.ContourData, dtype=float).reshape(-1, 3))
    return damage


def rename(old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with edit(folder / "RS.dcm") as ds:
            ds.SpecificCharacterSet = "ISO_IR 192"
            next(r for r in ds.StructureSetROISequence if r.ROIName == old).ROIName = new
    return damage


# ------------------------------------------------------------------------------------------------------ CT
def missing_slice(folder: Path) -> None:
    slices(folder)[5].unlink()


def missing_end(folder: Path) -> None:
    for path in slices(folder)[6:]:
        path.unlink()


def only_one_slice(folder: Path) -> None:
    for path in slices(folder)[1:]:
        path.unlink()


def same_slice_twice(folder: Path) -> None:
    shutil.copy(slices(folder)[3], folder / "CT" / "copy.dcm")


def two_slices_at_one_place(folder: Path) -> None:
    same_slice_twice(folder)
    with edit(folder / "CT" / "copy.dcm") as ds:
        ds.SOPInstanceUID = generate_uid()


def reordered(folder: Path) -> None:
    files = slices(folder)
    for n, path in enumerate(files):
        with edit(path) as ds:
            ds.InstanceNumber, ds.SliceLocation = (n * 5) % 12, -n
        path.rename(path.with_name(f"z{(n * 7) % 12}.dcm"))


def cut_slice(share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = slices(folder)[4]
        cut(f"CT/{path.name}", share)(folder)
    return damage


def shift(k: int, mm: float, axis: int = 2) -> Callable[[Path], None]:
    def change(ds: Dataset) -> None:
        position = [float(v) for v in ds.ImagePositionPatient]
        position[axis] += mm
        ds.ImagePositionPatient = position
    return on_slice(change, k)


def tilt(ds: Dataset) -> None:
    x, y, z = (float(v) for v in ds.ImagePositionPatient)
    ds.ImagePositionPatient = [x, y + 0.1 * z, z]


def second_series(folder: Path) -> None:
    """Another series of the same scan; the structures name theirs."""
    for n, path in enumerate(slices(folder)):
        ds = pydicom.dcmread(path)
        ds.SeriesInstanceUID, ds.SOPInstanceUID = "1.2.3.4", generate_uid()
        ds.save_as(folder / "CT" / f"other_{n}.dcm")


def second_series_no_reference(folder: Path) -> None:
    second_series(folder)
    with edit(folder / "RS.dcm") as ds:
        del ds.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence


def two_patients(folder: Path) -> None:
    good_study(folder / "second")


def rle(folder: Path) -> None:
    for path in slices(folder):
        ds = pydicom.dcmread(path)
        ds.compress(RLELossless)
        ds.save_as(path)


def jpeg_ls(ds: Dataset) -> None:
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xf7" + b"\0" * 60])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEGLSLossless


def deflated(folder: Path) -> None:
    path = slices(folder)[4]
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(path)


def enhanced(ds: Dataset) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ENHANCED_CT


def of_class(uid: str, modality: str) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = uid
        ds.Modality = modality
    return change


def scout(folder: Path) -> None:
    ds = pydicom.dcmread(slices(folder)[0])
    ds.ImageType, ds.SOPInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], generate_uid()
    ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    ds.save_as(folder / "CT" / "scout.dcm")


def strangers(folder: Path) -> None:
    """Files that are no DICOM and do not claim to be."""
    (folder / "._slice.dcm").write_bytes(b"\0" * 40)
    (folder / "DICOMDIR").write_bytes(b"\0" * 40)
    (folder / "dvh.csv").write_text("a,b\n")
    (folder / "readme").write_text("hello")


def garbage_dcm(folder: Path) -> None:
    (folder / "CT" / "noise.dcm").write_bytes(np.random.default_rng(0).bytes(4000))


def pipe(folder: Path) -> None:
    """Opening it for reading would wait for ever."""
    os.mkfifo(folder / "CT" / "pipe.dcm")


def no_preamble(folder: Path) -> None:
    """As some systems export: no preamble and no file meta information (implicit VR)."""
    for path in slices(folder):
        ds = pydicom.dcmread(path)
        bare = Dataset({e.tag: e for e in ds})
        with path.open("wb") as stream:
            buffer = pydicom.filebase.DicomFileLike(stream)
            buffer.is_little_endian, buffer.is_implicit_VR = True, True
            pydicom.filewriter.write_dataset(buffer, bare)


# ------------------------------------------------------------------------------------------------------ RTSTRUCT
def two_structure_sets(folder: Path) -> None:
    (folder / "RP.dcm").unlink()
    (folder / "RD.dcm").unlink()
    with edit(folder / "RS.dcm") as ds:
        ds.SOPInstanceUID = generate_uid()
        ds.save_as(folder / "RS2.dcm")


def no_contours(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with edit(folder / "RS.dcm") as ds:
            contours_of(ds, name).clear()
    return damage


def moved(mm, *names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            on_contours(name, lambda item, points: put(
                ContourData=[f"{v:.4f}" for v in (points + mm).ravel()])(item))(folder)
    return damage


def open_contours(item: Dataset, points: np.ndarray) -> None:
    item.ContourGeometricType = "OPEN_NONPLANAR"


def one_point(item: Dataset, points: np.ndarray) -> None:
    item.ContourGeometricType, item.NumberOfContourPoints = "POINT", 1
    item.ContourData = [f"{v:.4f}" for v in points[0]]


def with_nan(item: Dataset, points: np.ndarray) -> None:
    put_raw(0x30060050, b"1.0\\nan\\2.0 ")(item)


def not_triplets(item: Dataset, points: np.ndarray) -> None:
    item.ContourData = [f"{v:.4f}" for v in points.ravel()[:-1]]


def letters(item: Dataset, points: np.ndarray) -> None:
    put_raw(0x30060050, b"a\\b\\c ")(item)


def bent(item: Dataset, points: np.ndarray) -> None:
    points[:, 2] += np.linspace(0, 12, len(points))
    item.ContourData = [f"{v:.4f}" for v in points.ravel()]


def with_hole(folder: Path) -> None:
    """A second contour inside the first: the hole."""
    with edit(folder / "RS.dcm") as ds:
        items = contours_of(ds, "PTV56")
        for item in list(items):
            points = np.array(item.ContourData, dtype=float).reshape(-1, 3)
            inner = points.mean(axis=0) + (points - points.mean(axis=0)) * 0.5
            hole = Dataset()
            hole.ContourGeometricType, hole.NumberOfContourPoints = "CLOSED_PLANAR", len(inner)
            hole.ContourData = [f"{v:.4f}" for v in inner.ravel()]
            items.append(hole)


# ------------------------------------------------------------------------------------------------------ RTPLAN, RTDOSE
def setup_field(folder: Path) -> None:
    rewrite_plan(folder, [*FIELDS, {"name": "CBCT", "angles": [0, 0], "meterset": None, "delivery": "SETUP"}], [TARGET])


def without_prescription(folder: Path) -> None:
    rewrite_plan(folder, FIELDS, [])


def rewrite_plan(folder: Path, beams: list[dict], prescription: list[dict]) -> None:
    old, ct = pydicom.dcmread(folder / "RP.dcm"), pydicom.dcmread(slices(folder)[0])
    study = Study(folder, oriented_grid())
    study.study, study.frame, study.plan = ct.StudyInstanceUID, ct.FrameOfReferenceUID, old.SOPInstanceUID
    study.structures = old.ReferencedStructureSetSequence[0].ReferencedSOPInstanceUID
    study.write_plan(beams, prescription=prescription)


def isocentre(*points) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        for beam, point in zip(ds.BeamSequence, points):
            beam.ControlPointSequence[0].IsocenterPosition = list(point)
    return change


def ion_plan(ds: Dataset) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ION_PLAN_SOP_CLASS


def copy_of(name: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        ds = pydicom.dcmread(folder / name)
        ds.SOPInstanceUID = generate_uid()
        ds.save_as(folder / new)
    return damage


def in_cgy(ds: Dataset) -> None:
    ds.DoseUnits, ds.DoseGridScaling = "CGY", f"{float(ds.DoseGridScaling) * 100:.10e}"[:16]


def reversed_frames(ds: Dataset) -> None:
    frames = ds.pixel_array[::-1]
    offsets = [float(v) for v in ds.GridFrameOffsetVector]
    ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], float(ds.ImagePositionPatient[2]) + offsets[-1]]
    ds.GridFrameOffsetVector = [-v for v in offsets]
    ds.PixelData = frames.tobytes()


def planar(ds: Dataset) -> None:
    ds.PixelData = ds.pixel_array[0].tobytes()
    ds.NumberOfFrames, ds.GridFrameOffsetVector = 1, 0.0
