"""The runner on one patient scanned in every position: the predicted dose lies at the same patient coordinates."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from custom.phantom import make_case, write_study

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "bundle" / "models" / "model.pt"
# Signs of the row and column directions of the images, whose cross product the slices follow (PS3.3 C.7.6.2.1.1), and
# the gantry angle of a beam that enters from the patient's angle g (IEC 61217): turned when prone, mirrored feet first.
POSITIONS = {
    "HFS": (1, 1, lambda g: g), "HFP": (-1, -1, lambda g: g + 180.0),
    "FFS": (-1, 1, lambda g: -g), "FFP": (1, -1, lambda g: 180.0 - g),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no trained weights at {WEIGHTS}"),
]


def turn(study: Path, position: str) -> None:
    """Store the head-first-supine study as a scanner and a planning system would with the patient in ``position``."""
    along_i, along_j, gantry = POSITIONS[position]
    for path in (study / "CT").glob("*.dcm"):
        ds = pydicom.dcmread(path)
        dy, dx = (float(v) for v in ds.PixelSpacing)
        x, y, z = (float(v) for v in ds.ImagePositionPatient)
        ds.PixelData = np.ascontiguousarray(ds.pixel_array[::along_j, ::along_i]).tobytes()
        ds.ImagePositionPatient = [x + dx * (ds.Columns - 1) * (along_i < 0), y + dy * (ds.Rows - 1) * (along_j < 0), z]
        ds.ImageOrientationPatient = [along_i, 0, 0, 0, along_j, 0]
        ds.PatientPosition = position
        ds.save_as(path)
    plan = pydicom.dcmread(study / "RTPLAN.dcm")
    plan.PatientSetupSequence[0].PatientPosition = position
    for beam in plan.BeamSequence:
        for point in beam.ControlPointSequence:
            if "GantryAngle" in point:
                point.GantryAngle = round(gantry(float(point.GantryAngle)) % 360.0, 4)
    plan.save_as(study / "RTPLAN.dcm")


def predict(dataset_dir: Path, output_dir: Path, **options: str) -> None:
    """The README's inference command."""
    flags = [text for key, value in options.items() for text in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "inference",
         "--config_file", str(ROOT / "bundle" / "configs" / "inference.json"),
         "--dataset_dir", str(dataset_dir), "--output_dir", str(output_dir), *flags],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """One run over the four positions, each with its own orientation of the images; 40 x 48 pixels, not square."""
    folder = tmp_path_factory.mktemp("positions")
    for position in POSITIONS:
        case = make_case("HeadNeck", 3, shape=(40, 48, 24))
        turn(write_study(case, folder / "studies" / position, patient_id=position), position)
    predict(folder / "studies", folder / "results")
    return folder / "results"


def rtdose_points(path: Path, count: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Dose in Gy at random voxels above 1 Gy and their LPS coordinates in mm (PS3.3 C.8.8.3.2, C.7.6.2.1.1)."""
    ds = pydicom.dcmread(path)
    frames = ds.pixel_array * float(ds.DoseGridScaling)
    irradiated = np.argwhere(frames > 1.0)
    k, row, column = irradiated[np.random.default_rng(0).integers(0, len(irradiated), size=count)].T
    along_row, along_column = np.split(np.array(ds.ImageOrientationPatient, dtype=float), 2)
    offset = np.array(ds.GridFrameOffsetVector, dtype=float)[k]
    dy, dx = (float(v) for v in ds.PixelSpacing)
    lps = (np.array(ds.ImagePositionPatient, dtype=float) + np.outer(column * dx, along_row)
           + np.outer(row * dy, along_column) + np.outer(offset, np.cross(along_row, along_column)))
    return frames[k, row, column], lps


def nifti_at(path: Path, lps: np.ndarray) -> np.ndarray:
    """Dose in Gy of the NIfTI file's voxels at LPS coordinates."""
    image = nib.load(path)
    ras = lps * [-1.0, -1.0, 1.0]
    index = nib.affines.apply_affine(np.linalg.inv(image.affine), ras)
    np.testing.assert_allclose(index, np.rint(index), atol=1e-2)
    return np.asarray(image.dataobj)[tuple(np.rint(index).astype(int).T)]


@pytest.mark.parametrize("position", POSITIONS)
def test_rtdose_and_nifti_agree_within_1_cgy(results, position):
    dose_gy, lps = rtdose_points(results / position / "RTDOSE.dcm")
    assert dose_gy.max() > 40.0
    assert np.abs(dose_gy - nifti_at(results / position / "dose.nii.gz", lps)).max() < 0.01


@pytest.mark.parametrize("position", list(POSITIONS)[1:])
def test_every_position_gets_the_dose_of_head_first_supine(results, position):
    dose_gy, lps = rtdose_points(results / position / "RTDOSE.dcm")
    assert np.abs(dose_gy - nifti_at(results / "HFS" / "dose.nii.gz", lps)).max() < 0.01


def test_non_square_phantom(shared_dir, tmp_path):
    """The IBSI phantom: 201 x 204 pixels, one target, neither body contour nor plan nor contour image references."""
    archive = shared_dir / "dicom" / "ibsi1_ct_phantom.zip"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    predict(tmp_path / "dicom", tmp_path / "results", prescription_gy="{'GTV-1': 60}", site="Lung",
            default_beams="vmat2")
    (case,) = (tmp_path / "results").glob("*/RTDOSE.dcm")
    dose_gy, lps = rtdose_points(case)
    assert dose_gy.max() > 40.0
    assert np.abs(dose_gy - nifti_at(case.with_name("dose.nii.gz"), lps)).max() < 0.01
