"""What is written for a case: whole folders, and files that agree with each other at the same patient points."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor
from scipy import ndimage

from custom.case import Beam, Case, CaseError, Grid, OutputError, Site
from custom.io import read_case
from custom.phantom import make_case, with_dose, write_study
from custom.transforms.load import WorkingGridd
from custom.transforms.save import CaseMetricsd, RestoreDosed, SaveImageRTDosed, whole_folder


# ------------------------------------------------------------------------------------------------------ folders
def test_files_of_an_error_are_left_nowhere(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "dose.txt").write_text("yesterday's")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "one") as folder:
        (folder / "dose.txt").write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    assert (tmp_path / "one" / "dose.txt").read_text() == "yesterday's"
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "deep" / "two") as folder:
        raise RuntimeError
    assert not list((tmp_path / "deep").iterdir())


def test_whole_files_replace_older_ones_and_leave_the_others(tmp_path):
    folder = tmp_path / "out" / "one"
    folder.mkdir(parents=True)
    (folder / "dose.txt").write_text("yesterday's")
    (folder / "notes.txt").write_text("mine")
    with whole_folder(folder) as partial:
        (partial / "dose.txt").write_text("today's")
        assert (folder / "dose.txt").read_text() == "yesterday's"  # until everything is there
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"dose.txt": "today's", "notes.txt": "mine"}
    assert [p.name for p in folder.parent.iterdir()] == ["one"]


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CaseError, match="cannot write to .*file.*another output_dir"):
        with whole_folder(tmp_path / "file" / "one"):
            pass


def dead_pid() -> int:
    """Of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_run_left_is_removed_and_what_it_put_aside_comes_back(tmp_path):
    """Killed between putting the older results aside and putting the new ones in their place."""
    part = tmp_path / f".one.part.{socket.gethostname()}.{dead_pid()}"
    for folder, text in ((part, "half"), (Path(f"{part}.old"), "older")):
        folder.mkdir()
        (folder / "dose.txt").write_text(text)
    alive = tmp_path / f".one.part.{socket.gethostname()}.1"
    elsewhere = tmp_path / ".one.part.another-machine.99999999"
    alive.mkdir(), elsewhere.mkdir()
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "one"):
        raise RuntimeError
    assert {p.name for p in tmp_path.iterdir()} == {"one", alive.name, elsewhere.name}
    assert (tmp_path / "one" / "dose.txt").read_text() == "older"


def test_what_a_process_of_the_same_number_left_is_removed(tmp_path):
    """As in a container that is started anew."""
    part = tmp_path / f".one.part.{socket.gethostname()}.{os.getpid()}"
    part.mkdir()
    Path(f"{part}.old").mkdir()
    with whole_folder(tmp_path / "one") as folder:
        (folder / "dose.txt").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["one"] and (tmp_path / "one" / "dose.txt").read_text() == "new"


@pytest.mark.parametrize("dose_grid", [0, -2.5, True, float("nan"), float("inf"), "rtdose"], ids=str)
def test_grids_that_are_none_are_refused_before_the_run(tmp_path, dose_grid):
    with pytest.raises(CaseError, match="dose_grid: found"):
        SaveImageRTDosed(output_dir=tmp_path, dose_grid=dose_grid)


def test_results_of_another_kind_do_not_stay_beside_new_ones(tmp_path):
    (tmp_path / "one").mkdir()
    for name in ("RTDOSE.dcm", "notes.txt"):
        (tmp_path / "one" / name).write_text("yesterday's")
    with whole_folder(tmp_path / "one") as folder:
        (folder / "dose.csv").write_text("today's")
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"dose.csv", "notes.txt"}


# ------------------------------------------------------------------------------------------------------ DICOM case
@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    """A phantom patient written as DICOM, with a reference dose, and read again."""
    drawn = make_case(Site.HEAD_NECK, 3, shape=(48, 48, 24))
    dose = ndimage.gaussian_filter(np.where(drawn.target_mask(), 70.0, 10.0) * drawn.body, 1.5)
    folder = tmp_path_factory.mktemp("study")
    return read_case(write_study(with_dose(drawn, dose), folder, patient_id="SAVE"))


@pytest.fixture(scope="module")
def data(case) -> dict:
    """A predicted dose with waves in it, so that each place has its own value, and a standard deviation."""
    i, j, k = np.meshgrid(*map(np.arange, case.grid.shape), indexing="ij")
    dose = (case.dose_gy + 5 * (1 + np.sin(i / 3) * np.cos(j / 4) * np.sin(k / 2))) * case.body
    affine = torch.as_tensor(case.grid.ras_affine)
    pred = MetaTensor(torch.from_numpy(dose.astype(np.float32))[None], affine=affine)
    return {"case": case, "pred": pred, "pred_std": pred * 0.1}


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    SaveImageRTDosed(output_dir=root, model={"name": "a test"})({**data, "warnings": ["look here"]})
    return root / data["case"].name


