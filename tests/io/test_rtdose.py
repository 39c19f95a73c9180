"""RTDOSE: what is written reads alike everywhere; what planning systems write is understood."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pydicom
import pytest

from custom.case import CaseError, Grid, resample
from custom.io.rtdose import PREDICTED, combine_doses, read_rtdose, write_rtdose
from tests.io.dicom_builder import oriented_grid

REFERENCES = {
    "PatientName": "Doe^Jane", "PatientID": "P1", "PatientBirthDate": "19700101", "PatientSex": "F",
    "StudyInstanceUID": "1.2.3", "StudyDate": "20240102", "StudyTime": "101112", "StudyID": "7",
    "AccessionNumber": "", "ReferringPhysicianName": "", "FrameOfReferenceUID": "1.2.4",
    "PositionReferenceIndicator": "", "RTPlanSOPInstanceUID": "1.2.5", "RTStructureSetSOPInstanceUID": "1.2.6",
    "PrescriptionGy": 70.0, "NumberOfFractions": 35,
}
ORIENTATIONS = ["HFS", "HFP", "FFS", "FFP", "oblique", "sagittal"]


def smooth_dose(grid: Grid) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.random(grid.shape) * 70).astype(np.float32)


def at_points(array, grid: Grid, points_mm) -> np.ndarray:
    index = np.rint(grid.to_index(points_mm)).astype(int)
    return array[tuple(index.T)]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("flip_k", [False, True])
def test_every_reader_finds_the_dose_at_the_same_patient_position(tmp_path, orientation, order, flip_k):
    sitk = pytest.importorskip("SimpleITK")
    grid = oriented_grid(orientation)
    affine = grid.affine[:, [*order, 3]].copy()
    shape = tuple(grid.shape[a] for a in order)
    if flip_k:
        affine[:3, 3] += affine[:3, 2] * (shape[2] - 1)
        affine[:3, 2] *= -1
    grid = Grid(shape, affine)
    dose = smooth_dose(grid)
    path = tmp_path / "RTDOSE.dcm"
    write_rtdose(path, dose, grid, REFERENCES)
    index = np.random.default_rng(1).integers(0, grid.shape, size=(200, 3))
    points = grid.to_world(index)
    expected = dose[tuple(index.T)]

    read = read_rtdose(path)
    np.testing.assert_allclose(at_points(read.gy, read.grid, points), expected, atol=0.01)
    np.testing.assert_allclose(resample(read.gy, read.grid, grid), dose, atol=1e-4)

    ds = pydicom.dcmread(path)  # by the standard's formula, PS3.3 C.7.6.2.1.1
    row, column = np.array(ds.ImageOrientationPatient, float).reshape(2, 3)
    offset = points - np.array(ds.ImagePositionPatient, float)
    at = (offset @ np.cross(row, column), offset @ column / float(ds.PixelSpacing[0]),
          offset @ row / float(ds.PixelSpacing[1]))
    frame = np.rint(at[0] / float(ds.GridFrameOffsetVector[1])).astype(int)
    stored = ds.pixel_array[frame, np.rint(at[1]).astype(int), np.rint(at[2]).astype(int)]
    np.testing.assert_allclose(stored * float(ds.DoseGridScaling), expected, atol=0.01)

    image = sitk.ReadImage(str(path))
    values = [image.GetPixel(*image.TransformPhysicalPointToIndex(p.tolist())) for p in points]
    np.testing.assert_allclose(np.array(values) * float(ds.DoseGridScaling), expected, atol=0.01)


def test_header_repeats_the_patient_and_marks_the_dose(tmp_path):
    path = tmp_path / "RTDOSE.dcm"
    grid = oriented_grid()
    write_rtdose(path, smooth_dose(grid), grid, REFERENCES)
    ds = pydicom.dcmread(path)
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "StudyDate"):
        assert str(ds[keyword].value) == REFERENCES[keyword]
    assert ds.SeriesDescription == ds.DoseComment == PREDICTED
    assert (ds.DoseSummationType, ds.DoseUnits, ds.BitsAllocated) == ("PLAN", "GY", 32)
    assert ds.ReferencedRTPlanSequence[0].ReferencedSOPInstanceUID == "1.2.5"
    assert ds.pixel_array.max() < 2**31 and "ReferencedStructureSetSequence" not in ds
    assert all(len(str(v.original_string)) <= 16 for v in ds.GridFrameOffsetVector)
    assert len(ds.DoseGridScaling.original_string) <= 16


def test_without_a_plan_the_dose_is_a_plan_overview(tmp_path):
    grid = oriented_grid()
    write_rtdose(tmp_path / "d.dcm", smooth_dose(grid), grid, {**REFERENCES, "RTPlanSOPInstanceUID": ""})
    ds = pydicom.dcmread(tmp_path / "d.dcm")
    overview = ds.PlanOverviewSequence[0]
    assert ds.DoseSummationType == "PLAN_OVERVIEW" and "ReferencedRTPlanSequence" not in ds
    assert overview.ReferencedStructureSetSequence[0].ReferencedSOPInstanceUID == "1.2.6"
    assert overview.PrescriptionOverviewSequence[0].TotalPrescriptionDose == 70


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-9, 1e3])
def test_extreme_doses(tmp_path, value):
    grid = oriented_grid()
    write_rtdose(tmp_path / "d.dcm", np.full(grid.shape, value, np.float32), grid, REFERENCES)
    np.testing.assert_allclose(read_rtdose(tmp_path / "d.dcm").gy, max(value, 0), atol=1e-6 * max(1, value))


@pytest.mark.parametrize("bits", [16, 32])
def test_quantisation(tmp_path, bits):
    grid = oriented_grid()
    dose = smooth_dose(grid)
    write_rtdose(tmp_path / "d.dcm", dose, grid, REFERENCES, bits=bits)
    np.testing.assert_allclose(read_rtdose(tmp_path / "d.dcm").gy, dose, atol=1e-3 if bits == 16 else 5e-6)


def test_nothing_is_left_of_a_failed_write(tmp_path):
    grid = oriented_grid()
    dose = smooth_dose(grid)
    write_rtdose(tmp_path / "d.dcm", dose, grid, REFERENCES)
    before = (tmp_path / "d.dcm").read_bytes()
    dose[0, 0, 0] = np.nan
    with pytest.raises(CaseError, match="not finite"):
        write_rtdose(tmp_path / "d.dcm", dose, grid, REFERENCES)
    with pytest.raises(CaseError, match="shape"):
        write_rtdose(tmp_path / "d.dcm", dose[1:], grid, REFERENCES)
    with pytest.raises(CaseError, match="bits"):
        write_rtdose(tmp_path / "d.dcm", smooth_dose(grid), grid, REFERENCES, bits=8)
    assert (tmp_path / "d.dcm").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
@pytest.mark.parametrize("plan", ["1.2.5", ""])
def test_dciodvfy_finds_no_error_in_a_16_bit_twin(tmp_path, plan):
    grid = oriented_grid()
    write_rtdose(tmp_path / "d.dcm", smooth_dose(grid), grid, {**REFERENCES, "RTPlanSOPInstanceUID": plan}, bits=16)
    told = subprocess.run(["dciodvfy", str(tmp_path / "d.dcm")], capture_output=True, text=True).stderr
    assert not [line for line in told.splitlines() if line.startswith("Error")], told


@pytest.mark.parametrize("orientation", ["HFS", "FFS"])
@pytest.mark.parametrize("variant", ["absolute", "reversed"])
def test_offset_vectors_of_planning_systems(tmp_path, orientation, variant):
    grid = oriented_grid(orientation)
    dose = smooth_dose(grid)
    path = tmp_path / "d.dcm"
    write_rtdose(path, dose, grid, REFERENCES)
    ds = pydicom.dcmread(path)
    if variant == "absolute":
        ds.GridFrameOffsetVector = [float(grid.to_world((0, 0, k))[2]) for k in range(grid.shape[2])]
    else:
        ds.ImagePositionPatient = [float(v) for v in grid.to_world((0, 0, grid.shape[2] - 1))]
        ds.GridFrameOffsetVector = [-float(v) for v in ds.GridFrameOffsetVector]
        ds.PixelData = np.ascontiguousarray(ds.pixel_array[::-1]).tobytes()
    ds.save_as(path)
    read = read_rtdose(path)
    np.testing.assert_allclose(resample(read.gy, read.grid, grid), dose, atol=1e-4)


@pytest.mark.parametrize(("changes", "message"), [
    ({"DoseUnits": "RELATIVE"}, "RELATIVE"), ({"GridFrameOffsetVector": [0.0, 3.0]}, "2 values"),
    ({"GridFrameOffsetVector": [5.0 + 3 * k for k in range(12)]}, "starts at 5"),
    ({"GridFrameOffsetVector": [0.0, *(1.0 + 3 * k for k in range(1, 12))]}, "uniform"),
])
def test_unusable_doses_are_refused(tmp_path, changes, message):
    grid = oriented_grid()
    write_rtdose(tmp_path / "d.dcm", smooth_dose(grid), grid, REFERENCES)
    ds = pydicom.dcmread(tmp_path / "d.dcm")
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    ds.save_as(tmp_path / "d.dcm")
    with pytest.raises(CaseError, match=message):
        read_rtdose(tmp_path / "d.dcm")


def test_beam_doses_are_summed_and_fractions_multiplied(tmp_path):
    grid = oriented_grid()

    def write(name, value, summation):
        write_rtdose(tmp_path / name, np.full(grid.shape, value), grid, REFERENCES)
        ds = pydicom.dcmread(tmp_path / name)
        ds.DoseSummationType = summation
        ds.save_as(tmp_path / name)
        return read_rtdose(tmp_path / name)

    beams = [write("b1", 1.0, "BEAM"), write("b2", 2.0, "BEAM")]
    plan, fraction = write("p", 5.0, "PLAN"), write("f", 2.0, "FRACTION")
    assert combine_doses(beams)[0].gy.max() == pytest.approx(3.0, abs=1e-5)
    assert combine_doses([*beams, plan])[0].gy.max() == pytest.approx(5.0, abs=1e-5)
    assert combine_doses([fraction], fractions=30)[0].gy.max() == pytest.approx(60.0, abs=1e-4)
    for doses in ([plan, plan], [fraction], [fraction, *beams]):
        with pytest.raises(CaseError):
            combine_doses(doses)


def test_a_dose_of_a_plan_that_is_not_there_is_told(tmp_path):
    grid = oriented_grid()
    for name, plan in (("a", "1.2.3"), ("b", "1.2.4")):
        write_rtdose(tmp_path / name, np.ones(grid.shape), grid, {**REFERENCES, "RTPlanSOPInstanceUID": plan})
    own, other = (read_rtdose(tmp_path / name) for name in "ab")
    assert combine_doses([own], "1.2.3")[1] == []
    assert "other plans left out" in combine_doses([own, other], "1.2.3")[1][0]
    assert "no RTDOSE refers to the RTPLAN" in combine_doses([other], "1.2.3")[1][0]


def test_uids_are_fresh_and_valid(tmp_path):
    grid = oriented_grid()
    written = []
    for name in ("a.dcm", "b.dcm"):
        write_rtdose(tmp_path / name, np.ones(grid.shape), grid, {})
        written.append(pydicom.dcmread(tmp_path / name))
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"):
        uids = [ds[keyword].value for ds in written]
        assert all(uid.is_valid for uid in uids) and uids[0] != uids[1]
