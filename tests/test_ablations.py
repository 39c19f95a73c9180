"""Runs of variants, each in its own process, and their table."""

import json

import pytest

from custom.ablations import Ablations, table
from custom.case import CaseError

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


def test_a_run_that_fails_is_named_with_its_log(config, tmp_path):
    with pytest.raises(CaseError, match="'broken'.*log.txt"):
        Ablations({"broken": {"output_dir": str(tmp_path / "no" / "folder")}}, [config], {}, tmp_path / "out").run()


def test_interval_is_students():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.3027."""
    found = {"a": {"x": {"dose_score": 0.0, "dvh_score": 0.0, "dose_errors_gy": [0.0, 0.0, 0.0]}},
             "b": {"x": {"dose_score": 2.0, "dvh_score": 0.0, "dose_errors_gy": [1.0, 2.0, 3.0]}}}
    assert "+2.000 [-0.484, +4.484]" in table(found)