def sampled_nifti(path, points_mm) -> np.ndarray:
    """Linear interpolation at LPS points, by the file's own affine."""
    image = nib.load(path)
    at = nib.affines.apply_affine(np.linalg.inv(image.affine), points_mm * (-1, -1, 1))
    return ndimage.map_coordinates(image.get_fdata(), at.T, order=1)


def sampled_dicom(path, points_mm) -> np.ndarray:
    """Linear interpolation at LPS points, by a reader that is not ours; ITK leaves the dose scaling to its user."""
    image = SimpleITK.ReadImage(str(path), SimpleITK.sitkFloat64)
    scaling = float(image.GetMetaData("3004|000e"))
    at = ([float(v) for v in point] for point in points_mm)
    return scaling * np.array([image.EvaluateAtPhysicalPoint(p, SimpleITK.sitkLinear) for p in at])


def points_inside(case: Case, count: int = 300) -> np.ndarray:
    """Random LPS points between voxels of the body."""
    rng = np.random.default_rng(0)
    index = np.argwhere(ndimage.binary_erosion(case.body))
    return case.grid.to_world(rng.permutation(index)[:count] + rng.uniform(-0.5, 0.5, (count, 3)))


def test_promised_files_are_written(written, case):
    names = {p.name for p in written.iterdir()}
    assert names == {"RTDOSE.dcm", "dose.nii.gz", "dose_std.nii.gz", "report.json", "report.html"}
    assert [p.name for p in written.parent.iterdir()] == [case.name]
    text = (written / "report.json").read_text()
    assert json.loads(text)["model"] == {"name": "a test"} and "look here" in text


def test_rtdose_and_nifti_agree_within_a_centigray(written, data):
    case = data["case"]
    points = points_inside(case)
    truth = ndimage.map_coordinates(data["pred"][0].numpy(), case.grid.to_index(points).T, order=1)
    dicom, nifti = sampled_dicom(written / "RTDOSE.dcm", points), sampled_nifti(written / "dose.nii.gz", points)
    assert np.ptp(truth) > 20
    np.testing.assert_allclose(dicom, nifti, atol=0.01)
    np.testing.assert_allclose(dicom, truth, atol=0.01)
    std = sampled_nifti(written / "dose_std.nii.gz", points)
    np.testing.assert_allclose(std, 0.1 * truth, atol=0.01)


@pytest.mark.parametrize("dose_grid", ["plan", 8.0], ids=str)
def test_dose_on_another_grid(data, tmp_path, dose_grid):
    """The dose file is on the grid asked for, and tells the patient's dose wherever its voxels lie."""
    case = data["case"]
    save = SaveImageRTDosed(output_dir=tmp_path, dose_grid=dose_grid, files=["rtdose", "nifti"])
    save({key: data[key] for key in ("case", "pred")})
    folder = tmp_path / case.name
    assert {p.name for p in folder.iterdir()} == {"RTDOSE.dcm", "dose.nii.gz"}
    image = nib.load(folder / "dose.nii.gz")
    if dose_grid == "plan":
        assert image.shape == case.dose_grid.shape
        np.testing.assert_allclose(image.affine, case.dose_grid.ras_affine, atol=1e-3)
    else:
        assert image.header.get_zooms() == pytest.approx((8.0, 8.0, 8.0))
    rng = np.random.default_rng(1)
    index = rng.integers(1, np.array(image.shape) - 1, (200, 3))
    points = nib.affines.apply_affine(image.affine, index) * (-1, -1, 1)
    truth = ndimage.map_coordinates(data["pred"][0].numpy(), case.grid.to_index(points).T, order=1)
    np.testing.assert_allclose(image.get_fdata()[tuple(index.T)], truth, atol=0.01)
    np.testing.assert_allclose(sampled_dicom(folder / "RTDOSE.dcm", points), truth, atol=0.01)


