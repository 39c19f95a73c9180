"""The catalogue of damaged DICOM studies: each gives the right result or one message, never a wrong one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from custom.case import Case, CaseError
from custom.io import find_cases, read_case
from tests.bad_input import damage as d

OTHER_FRAME = d.put(FrameOfReferenceUID="1.2.3.99")
OTHER_PATIENT = d.put(PatientID="ID-4711")

REFUSED = {  # name: (damage, what the message says, besides the file or folder)
    # CT
    "missing slice": (d.missing_slice, "CT slices are missing between"),
    "missing end of the scan": (d.missing_end, "of its volume lies outside the CT"),
    "a single slice": (d.only_one_slice, "at least two"),
    "two slices at one place": (d.two_slices_at_one_place, "two different slices at the same position"),
    "slice cut in its pixels": (d.cut_slice(0.9), "cut short in PixelData"),
    "slice cut in its header": (d.cut_slice(0.15), "empty, cut short"),
    "empty slice": (d.cut_slice(0.0), "empty, cut short"),
    "uneven spacing": (d.shift(4, 0.5), "uniform series"),
    "gantry tilt": (d.on_every_slice(d.tilt), "gantry tilt"),
    "two series, none referenced": (d.second_series_no_reference, "several CT series"),
    "two patients in a folder": (d.two_patients, "2 RTSTRUCTs"),
    "slice of another patient": (d.on_slice(OTHER_PATIENT), "another PatientID"),
    "slice of another frame of reference": (d.on_slice(OTHER_FRAME), "another FrameOfReferenceUID"),
    "CT in another frame of reference": (d.on_every_slice(OTHER_FRAME), "frame"),
    "CT of another patient": (d.on_every_slice(OTHER_PATIENT), "another PatientID"),
    "enhanced multi-frame CT": (d.on_every_slice(d.enhanced), "multi-frame"),
    "several frames in a CT image": (d.on_slice(d.put(NumberOfFrames=2)), "single-frame"),
    "compressed, no decoder": (d.on_every_slice(d.jpeg_ls), "install python-gdcm"),
    "deflated": (d.deflated, "deflated"),
    "MR instead of CT": (d.on_every_slice(d.of_class(d.MR, "MR")), "no CT image; found MR"),
    "PET instead of CT": (d.on_every_slice(d.of_class(d.PET, "PT")), "no CT image; found PT"),
    "no rescale": (d.on_every_slice(d.drop("RescaleSlope", "RescaleIntercept")), "Hounsfield"),
    "rescale slope 0": (d.on_slice(d.put(RescaleSlope=0)), "RescaleSlope"),
    "wrong rescale intercept": (d.on_every_slice(d.put(RescaleIntercept=1000)), "not in Hounsfield units"),
    "effective atomic number": (d.on_every_slice(d.put(RescaleType="Z_EFF")), "RescaleType"),
    "huge matrix": (d.on_every_slice(d.put(Rows=60000, Columns=60000)), "voxels"),
    "another matrix in one slice": (d.on_slice(d.put(Rows=10)), "one matrix"),
    "another orientation in one slice": (d.on_slice(d.put(ImageOrientationPatient=[0, 1, 0, 1, 0, 0])), "orientation"),
    "orientation that is none": (d.on_every_slice(d.put(ImageOrientationPatient=[1, 0, 0, 1, 0, 0])), "unit vectors"),
    "pixel size 0": (d.on_every_slice(d.put(PixelSpacing=[0, 0])), "PixelSpacing"),
    "no pixel size": (d.on_slice(d.drop("PixelSpacing")), "no PixelSpacing"),
    "position that is no number": (d.on_slice(d.put_raw(0x00200032, b"nan\\0\\1 ")), "ImagePositionPatient"),
    "position infinite": (d.on_slice(d.put_raw(0x00200032, b"0\\inf\\1 ")), "ImagePositionPatient"),
    "pixel size not finite": (d.on_every_slice(d.put_raw(0x00280030, b"nan\\3 ")), "PixelSpacing"),
    "pixel size infinite": (d.on_slice(d.put_raw(0x00280030, b"inf\\inf ")), "PixelSpacing"),
    "orientation not finite": (d.on_every_slice(d.put_raw(0x00200037, b"1\\0\\0\\0\\nan\\0 ")),
                               "ImageOrientation|unit vec"),
    "rescale slope not finite": (d.on_slice(d.put_raw(0x00281053, b"nan ")), "RescaleSlope"),
    "rescale intercept infinite": (d.on_every_slice(d.put_raw(0x00281052, b"-inf")), "RescaleIntercept"),
    "position of letters": (d.on_slice(d.put_raw(0x00200032, b"a\\b\\c ")), "cannot be read"),
    "noise called .dcm": (d.garbage_dcm, "no DICOM file at all"),
    "pipe called .dcm": (d.pipe, "no DICOM file at all"),
    # RTSTRUCT
    "no RTSTRUCT": (lambda f: (f / "RS.dcm").unlink(), "no RTSTRUCT; found CT"),
    "RTSTRUCT cut short": (d.cut("RS.dcm", 0.7), "RS.dcm.*cut short"),
    "RTSTRUCT cut to its header": (d.cut("RS.dcm", 0.02), "RS.dcm.*cut short"),
    "two RTSTRUCTs": (d.two_structure_sets, "2 RTSTRUCTs"),
    "RTSTRUCT of another CT": (d.moved([0, 0, 500], "External ROI_1", "PTV70", "PTV56", "Cord"), "another image"),
    "RTSTRUCT of another patient": (d.on("RS.dcm", OTHER_PATIENT), "RS.dcm: another PatientID"),
    "target without contours": (d.no_contours("PTV70"), "prescribes 70 Gy to 'PTV70', which has no closed contour"),
    "target partly outside": (d.moved([0, 0, 15], "PTV70"), "'PTV70': .* outside the CT"),
    "target wholly outside": (d.moved([500, 0, 0], "PTV70"), "'PTV70'"),
    "no target": (lambda f: (d.rename("PTV70", "Liver")(f), d.rename("PTV56", "Spleen")(f), d.without_prescription(f)),
                  "no target.*'Liver'.*roi_map"),
    "two targets of one name": (d.rename("PTV56", "PTV70"), "carry the same name 'PTV70'"),
    "contour point not finite": (d.on_contours("Cord", d.with_nan), "'Cord' has contour points that are not finite"),
    "contour of letters": (d.on_contours("Cord", d.letters), "'Cord' has contour data that are no x, y, z"),
    "contour of two coordinates": (d.on_contours("Cord", d.not_triplets), "'Cord' has contour data that are no x, y"),
    "contours of another orientation": (d.on_contours("PTV70", d.bent), "'PTV70': a contour spans"),
    # RTPLAN
    "RTPLAN cut short": (d.cut("RP.dcm", 0.8), "RP.dcm.*cut short"),
    "two RTPLANs": (d.copy_of("RP.dcm", "RP2.dcm"), "2 RTPLANs"),
    "RTPLAN of another patient": (d.on("RP.dcm", OTHER_PATIENT), "RP.dcm: another PatientID"),
    "RTPLAN in another frame": (d.on("RP.dcm", OTHER_FRAME), "RP.dcm: lies in frame of reference"),
    "isocentre outside": (d.on("RP.dcm", d.isocentre((5000, 0, 0), (5000, 0, 0))), "mm outside the CT"),
    "isocentre not finite": (d.on("RP.dcm", lambda ds: d.put_raw(0x300A012C, b"nan\\0\\0 ")(
        ds.BeamSequence[0].ControlPointSequence[0])), "not a finite number"),
    "prescription in cGy": (d.on("RP.dcm", lambda ds: d.put(TargetPrescriptionDose=7000)(ds.DoseReferenceSequence[0])),
                            "7000 Gy"),
    # RTDOSE
    "RELATIVE dose": (d.on("RD.dcm", d.put(DoseUnits="RELATIVE")), "RELATIVE"),
    "erroneous dose": (d.on("RD.dcm", d.put(DoseType="ERROR")), "ERROR"),
    "dose without scaling": (d.on("RD.dcm", d.drop("DoseGridScaling")), "no DoseGridScaling"),
    "dose scaling not finite": (d.on("RD.dcm", d.put_raw(0x3004000E, b"nan ")), "DoseGridScaling"),
    "dose beyond reason": (d.on("RD.dcm", d.put(DoseGridScaling="0.01")), "Gy; expected 0 to 200"),
    "scalar offsets": (d.on("RD.dcm", d.put(GridFrameOffsetVector=0)), "GridFrameOffsetVector"),
    "uneven offsets": (d.on("RD.dcm", d.put(GridFrameOffsetVector=[0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 40])),
                       "uniform"),
    "planar dose": (d.on("RD.dcm", d.planar), "planar"),
    "dose cut short": (d.cut("RD.dcm", 0.9), "RD.dcm.*cut short"),
    "dose in another frame": (d.on("RD.dcm", OTHER_FRAME), "RD.dcm: lies in frame"),
    "two plan doses": (d.copy_of("RD.dcm", "RD2.dcm"), "several plan doses"),
    "dose of a huge matrix": (d.on("RD.dcm", d.put(Rows=60000, Columns=60000)), "voxels"),
}


def same(case: Case, good: Case) -> None:
    assert case.grid.same_as(good.grid)
    np.testing.assert_array_equal(case.ct_hu, good.ct_hu)
    assert set(case.masks) == set(good.masks)
    for name, mask in good.masks.items():
        np.testing.assert_array_equal(case.masks[name], mask)
    np.testing.assert_allclose(case.dose_gy, good.dose_gy, atol=1e-4)
    assert case.prescription_gy == good.prescription_gy and case.beams == good.beams


def notes(part: str, *absent: str):
    """The same case but for ROIs that are absent, with a note."""
    def check(case: Case, good: Case) -> None:
        assert any(part in note for note in case.source["notes"]), case.source["notes"]
        assert set(case.masks) == set(good.masks) - set(absent)
        assert case.grid.same_as(good.grid)
        np.testing.assert_array_equal(case.masks["PTV_7000"], good.masks["PTV_7000"])
    return check


def hole(case: Case, good: Case) -> None:
    before, after = good.masks["PTV_5600"], case.masks["PTV_5600"]
    assert 0 < after.sum() < before.sum() and not (after & ~before).any()


def default_beams(case: Case, good: Case) -> None:
    assert len(case.beams) == 9 and any("Ion Plan" in note for note in case.source["notes"])


def from_names(case: Case, good: Case) -> None:
    assert case.prescription_gy == {"PTV_7000": 70.0, "PTV_5600": 56.0}
    assert any("target names" in note for note in case.source["notes"])


def treating_only(case: Case, good: Case) -> None:
    assert {beam.name for beam in case.beams} == {"F0", "F90"}
    assert any("do not treat, left out: CBCT" in note for note in case.source["notes"])


HANDLED = {  # name: (damage, what must be true of the case that is read)
    "nothing": (lambda f: None, same),
    "reordered slices": (d.reordered, same),
    "the same slice twice": (d.same_slice_twice, same),
    "spacing with jitter": (d.shift(4, 0.02), notes("slice distances vary")),
    "two series, one referenced": (d.second_series, same),
    "RLE compressed": (d.rle, same),
    "localizer": (d.scout, same),
    "files that are no DICOM": (d.strangers, same),
    "no preamble": (d.no_preamble, same),
    "another study": (d.on("RS.dcm", d.put(StudyInstanceUID="1.2.3")), notes("another study")),
    "organ without contours": (d.no_contours("Cord"), notes("taken as absent", "SpinalCord")),
    "open contours": (d.on_contours("Cord", d.open_contours), notes("taken as absent", "SpinalCord")),
    "contours of one point": (d.on_contours("Cord", d.one_point), notes("taken as absent", "SpinalCord")),
    "organ partly outside": (d.moved([0, 0, 15], "Cord"), notes("outside the image")),
    "contour in a contour": (d.with_hole, hole),
    "unicode ROI name": (d.rename("Cord", "Moelle épinière"), same),
    "two ROIs for one organ": (d.rename("Ring", "SpinalCord"), notes("several candidates")),
    "two ROIs of one name": (d.rename("Ring", "Cord"), notes("several ROIs are called 'Cord'")),
    "plan without prescription": (d.without_prescription, from_names),
    "plan with a setup field": (d.setup_field, treating_only),
    "several isocentres": (d.on("RP.dcm", d.isocentre((-4.0, 25.0, 46.0), (0.0, 25.0, 46.0))),
                           notes("several isocentres")),
    "ion plan": (d.on("RP.dcm", d.ion_plan), default_beams),
    "dose in cGy": (d.on("RD.dcm", d.in_cgy), same),
    "frames from the top": (d.on("RD.dcm", d.reversed_frames), same),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "anna"
    d.good_study(folder)
    return folder


@pytest.fixture(scope="module")
def good(study) -> Case:
    return read_case(study)


@pytest.fixture
def copy(study, tmp_path) -> Path:
    return Path(shutil.copytree(study, tmp_path / "anna"))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(copy, name):
    harm, message = REFUSED[name]
    harm(copy)
    with pytest.raises(CaseError, match=message) as caught:
        read_case(copy)
    text = str(caught.value)
    assert "anna" in text, "the message names the file or the folder"
    assert "Doe" not in text and "ID-4711" not in text, "and no patient"


@pytest.mark.parametrize("name", HANDLED)
def test_handled(copy, good, name):
    harm, check = HANDLED[name]
    harm(copy)
    check(read_case(copy), good)


@pytest.mark.parametrize("orientation", ["HFS", "HFP", "FFS", "FFP", "HFDL", "oblique"])
def test_every_position_of_the_patient(tmp_path, good, orientation):
    """The same structures in the same voxels, however the patient lies."""
    written = d.good_study(tmp_path / "anna", orientation)
    case = read_case(tmp_path / "anna")
    assert case.grid.same_as(written.grid, tolerance_mm=1e-3)
    for name in ("PTV_7000", "SpinalCord", "Body"):
        np.testing.assert_array_equal(case.masks[name], good.masks[name])
    np.testing.assert_allclose(case.dose_gy, good.dose_gy, atol=1e-3)


def test_incomplete_patients_of_a_folder_are_tried_and_others_left_alone(study, tmp_path):
    """Beside two good patients: one without structures, one whose CT is an MR; a plan alone is nobody."""
    for name in ("good_1", "good_2", "bare", "mr"):
        shutil.copytree(study, tmp_path / "all" / name / "files")
        for path in (tmp_path / "all" / name).rglob("*.dcm"):
            with d.edit(path) as ds:
                ds.PatientID = name
    (tmp_path / "all" / "bare" / "files" / "RS.dcm").unlink()
    d.on_every_slice(d.of_class(d.MR, "MR"))(tmp_path / "all" / "mr" / "files")
    (tmp_path / "all" / "other.npz").write_bytes(b"")
    (tmp_path / "plans").mkdir()
    found = find_cases(tmp_path)
    names = [path.relative_to(tmp_path / "all").parts[0] for path in found]
    assert names == ["bare", "good_1", "good_2", "mr", "other.npz"]
    with pytest.raises(CaseError, match="no RTSTRUCT"):
        read_case(found[0])
    with pytest.raises(CaseError, match="found MR"):
        read_case(found[3])
