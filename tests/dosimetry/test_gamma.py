"""The gamma index on doses whose answer is known."""

import sys

import numpy as np
import pytest

from custom.case import CaseError, Grid
from custom.dosimetry.gamma import GammaCriterion, gamma_pass_percent, parse_criteria

GRID = Grid.axis_aligned((16, 14, 12), (2.0, 2.0, 3.0))
BODY = np.ones(GRID.shape, bool)
RAMP = (20 + 2.0 * np.arange(16)[:, None, None] + np.zeros(GRID.shape)).astype(np.float32)  # 1 Gy/mm along i


def test_without_pymedphys_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymedphys", None)
    with pytest.raises(CaseError, match=r"\[gamma\]"):
        gamma_pass_percent(RAMP, RAMP, GRID, BODY)


def test_shapes_that_do_not_fit():
    with pytest.raises(CaseError, match="shape"):
        gamma_pass_percent(RAMP[1:], RAMP, GRID, BODY)


def test_criteria_are_read(monkeypatch):
    monkeypatch.setattr("custom.dosimetry.gamma._is_installed", lambda: True)
    assert parse_criteria(["3%/3mm", "2%/1.5mm local", "1%/1mm global"]) == (
        GammaCriterion(3, 3), GammaCriterion(2, 1.5, is_local=True), GammaCriterion(1, 1))
    assert parse_criteria("3%/3mm") == (GammaCriterion(3, 3),)
    assert parse_criteria(["2%/1.5mm local"])[0].name == "gamma_2percent_1.5mm_local_pass_percent"
    for text in ("3/3", "3%/3mm localy", "3mm/3%"):
        with pytest.raises(CaseError, match=f"'{text}'.*'3%/3mm'"):
            parse_criteria([text])


def test_a_criterion_without_the_extra_is_told_before_anything_is_predicted(monkeypatch):
    monkeypatch.setattr("custom.dosimetry.gamma._is_installed", lambda: False)
    assert parse_criteria([]) == ()
    with pytest.raises(CaseError, match=r"\[gamma\]"):
        parse_criteria(["3%/3mm"])


class TestWithPymedphys:
    @pytest.fixture(autouse=True)
    def _pymedphys(self):
        pytest.importorskip("pymedphys", reason="the extra 'gamma' is not installed")

    def test_equal_doses_pass(self):
        assert gamma_pass_percent(RAMP, RAMP, GRID, BODY) == 100

    def test_global_and_local_dose_difference(self):
        """In a uniform dose only the dose criterion can be met."""
        flat = np.full(GRID.shape, 50.0, np.float32)
        flat[8:] = 25.0
        shifted = flat + 1.2  # 2.4 % of 50, 4.8 % of 25
        away = BODY.copy()
        away[5:11] = False  # the edge, where a near voxel agrees
        assert gamma_pass_percent(shifted, flat, GRID, away, distance_mm=2.0) == 100
        local = gamma_pass_percent(shifted, flat, GRID, away, distance_mm=2.0, is_local=True)
        assert local == pytest.approx(50, abs=0.1)  # the 25 Gy half fails

    def test_a_shift_within_the_distance_passes(self):
        inner = BODY.copy()
        inner[[0, 1, 2, -1, -2, -3]] = False  # there the shifted dose is not known
        shift_gy = 2.0  # 2 mm
        assert gamma_pass_percent(RAMP + shift_gy, RAMP, GRID, inner, dose_percent=0.1, distance_mm=2.5) == 100
        assert gamma_pass_percent(RAMP + shift_gy, RAMP, GRID, inner, dose_percent=0.1, distance_mm=1.0) == 0

    def test_low_doses_and_the_outside_do_not_count(self):
        body = BODY.copy()
        body[:, 7:] = False
        wrong = np.where(body, RAMP, 0).astype(np.float32)
        inside = body.copy()
        inside[:, 6] = False
        assert gamma_pass_percent(wrong, RAMP, GRID, inside) == 100
        assert np.isnan(gamma_pass_percent(RAMP, RAMP, GRID, ~BODY))
        low = np.where(RAMP < 30, RAMP + 15, RAMP).astype(np.float32)
        assert gamma_pass_percent(low, RAMP, GRID, BODY, cutoff_percent=100 * 31 / 50, distance_mm=1.0) == 100