def test_voxel_size_of_an_oblique_grid(data, tmp_path):
    """Sagittal slices of 2 x 3 mm, 5 mm apart: what is asked for holds along the grid's own axes."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0.0, 0, 5], [2, 0, 0], [0, 3, 0]])
    grid, inside = Grid((21, 17, 9), affine), np.ones((21, 17, 9), bool)
    case = dataclasses.replace(data["case"], grid=grid, ct_hu=None, dose_gy=None,
                               masks={"Body": inside, "PTV": inside}, prescription_gy={"PTV": 60.0})
    dose = grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)) @ (0.2, 0.3, 0.1)
    SaveImageRTDosed(output_dir=tmp_path, dose_grid=4.0, files=["nifti"])(
        {"case": case, "pred": torch.from_numpy(dose.astype(np.float32))[None]})
    image = nib.load(tmp_path / case.name / "dose.nii.gz")
    assert image.header.get_zooms() == pytest.approx((4, 4, 4)) and image.shape == (11, 13, 11)
    points = nib.affines.apply_affine(image.affine, np.argwhere(np.ones(image.shape))) * (-1, -1, 1)
    np.testing.assert_allclose(image.get_fdata().ravel(), points @ (0.2, 0.3, 0.1), atol=1e-3)


def test_plan_grid_falls_back_to_the_ct(data, tmp_path):
    case = dataclasses.replace(data["case"], dose_grid=None)
    SaveImageRTDosed(output_dir=tmp_path, dose_grid="plan", files=["nifti"])({"case": case, "pred": data["pred"]})
    assert nib.load(tmp_path / case.name / "dose.nii.gz").shape == case.grid.shape


def test_unknown_grid_is_refused(tmp_path):
    with pytest.raises(CaseError, match="'beam'; expected 'ct', 'plan' or a voxel size"):
        SaveImageRTDosed(output_dir=tmp_path, dose_grid="beam")


# ------------------------------------------------------------------------------------------------------ other cases
def test_openkbp_case_gets_its_csv(tmp_path):
    grid, body = Grid.axis_aligned((128, 128, 128), (4, 4, 3)), np.zeros((128, 128, 128), bool)
    body[60:64, 60:64, 60:64] = True
    case = Case("pt_1", grid, None, {"Body": body, "PTV_7000": body}, {"PTV_7000": 70.0},
                (Beam("G0", (0.0,), (0, 0, 0)),), "IMRT", "HeadNeck", source={"format": "openkbp"})
    SaveImageRTDosed(output_dir=tmp_path, files=["csv"])({"case": case, "pred": torch.full((1, 128, 128, 128), 20.0)})
    rows = (tmp_path / "pt_1" / "dose.csv").read_text().splitlines()
    assert rows[0] == ",data" and len(rows) == 1 + 64 and all(row.endswith(",20") for row in rows[1:])


def test_error_while_writing_leaves_no_results(data, tmp_path):
    broken = dataclasses.replace(data["case"], source={"format": "openkbp"})  # dose.csv wants 128 voxels a side
    with pytest.raises(CaseError, match="dose.csv"):
        SaveImageRTDosed(output_dir=tmp_path, files=["nifti", "csv"])({"case": broken, "pred": data["pred"]})
    assert not list(tmp_path.iterdir())


def test_metrics_want_a_reference(data):
    row = CaseMetricsd()(data)["metrics"]
    difference = np.abs(data["pred"][0].numpy() - data["case"].dose_gy)[data["case"].body].mean()
    assert row["case"] == data["case"].name and row["mae_body_gy"] == pytest.approx(difference, rel=1e-4)
    with pytest.raises(CaseError, match="needs a reference dose"):
        CaseMetricsd()({**data, "case": dataclasses.replace(data["case"], dose_gy=None)})


# ------------------------------------------------------------------------------------------------------ uncertainty
@pytest.mark.parametrize("calibration, expected_gy", [(None, 3.0), ((2.0, 4.0), 10.0)])
def test_calibrated_error_bar(case, calibration, expected_gy):
    """3 Gy of spread and a floor of 4 Gy make 5 Gy, twice that with the scale; nothing outside the body."""
    work = WorkingGridd()({"case": case})["work"]
    share = torch.tensor([60.0, 3.0])[:, None, None, None] / case.highest_prescription_gy
    out = RestoreDosed(std_calibration=calibration)(
        {"case": case, "work": work, "pred": share.expand(2, *work.grid.shape)})
    std = np.asarray(out["pred_std"])[0]
    np.testing.assert_allclose(std[case.body], expected_gy, rtol=1e-4)
    assert not std[~case.body].any()
    np.testing.assert_allclose(np.asarray(out["pred"])[0][case.body], 60.0, rtol=1e-4)


def test_gamma_goes_to_the_metrics_and_to_the_report(data, tmp_path, monkeypatch):
    """With its criterion; the rate itself is another test's (tests/dosimetry/test_gamma.py)."""
    monkeypatch.setattr("custom.dosimetry.gamma._is_installed", lambda: True)
    monkeypatch.setattr("custom.dosimetry.gamma.gamma_pass_percent", lambda *_, **how: 90 + how["distance_mm"])
    data = CaseMetricsd(gamma_criteria=["3%/3mm", "2%/2mm local"])(data)
    assert data["metrics"]["gamma_3percent_3mm_global_pass_percent"] == 93
    assert data["metrics"]["gamma_2percent_2mm_local_pass_percent"] == 92
    SaveImageRTDosed(output_dir=tmp_path, files=["report"])(data)
    rows = json.loads((tmp_path / data["case"].name / "report.json").read_text())["comparison"]["gamma"]
    assert [(row["pass_percent"], row["is_local"], row["cutoff_percent"]) for row in rows] == [
        (93, False, 10), (92, True, 10)]


def test_a_full_disk_is_told_in_the_systems_words(tmp_path):
    """pydicom raises the system's error anew, with a traceback as its text."""
    def write(folder):
        try:
            raise OSError(27, "File too large")
        except OSError as error:
            raise OSError("With tag (7FE0,0010) got exception\nTraceback ...") from error

    with pytest.raises(OutputError, match="cannot write to .*: File too large; free space"), \
            whole_folder(tmp_path / "out" / "case") as folder:
        write(folder)
    assert not (tmp_path / "out" / "case").exists()
