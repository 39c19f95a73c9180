"""What can be tested of the applications without their environments; the rest: test_label.py and test_deploy.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from custom.case import CaseError
from custom.io import read_case
from custom.io.nifti import write_nifti
from custom.phantom import make_case, with_dose, write_study

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "bundle" / "configs"


def script(path: str) -> ModuleType:
    """A script of ``apps`` as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "apps" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def viewer() -> dict:
    config = json.loads((CONFIGS / "inference.json").read_text())
    return script("label/make_app.py").viewer_config(config, (0.5, 1.0))


def test_steps_and_samples_follow_the_viewers_options(viewer):
    """MONAI Label replaces the values of displayable_configs at each request, by strings where a viewer sends them."""
    assert viewer["displayable_configs"]["num_inference_steps"] == 1
    for steps, samples in ((1, 1), ("4", "3")):
        parser = ConfigParser()
        parser.read_config(json.loads(json.dumps(viewer)))
        parser["displayable_configs"].update({"num_inference_steps": steps, "num_samples": samples})
        parser.parse()
        inferer = parser.get_parsed_content("inferer")
        assert (inferer.num_inference_steps, inferer.num_samples) == (int(steps), int(samples))
        assert inferer.with_std == (int(samples) > 1)


def test_the_viewers_pipeline_is_the_bundles_with_two_changes(viewer):
    own = json.loads((CONFIGS / "inference.json").read_text())

    def targets(config: dict, key: str) -> list[str]:
        return [transform["_target_"] for transform in config[key]["transforms"]]

    before, after = targets(own, "preprocessing"), targets(viewer, "preprocessing")
    changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert changed == [("custom.transforms.load.LoadImageRTd", "custom.transforms.viewer.LoadViewerStudyd")]
    assert targets(viewer, "postprocessing") == [*targets(own, "postprocessing"),
                                                 "custom.transforms.viewer.IsodoseLabeld"]
    changed = {key for key in own if own[key] != viewer[key]}
    assert changed <= {"inferer", "model_facts", "preprocessing", "postprocessing", "sampler"}


def test_labels_are_isodoses():
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    changed = script("label/make_app.py").viewer_metadata(metadata, (0.5, 1.0))
    assert changed["network_data_format"]["outputs"]["pred"]["channel_def"] == {
        "0": "background", "1": "isodose 50 %", "2": "isodose 100 %"}
    assert changed["network_data_format"]["inputs"] == metadata["network_data_format"]["inputs"]
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "dose"}


def test_deploys_overlay_takes_channels_last_and_keeps_the_output():
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "inference.json"), str(CONFIGS / "deploy.json")])
    image = torch.arange(24.0).reshape(2, 3, 1, 4)  # (X, Y, Z, C)
    prepared = parser.get_parsed_content("preprocessing")({"image": image})["image"]
    torch.testing.assert_close(torch.as_tensor(prepared), image.permute(3, 0, 1, 2))
    pred = parser.get_parsed_content("postprocessing")({"pred": torch.full((1, 2, 3, 1), 0.7)})["pred"]
    assert isinstance(pred, np.ndarray) and pred.dtype == np.float32 and np.allclose(pred, 0.7)


def test_the_package_holds_code_data_and_bundle(tmp_path):
    script("deploy/make_package.py").main([str(tmp_path)])
    for name in ("app/__main__.py", "app/app.yaml", "app/requirements.txt", "app/custom/case.py",
                 "app/configs/roi_aliases.json", "models/rt_ct_dose_prediction/configs/deploy.json"):
        assert (tmp_path / name).is_file(), name
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))  # links would not survive a container's build


def test_the_picture_shows_dose_and_dvh():
    case = make_case("HeadNeck", 3, shape=(48, 48, 24))
    gy = case.highest_prescription_gy
    dose = np.where(case.target_mask(), gy, np.where(case.body, 0.3 * gy, 0.0)).astype(np.float32)
    picture = script("picture.py").draw(with_dose(case, 0.9 * dose), dose)
    pixels = np.asarray(picture)
    assert picture.width > 1000 and pixels.shape[2] == 3
    upper, lower = np.split(pixels, [picture.height // 2])
    for half in (upper, lower):
        coloured = half.max(axis=2).astype(int) - half.min(axis=2) > 60
        assert coloured.sum() > 500


def test_the_worst_cases_are_found_and_drawn(tmp_path):
    picture = script("picture.py")
    cases, results = tmp_path / "cases", tmp_path / "results"
    lines = ["case,openkbp_dose_error_gy,other"]
    for seed, error_gy in ((3, 1.0), (4, 9.0)):
        case = make_case("HeadNeck", seed, shape=(40, 40, 20))
        dose = np.where(case.body, 30.0, 0.0).astype(np.float32)
        folder = cases / ("validation-pats" if seed == 4 else "") / f"pt_{seed}"  # at any depth
        write_study(with_dose(case, dose), folder, patient_id="ID")
        (results / f"pt_{seed}").mkdir(parents=True)
        read = read_case(folder)
        write_nifti(results / f"pt_{seed}" / "dose.nii.gz", (30.0 + error_gy) * read.body, read.grid, "dose")
        lines.append(f"pt_{seed},{error_gy},")
    (results / "metrics.csv").write_text("\n".join([*lines, "mean,5,", "std,4,"]))
    assert picture.ranking(results / "metrics.csv") == ["pt_4", "pt_3"]
    sizes = []
    for worst in (1, 2):
        picture.main([str(cases), str(results), str(tmp_path / "worst.png"), "--worst", str(worst)])
        with Image.open(tmp_path / "worst.png") as drawn:
            pixels = np.asarray(drawn.convert("RGB")).astype(int)
        sizes.append(pixels.shape[0])
        too_hot = (pixels[..., 0] > 180) & (pixels[..., 1:].max(axis=2) < 80)
        assert too_hot.sum() > 2000  # the wash of the difference
    assert sizes[1] == 2 * sizes[0]
    with pytest.raises(CaseError, match=r"no cases \['pt_3'\]"):
        picture.main([str(folder), str(results), str(tmp_path / "worst.png"), "--worst", "2"])


def test_the_largest_error_is_where_it_was_put():
    picture, case = script("picture.py"), make_case("HeadNeck", 3, shape=(40, 40, 20))
    dose = np.where(case.body, 30.0, 0.0).astype(np.float32)
    spot = tuple(np.argwhere(case.body)[case.body.sum() // 2])
    wrong = dose.copy()
    wrong[spot] += 50.0
    wrong[0, 0, 0] += 500.0  # outside the body
    found = picture.largest_error(with_dose(case, dose), wrong)
    assert np.abs((np.array(found) - spot) * case.grid.spacing_mm).max() <= 15.0
    with pytest.raises(CaseError, match="no reference dose"):
        picture.largest_error(case, dose)


@pytest.mark.parametrize("text", [None, "case,dose\na,1\n", "case,openkbp_dose_error_gy\na,much\n"])
def test_metrics_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "metrics.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CaseError, match="expected the metrics.csv that `run evaluate` leaves"):
        script("picture.py").ranking(path)
