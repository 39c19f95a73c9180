"""The comparison's table by known answers, its figures, and what a study of seeds or steps writes."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from custom.case import CaseError
from custom.comparison import Comparison
from custom.comparison_figures import draw_doses, draw_dvhs, middle_slice
from custom.comparison_studies import SEED_COLUMNS, SeedSpread, StepCurve
from custom.comparison_table import COLUMNS, case_figures, compare, markdown, structure_errors
from custom.io.nifti import write_nifti
from custom.phantom import make_case, with_dose, write_study


def row(case: str, error: float, **more) -> dict:
    return {"case": case, "openkbp_dose_error_gy": error, "mae_body_gy": error, "ssim": 0.9, "psnr_db": 30.0,
            "openkbp_dvh_error/PTV_7000/d95_gy": 2 * error, "openkbp_dvh_error/Larynx/mean_gy": 4 * error,
            "roi_mae/PTV_7000_gy": 1.0 + error, "roi_mae/Larynx_gy": 3.0, "roi_mae/SpinalCord_gy": 5.0,
            "dosediff_dose_score_gy": error, "dosediff_volume_score_percent": None, "prediction_seconds": 2.0, **more}


def scores(errors, **more) -> dict:
    rows = [row(f"pt_{n}", float(e), **more) for n, e in enumerate(errors)]
    pooled = np.mean([v for r in rows for k, v in r.items() if k.startswith("openkbp_dvh_error/")])
    return {"per_case": rows, "dvh_score": float(pooled), "parameters": 1_500_000}


@pytest.fixture
def errors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    base = 3 + rng.random(20)
    return base, base + 0.5 + 0.3 * rng.standard_normal(20)


def test_figures_of_a_case():
    found = case_figures(row("a", 2.0))
    assert found["dvh_score_gy"] == 6.0 and found["ptv_mae_gy"] == 3.0 and found["oar_mae_gy"] == 4.0
    assert found["seconds"] == 2.0 and math.isnan(found["dosediff_volume_score_percent"])
    assert set(found) == set(COLUMNS)


def test_paired_statistics_are_those_of_scipy(errors):
    base, other = errors
    table = compare({"A": scores(base), "B": scores(other)})
    assert "difference" not in table["A"]["figures"]["dose_score_gy"]
    found = table["B"]["figures"]["dose_score_gy"]
    assert found["mean"] == pytest.approx(other.mean()) and found["difference"] == pytest.approx((other - base).mean())
    assert found["p"] == pytest.approx(stats.ttest_rel(other, base).pvalue)
    half = stats.t.ppf(0.975, 19) * (other - base).std(ddof=1) / np.sqrt(20)
    assert found["low"] == pytest.approx(found["difference"] - half, abs=0.05)
    assert found["high"] == pytest.approx(found["difference"] + half, abs=0.05)
    assert found["low"] < found["difference"] < found["high"]
    assert table == compare({"A": scores(base), "B": scores(other)})  # the bootstrap is seeded


def test_pairing_goes_by_name_not_by_order(errors):
    base, _ = errors
    shuffled = scores(base + 1.0)
    shuffled["per_case"].reverse()
    found = compare({"A": scores(base), "B": shuffled})["B"]["figures"]["dose_score_gy"]
    assert found["difference"] == pytest.approx(1.0)
    assert found["high"] - found["low"] < 1e-9  # a constant difference has no spread


def test_other_cases_are_refused(errors):
    base, _ = errors
    with pytest.raises(CaseError, match="not scored on the same cases.*pt_19"):
        compare({"A": scores(base), "B": scores(base[:-1])})


def test_one_case_has_no_interval():
    found = compare({"A": scores([3.0]), "B": scores([4.0])})["B"]["figures"]["dose_score_gy"]
    assert found["difference"] == 1.0 and math.isnan(found["low"]) and math.isnan(found["p"])


def test_markdown_holds_every_system_and_figure(errors):
    base, other = errors
    found = {"A": scores(base), "B": scores(other)}
    lines = markdown(compare(found)).splitlines()
    assert lines[0].startswith("Mean over 20 cases")
    table = [line for line in lines if line.startswith(("| A", "| B"))]
    assert len(table) == 3 and f"| {base.mean():.3f} | {3 * base.mean():.3f} |" in table[0] and "1.50 M" in table[0]
    assert f"{(other - base).mean():+.3f} [" in table[2] and ", p " in table[2]
    by_structure = structure_errors(found).splitlines()
    assert "| Larynx | 20 | 3.000 | 3.000 |" in by_structure


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    case = make_case("HeadNeck", 3, shape=(40, 36, 12))
    dose = np.where(case.body, 20.0, 0.0).astype(np.float32)
    dose[case.target_mask()] = 65.0
    folder = tmp_path_factory.mktemp("study") / "hn"
    case = with_dose(case, dose)
    write_study(case, folder, patient_id="hn")
    return case, folder


def test_figures_show_every_system(study, tmp_path):
    case, _ = study
    doses = {"A": case.dose_gy, "B": case.dose_gy * 0.9}
    assert case.target_mask()[:, :, middle_slice(case)].any()
    draw_doses(case, doses, tmp_path / "a" / "doses.png")
    draw_dvhs(case, doses, tmp_path / "dvhs.png")
    wide, narrow = (Image.open(tmp_path / name) for name in ("a/doses.png", "dvhs.png"))
    assert wide.width > 3 * 300 and narrow.width > 2 * 300
    assert len(np.unique(np.asarray(wide.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_tabulate_from_finished_runs(study, tmp_path):
    from custom.io import read_case

    case = read_case(study[1])
    systems = {"A": {}, "B": {"overlays": ["systems/b.json"]}, "B without": {"weights_of": "B"}}
    for n, name in enumerate(("a", "b", "b_without")):
        out = tmp_path / name / "validation"
        (out / case.name).mkdir(parents=True)
        write_nifti(out / case.name / "dose.nii.gz", case.dose_gy * (1 - 0.1 * n), case.grid, "test")
        found = scores([1.0 + n])
        found["per_case"][0]["case"] = case.name
        (out / "metrics.json").write_text(json.dumps(found))
        if name != "b_without":
            torch.save({"w": torch.zeros(7)}, tmp_path / name / "model.pt")
    comparison = Comparison(systems, tmp_path, [{"image": str(study[1])}], {}, tmp_path)
    table = comparison.tabulate()
    assert [entry["parameters"] for entry in table.values()] == [7, 7, 7]
    assert {"comparison.json", "comparison.md", "doses.png", "dvhs.png"} <= {p.name for p in tmp_path.iterdir()}
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["B"]["figures"]["dose_score_gy"]["difference"] == 1.0
    assert record["B"]["figures"]["dose_score_gy"]["p"] is None  # one case proves nothing


def test_wrong_systems_and_failed_runs_are_named(tmp_path):
    with pytest.raises(CaseError, match="weights of 'C'"):
        Comparison({"A": {"weights_of": "C"}}, tmp_path, [], {}, tmp_path)
    with pytest.raises(CaseError, match="exit code.*train.log"):
        Comparison({"A": {}}, tmp_path / "none", [], {}, tmp_path / "out").run()


class FixedStudy:
    """Stands in for a study that takes minutes: writes what it would."""

    def __init__(self, folder=None) -> None:
        self.folder = folder

    def run(self):
        if self.folder is not None:
            with (self.folder / "seeds.csv").open("w", newline="") as stream:
                table = csv.DictWriter(stream, ["case", "way", *SEED_COLUMNS])
                table.writeheader()
                for seed in range(3):
                    for case in range(2):
                        values = dict.fromkeys(SEED_COLUMNS, case + seed)
                        table.writerow({"case": case, "way": f"seed {seed}", **values})
        figures = {"dose_score": 3.0, "dvh_score": 2.0, "psnr_db": 25.0, "ssim": 0.8, "seconds": 1.0}
        return {f"{n} steps": figures for n in (1, 8, 50)}


def test_seed_spread_is_the_variance_of_mean_scores(tmp_path):
    found = SeedSpread(FixedStudy(tmp_path), tmp_path).run()
    # each seed's mean over its two cases is seed + 0.5
    assert found["ssim"] == pytest.approx({"mean": 1.5, "variance": 1.0, "std": 1.0, "min": 0.5, "max": 2.5})
    assert json.loads((tmp_path / "seed_spread.json").read_text())["seeds"] == 3


def test_step_curve_is_drawn(tmp_path):
    assert list(StepCurve(FixedStudy(), tmp_path).run()) == [1, 8, 50]
    assert Image.open(tmp_path / "steps.png").width > 1000
    other = FixedStudy()
    other.run = lambda: {"plan prior": {}}
    with pytest.raises(CaseError, match="such as '8 steps'"):
        StepCurve(other, tmp_path).run()
