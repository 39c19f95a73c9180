"""What a viewer's request becomes, and isodose bands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from custom.case import CaseError
from custom.phantom import make_case, write_study
from custom.transforms.viewer import FROM_FILES, IsodoseLabeld, LoadViewerStudyd, study_of


@pytest.fixture(scope="module")
def case():
    return make_case("HeadNeck", 3, shape=(24, 24, 16))


def test_a_volume_stands_for_the_folder_beside_it(tmp_path):
    (tmp_path / "anna").mkdir()
    assert study_of(tmp_path / "anna.nii.gz") == tmp_path / "anna"
    assert study_of(tmp_path / "anna") == tmp_path / "anna"
    assert study_of(tmp_path / "RTSTRUCT.dcm") == tmp_path / "RTSTRUCT.dcm"
    with pytest.raises(CaseError, match="without structures"):
        study_of(tmp_path / "bert.nii.gz")


def test_what_a_viewer_leaves_open_is_left_to_the_files(tmp_path):
    loader = LoadViewerStudyd()
    sent = {"image": str(tmp_path), "technique": [FROM_FILES, "IMRT"], "site": FROM_FILES, "prescription_gy": "",
            "default_beams": "vmat1", "num_samples": 2}
    assert loader.request(sent) == {"image": str(tmp_path), "default_beams": "vmat1", "num_samples": 2}
    assert loader.request({"image": str(tmp_path), "prescription_gy": " 60"})["prescription_gy"] == 60.0
    with pytest.raises(CaseError, match="expected a number"):
        loader.request({"image": str(tmp_path), "prescription_gy": "many"})


def test_loads_the_study_of_a_volume_with_the_options_sent(tmp_path):
    write_study(make_case("HeadNeck", 3, shape=(48, 48, 24)), tmp_path / "anna", patient_id="A")
    sent = {"image": str(tmp_path / "anna.nii.gz"), "prescription_gy": "50", "technique": "VMAT"}
    loaded = LoadViewerStudyd()(sent)["case"]
    assert max(loaded.prescription_gy.values()) == 50.0 and loaded.technique == "VMAT" and loaded.name == "anna"


def test_integer_types_get_bands_others_the_dose(case):
    gy = case.highest_prescription_gy
    dose = MetaTensor(torch.linspace(0, 1.2 * gy, 13)[None, :, None, None], affine=torch.eye(4))  # steps of 10 %
    labeller = IsodoseLabeld(levels=(0.5, 0.95))
    bands = labeller({"pred": dose, "case": case, "result_dtype": "uint8", "warnings": ["odd"]})
    np.testing.assert_array_equal(bands["pred"].numpy().ravel(), [0] * 5 + [1] * 5 + [2] * 3)
    assert bands["result"]["content"] == "isodose bands" and bands["result"]["warnings"] == ["odd"]
    np.testing.assert_allclose(bands["result"]["levels_gy"], [0.5 * gy, 0.95 * gy], atol=1e-3)
    for dtype in (None, "float32"):
        same = labeller({"pred": dose, "case": case, "result_dtype": dtype})
        assert same["pred"] is dose and same["result"]["content"] == "dose in Gy"


def test_bands_follow_the_highest_prescription(case):
    double = replace(case, prescription_gy={roi: 0.5 * gy for roi, gy in case.prescription_gy.items()})
    dose = MetaTensor(torch.full((1, 2, 2, 2), 0.6 * case.highest_prescription_gy), affine=torch.eye(4))
    labeller = IsodoseLabeld(levels=(0.5, 1.0))
    assert labeller({"pred": dose, "case": case, "result_dtype": "uint8"})["pred"].max() == 1
    assert labeller({"pred": dose, "case": double, "result_dtype": "uint8"})["pred"].max() == 2


@pytest.mark.parametrize("levels", [(), (0.5, 0.5), (1.0, 0.5), (0.0, 1.0)])
def test_levels_have_to_rise_from_above_0(levels):
    with pytest.raises(CaseError, match="rising shares"):
        IsodoseLabeld(levels=levels)
