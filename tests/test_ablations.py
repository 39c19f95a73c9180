"""Runs of variants, each in its own process, and their table."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from custom.ablations import Ablations, table
from custom.case import CaseError
from custom.phantom import make_case, with_dose, write_study
from custom.physics.fluence import plan_dose

ROOT = Path(__file__).resolve().parents[1]

# A config that MONAI's runner can run in seconds: it writes what a training would have scored.
CONFIG = {
    "imports": ["$import json", "$import pathlib"],
    "error": 1.0,
    "output_dir": "",
    "record": "$dict(flips=dict(dose_score=@error, dvh_score=2 * @error, cases=3, dose_errors_gy=[@error] * 3))",
    "ablate": ["$pathlib.Path(@output_dir, 'scores.json').write_text(json.dumps(@record))"],
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_each_variant_is_run_once_and_compared_with_the_first(config, tmp_path):
    out = tmp_path / "out"
    variants = {"full": {}, "less of it": {"error": 3.5}}
    found = Ablations(variants, [config], {}, out).run()
    assert found["less of it"]["flips"]["dose_score"] == 3.5
    text = (out / "ablations.md").read_text()
    assert "| full | flips | 1.000 | 2.000 |  |" in text
    assert "| less of it | flips | 3.500 | 7.000 | +2.500 [+2.500, +2.500] |" in text
    stamp = (out / "full" / "scores.json").stat().st_mtime_ns
    assert Ablations(variants, [config], {}, out).run() == found
    assert (out / "full" / "scores.json").stat().st_mtime_ns == stamp


def test_a_variant_may_lay_configs_over_the_others(monkeypatch, tmp_path):
    """Appended to that variant's files alone, after them."""
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        (folder / "scores.json").write_text(json.dumps(scores_of([50.0, 60.0])))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    variants = {"full": {}, "overlaid": {"overlays": ["more.json"], "keeper": "@export", "left": None}}
    Ablations(variants, ["base.json"], {"device": None}, tmp_path).run()
    files = [command[command.index("--config_file") + 1] for command in commands]
    assert files == ["['base.json']", "['base.json', 'more.json']"]
    assert commands[1][-4:] == ["--keeper", "@export", "--left", "$None"] and "--overlays" not in commands[1]


def test_a_run_that_fails_is_named_with_its_log(config, tmp_path):
    with pytest.raises(CaseError, match="'broken'.*log.txt"):
        Ablations({"broken": {"output_dir": str(tmp_path / "no" / "folder")}}, [config], {}, tmp_path / "out").run()


def test_interval_is_students():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.3027."""
    found = {"a": {"x": {"dose_score": 0.0, "dvh_score": 0.0, "dose_errors_gy": [0.0, 0.0, 0.0]}},
             "b": {"x": {"dose_score": 2.0, "dvh_score": 0.0, "dose_errors_gy": [1.0, 2.0, 3.0]}}}
    assert "+2.000 [-0.484, +4.484]" in table(found)


def scores_of(met, first=40.0):
    """Scores with a share of the limits met, by case."""
    return {"x": {"dose_score": 1.0, "dvh_score": 1.0, "dose_errors_gy": [1.0] * len(met),
                  "constraints_met_percent": first, "reference_constraints_met_percent": 52.5,
                  "constraints_met_percents": met}}


def test_limits_met_are_compared_in_pairs():
    """Differences 10, 20, 30 as above; a case to which no limit applies (nan) is no pair."""
    nan = float("nan")
    found = {"off": scores_of([40.0, 40.0, 40.0, nan]), "on": scores_of([50.0, 60.0, 70.0, nan], 60.0)}
    lines = table(found).splitlines()
    assert lines[0].endswith("| limits met, % | reference, % | difference of limits met [95 %] |")
    assert lines[2].endswith("| 40.0 | 52.5 |  |") and lines[3].endswith("| 60.0 | 52.5 | +20.0 [-4.8, +44.8] |")
    without = {"old": {"x": {k: v for k, v in scores_of([1.0])["x"].items() if "met" not in k}}, **found}
    assert all(line.count("|") == 9 for line in table(without).splitlines())


def test_some_of_the_variants(tmp_path):
    """The first one is what the others are compared with, so it is always among them."""
    variants = {"full": {}, "a": {}, "b": {}}
    assert list(Ablations(variants, [], {}, tmp_path, names=["b"]).variants) == ["full", "b"]
    assert list(Ablations(variants, [], {}, tmp_path).variants) == ["full", "a", "b"]
    with pytest.raises(CaseError, match="no variant c; expected some of full, a, b"):
        Ablations(variants, [], {}, tmp_path, names=["b", "c"])


@pytest.mark.slow
@pytest.mark.parametrize("overlays, variants, inferers", [
    ((), ["full", "with one plan", "without CT"], {"plain", "flips"}),
    (("claims.json",), ["full", "with the constraint loss", "without structure encoder"], {"one step", "four steps"}),
    (("train_broad.json", "ablations_broad.json"), ["full", "without CT", "without neighbourhoods"], {"plain"}),
])
def test_the_commands_of_the_page(overlays, variants, inferers, tmp_path):
    """Trained for seconds on coarse synthetic patients, scored on every other one, as the pages' commands do it."""
    for seed in (3, 4, 5, 6, 7):
        case = make_case("HeadNeck", seed, shape=(40, 40, 20))
        plan = plan_dose(case, beamlet_mm=12.0, iterations=6, normalise=True)
        write_study(with_dose(case, plan.dose_gy), tmp_path / "cases" / f"hn_{seed}", patient_id=f"hn_{seed}")
    network = json.loads((ROOT / "bundle" / "configs" / "smoke.json").read_text())["network_def"]
    if "ablations_broad.json" in overlays:
        network["broad"] = {"members": 2, "fine_members": 2, "fine_share": 1.0, "target_share": 1.0}
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"network_def": network, "patch_size": [32, 32, 16], "prior_roi_size": [32, 32, 16],
                                 "prior_overlap_voxels": 8}))
    further = [*overlays, str(small)]
    files = [f"bundle/configs/{name}" for name in ("inference.json", "train.json", "ablations.json", *overlays)]
    options = {"further_configs": further, "train_minutes": 0.1, "validation_share": 0.6, "score_every": 2,
               "num_workers": 1, **({} if "claims.json" in overlays else {"ablated": variants}),
               **({} if overlays else {"denoiser_from": 1.0})}
    command = [sys.executable, "-m", "monai.bundle", "run", "ablations", "--config_file", str([*files, str(small)]),
               "--dataset_dir", str(tmp_path / "cases"), "--output_dir", str(tmp_path / "out")]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    logs = "".join(path.read_text()[-1500:] for path in (tmp_path / "out").glob("*/log.txt"))
    assert done.returncode == 0, done.stderr[-1500:] + logs
    found = json.loads((tmp_path / "out" / "ablations.json").read_text())
    assert list(found) == variants and all(set(scores) == inferers for scores in found.values())
    cases = {scores["cases"] for variant in found.values() for scores in variant.values()}
    assert len(cases) == 1 and 0 < cases.pop() < 4
    assert "limits met, %" in (tmp_path / "out" / "ablations.md").read_text()
