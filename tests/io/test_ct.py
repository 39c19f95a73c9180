"""CT series that must be refused, repaired or told about."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest

from custom.case import CaseError
from custom.io.ct import read_ct
from tests.io.dicom_builder import Study, oriented_grid


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(tmp_path, oriented_grid(shape=(6, 5, 8)))


@pytest.fixture
def hu(study) -> np.ndarray:
    values = np.arange(np.prod(study.grid.shape), dtype=float).reshape(study.grid.shape) * 2
    return values - 400 + np.arange(8) % 2


def change(path, **values):
    ds = pydicom.dcmread(path)
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    ds.save_as(path)


def test_rescale_of_every_slice_is_applied(study, hu):
    ct = read_ct(study.write_ct(hu))
    np.testing.assert_array_equal(ct.hu, hu)
    assert ct.hu.flags.c_contiguous and ct.hu.dtype == np.float32
    assert ct.grid.same_as(study.grid)


def test_missing_slice_is_named(study, hu):
    with pytest.raises(CaseError, match=r"missing between 40\.00 to 46\.00 mm"):
        read_ct(study.write_ct(hu, skip=(4,)))


def test_same_file_twice_is_left_out_but_another_slice_there_is_refused(study, hu):
    files = study.write_ct(hu)
    copy = files[2].with_name("copy.dcm")
    copy.write_bytes(files[2].read_bytes())
    ct = read_ct([*files, copy])
    assert ct.hu.shape == hu.shape and any("left out" in n for n in ct.notes)
    change(copy, SOPInstanceUID="1.2.3")
    with pytest.raises(CaseError, match="same position"):
        read_ct([*files, copy])


def test_uneven_spacing(study, hu):
    files = study.write_ct(hu)
    position = pydicom.dcmread(files[3]).ImagePositionPatient
    change(files[3], ImagePositionPatient=[position[0], position[1], float(position[2]) + 0.05])
    assert any("slice distances vary" in n for n in read_ct(files).notes)
    change(files[3], ImagePositionPatient=[position[0], position[1], float(position[2]) + 0.5])
    with pytest.raises(CaseError, match="uniform series"):
        read_ct(files)


def test_gantry_tilt_is_refused(study, hu):
    files = study.write_ct(hu)
    for path in files:
        position = pydicom.dcmread(path).ImagePositionPatient
        change(path, ImagePositionPatient=[position[0], float(position[1]) + 0.1 * float(position[2]), position[2]])
    with pytest.raises(CaseError, match="sheared by 5.7 degrees"):
        read_ct(files)


def test_truncated_file_is_named(study, hu):
    files = study.write_ct(hu)
    files[1].write_bytes(files[1].read_bytes()[:-20])
    with pytest.raises(CaseError, match="001.dcm: the file is cut short in PixelData"):
        read_ct(files)


def test_localizer_is_left_out(study, hu):
    files = study.write_ct(hu)
    scout = study.ct_slice(hu, 0)
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    ct = read_ct([*files, study.save(scout, "CT/scout.dcm")])
    assert ct.hu.shape == hu.shape and any("localizer" in n for n in ct.notes)


def test_no_rescale_values(study, hu):
    files = study.write_ct(hu)
    for path in files:
        ds = pydicom.dcmread(path)
        del ds.RescaleSlope
        ds.save_as(path)
    with pytest.raises(CaseError, match="not Hounsfield units"):
        read_ct(files)
