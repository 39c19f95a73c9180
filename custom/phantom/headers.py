"""What every DICOM object of a synthetic study shares: patient, study, identifiers that a patient name fixes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

__all__ = ["DATE", "TIME", "Study", "number", "reference", "save"]

DATE, TIME = "20240101", "120000"
IMPLEMENTATION_UID = generate_uid(entropy_srcs=["synthetic radiotherapy study writer"])


@dataclass(frozen=True)
class Study:
    """Identity of one synthetic study; every UID follows from ``patient_id``, so files repeat byte for byte."""

    patient_id: str

    def uid(self, *parts: object) -> str:
        """The UID of the part of the study with this name."""
        return generate_uid(entropy_srcs=["/".join(str(p) for p in ("synthetic", self.patient_id, *parts))])

    def header(self, sop_class: str, sop_uid: str, modality: str, series_number: int, description: str) -> FileDataset:
        """A dataset with the patient, study, series, equipment and SOP common modules filled in (PS3.3 C.7, C.12)."""
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, sop_uid
        meta.TransferSyntaxUID, meta.ImplementationClassUID = ExplicitVRLittleEndian, IMPLEMENTATION_UID
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = sop_class, sop_uid, modality
        ds.PatientName, ds.PatientID = f"SYNTHETIC^{self.patient_id}", self.patient_id
        ds.PatientSex = "O"
        ds.SeriesInstanceUID, ds.SeriesNumber = self.uid(modality, "series"), series_number
        ds.ManufacturerModelName, ds.SoftwareVersions, ds.DeviceSerialNumber = "parametric phantom", "1", "0"
        ds.FrameOfReferenceUID = self.uid("frame of reference")
        self.stamp(ds, description)
        return ds

    def stamp(self, ds: Dataset, description: str) -> None:
        """Fill in (or overwrite) the study, the fixed dates and the mark that the subject is a phantom."""
        ds.StudyInstanceUID, ds.StudyID = self.uid("study"), "1"
        ds.StudyDescription, ds.SeriesDescription = "Synthetic phantom, no patient data", description
        ds.InstanceCreationDate = ds.StudyDate = ds.SeriesDate = DATE
        ds.InstanceCreationTime = ds.StudyTime = ds.SeriesTime = TIME
        ds.PatientBirthDate = ds.AccessionNumber = ds.ReferringPhysicianName = ds.OperatorsName = ""
        ds.PositionReferenceIndicator = ""
        ds.Manufacturer = "synthetic"
        ds.QualityControlSubject = "YES"


def reference(sop_class: str, sop_uid: str) -> Dataset:
    """One item of a sequence that references a SOP instance."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_uid
    return item


def number(value: float, decimals: int = 3) -> str:
    """A decimal string (DS) without trailing zeros."""
    text = f"{float(value):.{decimals}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def save(ds: FileDataset, path: Path) -> None:
    """Write a DICOM file with its meta header (pydicom 2.4 and 3)."""
    if int(pydicom.__version__.split(".")[0]) >= 3:
        ds.save_as(path, enforce_file_format=True)
    else:
        ds.is_little_endian, ds.is_implicit_VR = True, ds.file_meta.TransferSyntaxUID.is_implicit_VR
        ds.save_as(path, write_like_original=False)
