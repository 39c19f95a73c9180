"""Whole studies: any orientation, one CT list for image and masks, and errors that say what to do."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from pydicom.uid import generate_uid

from custom.case import CaseError, Site, Technique
from custom.io import find_cases, read_case, write_rtdose
from custom.io.ct import CT_SOP_CLASS, read_ct
from custom.io.dicom_folder import scan_dicom
from custom.io.rtstruct import rasterise, read_rtstruct
from tests.io.dicom_builder import Study, box, head_and_neck, oriented_grid

FIELDS = [{"name": f"F{a}", "angles": [a, a]} for a in (0, 90)]


@pytest.mark.parametrize("orientation", ["HFS", "HFP", "FFS", "FFP", "oblique"])
def test_image_and_masks_lie_where_they_were_written(tmp_path, orientation):
    study, hu = head_and_neck(tmp_path / "anna", orientation)
    case = read_case(tmp_path / "anna")
    assert case.name == "anna"
    assert case.grid.same_as(study.grid)
    np.testing.assert_array_equal(case.ct_hu, hu)
    expected = np.zeros(case.grid.shape, bool)
    expected[6:10, 6:9, 3:8] = True
    np.testing.assert_array_equal(case.masks["PTV_7000"], expected)
    assert case.masks["SpinalCord"][15:17, 13:15].all() and case.masks["SpinalCord"].sum() == 4 * 12
    assert case.prescription_gy == {"PTV_7000": 70.0, "PTV_5600": 56.0}
    assert len(case.beams) == 9 and case.technique == Technique.IMRT and case.site == Site.HEAD_NECK


def test_notes_tell_what_was_assumed_and_left_out(tmp_path):
    head_and_neck(tmp_path)
    notes = "\n".join(read_case(tmp_path).source["notes"])
    for part in ("Parotid_L", "Isocentre", "Ring", "imrt9", "target names"):
        assert part in notes


def test_target_in_a_lung_cut_by_the_image_belongs_to_the_body(tmp_path):
    """Without an external contour the Body is what is dense; air open to the edge is not, but a target in it is."""
    study = Study(tmp_path, oriented_grid())
    hu = np.zeros(study.grid.shape)
    hu[:8] = -800.0
    study.write_ct(hu)
    study.write_structures({"PTV60": box((3.5, 5.5), (11.5, 9.5), range(3, 8))})
    case = read_case(tmp_path)
    inside = case.masks["PTV_6000"]
    assert inside[4:12, 6:10, 3:8].all() and not (inside & ~case.body).any()
    assert case.body[10:20, 4:16].all() and case.body[:8].sum() == inside[:8].sum() == 4 * 4 * 5
    assert any("outside the Body" in note for note in case.source["notes"])


def test_plan_gives_beams_and_reference_dose_comes_along(tmp_path):
    study, _ = head_and_neck(tmp_path, "HFP")
    study.write_plan(FIELDS, position="HFP")
    references = read_case(tmp_path).source["references"]
    coarse = oriented_grid("HFP", shape=(12, 10, 12), spacing_mm=(4.0, 5.0, 3.0))
    ramp = np.arange(12.0)[:, None, None] * np.ones(coarse.shape)
    write_rtdose(tmp_path / "RD.dcm", ramp, coarse, references)
    case = read_case(tmp_path)
    assert [b.gantry_deg for b in case.beams] == [(270.0,), (180.0,)]  # prone: turned by 180 degrees
    assert case.beams[0].isocenter_mm == (1.0, 2.0, 3.0)
    assert references["PatientName"] == "Doe^Jane" and references["RTPlanSOPInstanceUID"] == study.plan
    assert case.dose_grid.same_as(coarse)
    np.testing.assert_allclose(case.dose_gy[:22, 5, 5], np.arange(22) / 2, atol=1e-5)


def test_dose_of_another_plan_in_the_folder_is_no_reference(tmp_path):
    study, _ = head_and_neck(tmp_path)
    study.write_plan(FIELDS)
    references = read_case(tmp_path).source["references"]
    own, study.plan, study.structures = study.plan, generate_uid(), generate_uid()
    study.write_plan(FIELDS, name="other.dcm")
    grid = oriented_grid()
    write_rtdose(tmp_path / "RD.dcm", np.ones(grid.shape), grid, {**references, "RTPlanSOPInstanceUID": study.plan})
    case = read_case(tmp_path)
    assert case.source["references"]["RTPlanSOPInstanceUID"] == own and case.dose_gy is None
    assert any("RD.dcm: of another RTPLAN" in note for note in case.source["notes"])


def test_targets_of_the_plan_whose_names_no_name_can_be_made_of(tmp_path):
    study, _ = head_and_neck(tmp_path)
    target = {"DoseReferenceType": "TARGET", "DoseReferenceStructureType": "VOLUME"}
    rois = {"Body": box((1, 1), (20, 18), range(12))}
    rois |= {name: box((5.5, 5.5), (9.5 + n, 8.5), range(3, 8)) for n, name in enumerate(["肿瘤", "P (1)", "P [1]"])}
    study.write_structures(rois, SpecificCharacterSet="ISO_IR 192")
    study.write_plan(FIELDS, prescription=[{**target, "TargetPrescriptionDose": gy, "ReferencedROINumber": number}
                                           for number, gy in ((2, 70), (3, 60), (4, 50))])
    case = read_case(tmp_path)
    assert case.prescription_gy == {"ROI_2": 70.0, "P_1": 60.0, "P_1_4": 50.0}
    volumes = [int(case.masks[name].sum()) for name in case.prescription_gy]
    assert volumes[0] < volumes[1] < volumes[2]


def test_structures_two_folders_away_from_their_ct(tmp_path):
    study, hu = head_and_neck(tmp_path / "P" / "StudyCT")
    first = (tmp_path / "P" / "StudyCT" / "RS.dcm")
    for name in "AB":
        place = tmp_path / "P" / "StudyRT" / name
        place.mkdir(parents=True)
        (place / "rs.dcm").write_bytes(first.read_bytes())
    first.unlink()
    cases = find_cases(tmp_path)
    assert [path.parent.name for path in cases] == ["A", "B"]
    for path in cases:
        np.testing.assert_array_equal(read_case(path).ct_hu, hu)


def test_prescription_of_the_plan_then_the_user(tmp_path):
    study, _ = head_and_neck(tmp_path)
    target = {"DoseReferenceType": "TARGET", "DoseReferenceStructureType": "VOLUME"}
    study.write_plan(FIELDS, prescription=[
        {**target, "TargetPrescriptionDose": 66, "ReferencedROINumber": 2},
        {**target, "TargetPrescriptionDose": 11, "DoseReferenceType": "ORGAN_AT_RISK"},
    ])
    case = read_case(tmp_path)
    assert case.prescription_gy == pytest.approx({"PTV_7000": 66.0, "PTV_5600": 56.0 * 66 / 70})
    assert read_case(tmp_path, prescription_gy=70).prescription_gy == {"PTV_7000": 70.0, "PTV_5600": 56.0}
    case = read_case(tmp_path, prescription_gy={"PTV70": 69, "PTV_5600": 54})
    assert case.prescription_gy == {"PTV_7000": 69.0, "PTV_5600": 54.0}
    with pytest.raises(CaseError, match="PTV60"):
        read_case(tmp_path, prescription_gy={"PTV60": 60})


def test_no_prescription_lists_the_rois(tmp_path):
    study, hu = head_and_neck(tmp_path)
    body, target = box((1, 1), (20, 18), range(12)), box((5.5, 5.5), (9.5, 8.5), range(3, 8))
    study.write_structures({"Body": body, "PTV_A": target})
    with pytest.raises(CaseError, match="no prescription.*'Body', 'PTV_A'"):
        read_case(tmp_path)
    assert read_case(tmp_path, prescription_gy=60).prescription_gy == {"PTV_A": 60.0}
    study.write_structures({"Body": body, "Bed": target})
    with pytest.raises(CaseError, match="roi_map"):
        read_case(tmp_path, prescription_gy=60)
    assert read_case(tmp_path, prescription_gy=60, roi_map={"Bed": "PTV"}).prescription_gy == {"PTV": 60.0}


def test_body_from_the_ct_when_no_contour_is_there(tmp_path):
    study = Study(tmp_path, oriented_grid())
    hu = np.full(study.grid.shape, -1000.0)
    hu[3:20, 3:17] = 0
    hu[8:10, 8:10] = -1000  # air inside belongs to the body
    hu -= (hu + np.arange(12)) % 2
    study.write_ct(hu)
    study.write_structures({"PTV50": box((5.5, 5.5), (9.5, 8.5), range(3, 8))})
    case = read_case(tmp_path, default_beams="vmat2")
    inside = np.zeros(case.grid.shape, bool)
    inside[4:19, 4:16] = True  # opening may round the corners
    assert case.body[inside].all() and case.body.sum() <= 17 * 14 * 12
    assert any("-400 HU" in n for n in case.source["notes"])
    assert case.technique == Technique.VMAT and len(case.beams) == 2 and case.beams[0].is_arc


def test_a_series_beside_the_right_one_is_left_out(tmp_path):
    study, hu = head_and_neck(tmp_path)
    other = Study(tmp_path, study.grid)
    other.frame = study.frame
    other.write_ct(hu * 0 - 500 - (np.arange(12) % 2), subfolder="other")
    case = read_case(tmp_path)
    np.testing.assert_array_equal(case.ct_hu, hu)
    assert any("1 other CT series" in n for n in case.source["notes"])


def test_structures_of_another_image_are_refused(tmp_path):
    study, hu = head_and_neck(tmp_path)
    study.write_structures({"PTV70": box((5.5, 5.5), (9.5, 8.5), range(30, 40))})
    with pytest.raises(CaseError, match="contours lie in the slices"):
        read_case(tmp_path)
    stranger = Study(tmp_path / "other", study.grid)
    stranger.write_structures({"PTV70": box((5.5, 5.5), (9.5, 8.5), range(3, 8))})
    (tmp_path / "RS.dcm").unlink()
    with pytest.raises(CaseError, match="frame of reference"):
        read_case(tmp_path)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(CaseError, match="no such file"):
        read_case(tmp_path / "nowhere")
    with pytest.raises(CaseError, match="no case found"):
        find_cases(tmp_path)
    study, _ = head_and_neck(tmp_path)
    (tmp_path / "RS.dcm").unlink()
    with pytest.raises(CaseError, match="no RTSTRUCT; found CT"):
        read_case(tmp_path)


def test_cases_are_found_nested_and_mixed(tmp_path):
    head_and_neck(tmp_path / "b" / "dicom")
    study, _ = head_and_neck(tmp_path / "a" / "images")
    study.folder = tmp_path / "a"
    study.write_plan(FIELDS)
    (tmp_path / "a" / "notes.txt").write_text("not DICOM")
    assert find_cases(tmp_path) == [tmp_path / "a", tmp_path / "b" / "dicom"]
    assert len(read_case(tmp_path / "a").beams) == 2
    assert [read_case(p).name for p in find_cases(tmp_path)] == ["a", "b"]


def test_two_patients_in_one_folder(tmp_path):
    for name in ("one", "two"):
        study, _ = head_and_neck(tmp_path / name)
        for path in sorted((tmp_path / name).rglob("*.dcm")):
            path.rename(tmp_path / f"{name}_{path.name}")
    cases = find_cases(tmp_path)
    assert [p.name for p in cases] == ["one_RS.dcm", "two_RS.dcm"]
    with pytest.raises(CaseError, match="2 RTSTRUCTs"):
        read_case(tmp_path)
    assert [read_case(p).name for p in cases] == ["one_RS", "two_RS"]


@pytest.mark.parametrize("names", [
    ("Cord", "PTV_70cf", "R Parotid", "lips"), pytest.param((), marks=pytest.mark.slow, id="all above 5 cc"),
])
def test_real_head_and_neck_patient(shared_dir, tmp_path, names):
    """The masks of the OnkoDICOM patient agree with the masks that came with it."""
    sitk = pytest.importorskip("SimpleITK")
    archive = shared_dir / "dicom" / "hn_onkodicom.zip"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    files = scan_dicom(tmp_path)
    ct = read_ct([f.path for f in files if f.sop_class == CT_SOP_CLASS])
    structures = read_rtstruct(next(f.path for f in files if f.modality == "RTSTRUCT"))
    compared = 0
    for path in sorted((tmp_path / "masks").glob("*.nrrd")):
        if names and path.stem not in names:
            continue
        roi = next((r for r in structures.rois if r.name == path.stem), None)
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0) > 0
        if roi is None or truth.sum() * ct.grid.voxel_cc < 5:
            continue
        mask = rasterise(roi, ct.grid)
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) >= 0.99, path.stem
        compared += 1
    assert compared == len(names) or compared >= 20
