"""The report's record and its page, on a small case whose numbers are known."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from custom.case import BODY, Beam, Case, CaseError, Grid
from custom.dosimetry.constraints import load_constraints
from custom.dosimetry.dvh import parse_metric
from custom.report import BANNER, SINGLE_STEP, make_report, write_report
from custom.report_html import _margin, _side_by_side, render_html
from custom.report_model import UNKNOWN_TRAINING, model_facts
from custom.report_pictures import draw_views


@pytest.fixture
def case():
    """A box of water, 60 Gy in the target, falling by 2 Gy a voxel behind it; the reference is 1 Gy hotter."""
    grid = Grid.axis_aligned((30, 24, 20), (3.0, 3.0, 2.5), (-45.0, -36.0, 0.0))
    masks = {roi: np.zeros(grid.shape, bool) for roi in (BODY, "PTV_6000", "SpinalCord", "Lung_L")}
    masks[BODY][2:-2, 2:-2, :] = True
    masks["PTV_6000"][8:14, 6:12, 6:14] = True
    masks["SpinalCord"][14:16, 18:20, :] = True
    masks["Lung_L"][18:26, 6:16, :] = True
    y = np.arange(24.0)[None, :, None]
    dose = ((60 - 2 * np.clip(y - 12, 0, None)) * masks[BODY]).astype(np.float32)
    ct = np.where(masks[BODY], 0.0, -1000.0).astype(np.float32)
    beams = (Beam("1", (0.0,), (0.0, 0.0, 0.0)), Beam("2", (180.0, 181.0, 182.0), (0.0, 0.0, 0.0)))
    source = {"format": "dicom", "path": "/secret/Doe^Jane", "notes": ["ROI 'foo' was not recognised."]}
    args = ("box", grid, ct, masks, {"PTV_6000": 60.0}, beams, "IMRT", "Lung")
    return Case(*args, dose_gy=dose + 1 * masks[BODY].astype(np.float32), source=source)


@pytest.fixture
def dose(case):
    return case.dose_gy - case.body.astype(np.float32)


def test_record_has_known_numbers(case, dose):
    record = make_report(case, dose, warnings=["careful"], model={"steps": 4})
    by_name = {s["name"]: s for s in record["structures"]}
    assert list(by_name) == ["PTV_6000", "Lung_L", "SpinalCord", BODY]
    assert by_name["PTV_6000"]["volume_cc"] == pytest.approx(6 * 6 * 8 * 22.5 / 1000)
    assert by_name["PTV_6000"]["metrics"]["D95%[Gy]"] == {"predicted": 60, "reference": 61, "difference": -1}
    assert by_name["SpinalCord"]["metrics"]["Max[Gy]"]["predicted"] == pytest.approx(48)
    assert record["comparison"]["mae_body_gy"] == pytest.approx(1) and record["comparison"]["mae_targets_gy"] == 1
    assert record["indices"][0]["homogeneity_icru83"]["predicted"] == 0
    assert record["warnings"] == ["careful"] and record["model"] == {"steps": 4}
    curve = record["dvh"]["volume_percent"]["PTV_6000"]
    at = record["dvh"]["dose_gy"].index(60.5)
    assert (curve["predicted"][at], curve["reference"][at]) == (0, 100)
    assert record["views"][0]["title"] == "Hottest spot" and record["views"][0]["dose_gy"] == 60


def test_lungs_are_one_organ_tumour_volumes_stand_with_targets_and_odd_names_are_kept(case, dose):
    masks = dict(case.masks) | {"Lung_R": case.masks["SpinalCord"], "GTV": case.masks["PTV_6000"]}
    masks |= {"z opt (1)": case.masks["Lung_L"], "Heart": np.zeros(case.grid.shape, bool)}
    record = make_report(replace(case, masks=masks), dose)
    by_name = {s["name"]: s for s in record["structures"]}
    assert list(by_name) == ["PTV_6000", "GTV", "Lung_L", "Lung_R", "Lungs", "SpinalCord", "z opt (1)", BODY]
    assert by_name["GTV"]["role"] == "target" and by_name["GTV"]["prescription_gy"] is None
    assert by_name["Lungs"]["volume_cc"] == by_name["Lung_L"]["volume_cc"] + by_name["Lung_R"]["volume_cc"]
    assert set(record["colours"]) == set(by_name)


def test_protocol_puts_the_worst_first_and_absent_last(case, dose):
    rows = make_report(case, dose)["constraints"]
    status = [row["status"] for row in rows]
    assert status == sorted(status, key=["failed", "passed", "not_applicable"].index)
    severity = [row["severity"] for row in rows]
    assert severity == sorted(severity, reverse=True)
    cord = next(row for row in rows if row["structure"] == "SpinalCord")
    assert (cord["status"], cord["margin"], cord["reference"]) == ("failed", pytest.approx(-3), pytest.approx(49))
    assert not any(row["structure"] == "Larynx" for row in rows)  # a row of the other site


def test_uncertainty_widens_the_curves(case, dose):
    record = make_report(case, dose, dose_std_gy=np.full_like(dose, 2.0))
    curve = record["dvh"]["volume_percent"]["SpinalCord"]
    lower, middle, upper = (np.array(curve[key]) for key in ("lower", "predicted", "upper"))
    assert (lower <= middle).all() and (middle <= upper).all() and (lower < upper).any()
    assert record["uncertainty"]["mean_std_in_body_gy"] == pytest.approx(2)


def read(folder):
    return json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()


def test_files(tmp_path, case, dose):
    folder = tmp_path / "out" / "box"
    record = make_report(case, dose, dose_std_gy=0 * dose + 1, warnings=["<b>bold</b>"], model={"name": "</script>"})
    write_report(record, case, dose, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    stored, page = read(folder)
    assert stored["case"] == "box" and stored["structures"][0]["metrics"]["D95%[Gy]"]["predicted"] == 60
    assert len(page) < 3e6 and BANNER in page and "<b>bold" not in page and page.count("</script>") == 1
    assert not re.search(r"https?://|<link|src=\"(?!data:)|url\(", page)  # nothing from a network
    assert "Jane" not in page and "secret" not in json.dumps(stored)
    assert "stroke-dasharray" in page and "class=band" in page and "was not recognised" in page
    views = len(stored["views"])
    assert page.count("data:image/png;base64") == 9 * views and views >= 2


def test_case_without_ct_and_reference(tmp_path, case, dose):
    bare = replace(case, ct_hu=None, dose_gy=None)
    record = make_report(bare, dose, constraints=load_constraints()[:3])
    assert record["comparison"] is None and "difference" not in record["structures"][0]["metrics"]["Mean[Gy]"]
    write_report(record, bare, dose, tmp_path)
    stored, page = read(tmp_path)
    assert "without a CT" in page and "stroke-dasharray=" not in page
    assert page.count("data:image/png;base64") == 3 * len(stored["views"])


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")).astype(int)


def test_pictures_do_not_depend_on_the_storage_order(case, dose):
    """The same patient stored feet first with swapped axes looks the same: left on the right, anterior on top."""
    view = {"title": "", "index": [10, 8, 10], "dose_gy": 60.0}
    (plain,) = draw_views([view], case, dose, {"PTV_6000": "#ff0000"})
    turned_affine = case.grid.affine @ np.array([[0, -1, 0, 29], [1, 0, 0, 0], [0, 0, -1, 19], [0, 0, 0, 1.0]])
    grid = Grid((24, 30, 20), turned_affine)

    def turn(a):
        return a.transpose(1, 0, 2)[:, ::-1, ::-1]

    assert np.allclose(grid.to_world([8, 29 - 10, 19 - 10]), case.grid.to_world([10, 8, 10]))
    masks = {roi: turn(mask) for roi, mask in case.masks.items()}
    turned = replace(case, grid=grid, ct_hu=turn(case.ct_hu), masks=masks, dose_gy=turn(case.dose_gy))
    (other,) = draw_views([view | {"index": [8, 19, 9]}], turned, turn(dose), {"PTV_6000": "#ff0000"})
    for row, same in zip(plain["rows"], other["rows"]):
        for plane in ("axial", "coronal", "sagittal"):
            assert np.abs(pixels(row["planes"][plane]) - pixels(same["planes"][plane])).max() < 8, plane
    axial = pixels(plain["rows"][0]["planes"]["axial"])
    top, bottom = axial[: len(axial) // 3].mean((0, 1)), axial[-len(axial) // 3 :].mean((0, 1))
    assert top[0] - top[2] > bottom[0] - bottom[2]  # hotter, so redder, in front


def test_bad_doses_are_refused(case, dose):
    with pytest.raises(CaseError, match="shape"):
        make_report(case, dose[1:])
    with pytest.raises(CaseError, match="not finite"):
        make_report(case, np.where(case.body, np.nan, dose))


@pytest.mark.parametrize(("margin", "text"), [
    (-0.004, "&minus;0.004"), (-0.66, "&minus;0.66"), (0.0, "0.00"), (3.5, "+3.50"), (None, "")])
def test_a_narrow_miss_is_told_from_a_limit_just_met(margin, text):
    assert _margin(margin, "Gy") == text


def test_gamma_stands_with_the_comparison(case, dose):
    row = {"dose_percent": 2.0, "distance_mm": 2.0, "is_local": True, "cutoff_percent": 10.0, "pass_percent": 97.25}
    record = make_report(case, dose, gamma=[row])
    assert record["comparison"]["gamma"] == [row]
    assert "Gamma 2 %/2 mm, local, above 10 % of the maximum: 97.2 % of the voxels pass." in render_html(record, [])
    assert make_report(case, dose)["comparison"]["gamma"] == []


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose list of sums names its weights."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "models").mkdir()
    metadata = {"name": "Doses", "version": "1.2.3", "data_source": "Some data", "intended_use": "Research only"}
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps(metadata))
    weights = tmp_path / "models" / "model.pt"
    weights.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "models" / "model.pt.sha256").write_text(f"{digest}  model.pt\n")
    return tmp_path, weights, digest


def test_the_model_is_named_by_version_sum_and_training(bundle):
    root, weights, digest = bundle
    trained_on = {"sites": ["HeadNeck"], "prescription_gy": [69, 71], "directions": [9, 9], "target_cc": [50, 2400]}
    facts = model_facts(root, weights, trained_on, {"seed": 0})
    assert facts == {
        "name": "Doses", "version": "1.2.3", "weights": "model.pt", "weights_sha256": digest, "seed": 0,
        "training": "Some data; its range: sites HeadNeck; prescription 69 to 71 Gy; directions 9; "
                    "target 50 to 2400 cc",
        "intended_use": "Research only",
    }
    weights.write_bytes(b"somebody's own")  # the training is not that of other weights
    other = model_facts(root, weights, trained_on, {})
    assert other["training"] == UNKNOWN_TRAINING and other["weights_sha256"] not in (None, digest)
    assert model_facts(root, "nowhere.pt", trained_on, {})["weights_sha256"] is None


def test_the_page_names_the_model(case, dose, bundle):
    root, weights, digest = bundle
    record = make_report(case, dose, model=model_facts(root, weights, {}, {"num_samples": 4, "flips": []}))
    page = render_html(record, [])
    for text in ("<dt>Model</dt><dd>Doses</dd>", f"<dt>SHA-256 of the weights</dt><dd>{digest}</dd>",
                 "<dt>Samples</dt><dd>4</dd>", "<dt>Flips</dt><dd>none</dd>", "<dt>Training</dt><dd>Some data"):
        assert text in page


def test_the_slices_that_matter(case, dose):
    """Hottest, centre of the target, and the extreme voxel of the worst miss: the hot one of an upper limit."""
    dose = dose.copy()
    dose[20, 10, 3] = 80.0
    dose[9, 7, 8] = 30.0
    rows = {str(c.metric) + c.structure: c for c in load_constraints()}
    cold = [replace(rows["D95%[Gy]PTV_High"], metric=parse_metric("Min[Gy]"))]
    views = make_report(case, dose, constraints=cold)["views"]
    assert [(v["index"], v["dose_gy"]) for v in views[::2]] == [([20, 10, 3], 80), ([9, 7, 8], 30)]
    assert views[1]["title"] == "Centre of the high-dose target" and views[1]["index"] == [10, 8, 9]
    assert views[2]["title"] == "Worst violation, coldest voxel: PTV_High, Min[Gy]"
    hot = [replace(rows["Max[Gy]SpinalCord"], limit=40.0)]
    view = make_report(case, dose, constraints=hot)["views"][-1]
    assert (view["index"], view["dose_gy"]) == ([14, 18, 0], 48) and "hottest voxel: SpinalCord" in view["title"]
    assert view["position_lps_mm"] == [-3, 18, 0]


def test_bands_of_single_steps_are_no_error_bars(case, dose):
    std = np.ones_like(dose)
    assert make_report(case, dose, dose_std_gy=std, model={"num_inference_steps": 1})["warnings"] == [SINGLE_STEP]
    assert make_report(case, dose, dose_std_gy=std, model={"num_inference_steps": 4})["warnings"] == []
    assert make_report(case, dose, model={"num_inference_steps": 1})["warnings"] == []


def test_limits_in_gy_and_passes_by_the_other_side(case, dose):
    """A share of the prescription is given in Gy too; what passes though it is exceeded says why."""
    row = next(c for c in load_constraints() if str(c.metric) + c.structure == "Max[Gy]SpinalCord")
    rows = [replace(row, limit=40.0, any_of="one", note=""), replace(row, limit=50.0, any_of="one", note=""),
            replace(row, limit=0.5, limit_is_share=True)]
    page = render_html(make_report(case, dose, constraints=rows), [])
    assert page.count("other side</small>") == 1 and "&le; 50% of Rx<small>30.00 Gy</small>" in page


def test_pictures_of_one_plane_stand_side_by_side():
    """Predicted, reference and difference of a plane; of a lone prediction its three planes."""
    planes = {"axial": "A", "coronal": "C", "sagittal": "S"}
    lone, several = [{"title": "Predicted", "planes": planes}], ["Predicted", "Reference", "Difference"]
    (group,) = _side_by_side(lone)
    assert [alt for text in group for alt in re.findall('alt="([^"]+)"', text)] == [
        "Predicted, axial", "Predicted, coronal", "Predicted, sagittal"]
    groups = _side_by_side([{"title": title, "planes": planes} for title in several])
    assert [[re.search('alt="([^"]+)"', text)[1] for text in group] for group in groups] == [
        [f"{title}, {plane}" for title in several] for plane in planes]
