"""DVH figures against values known from geometry."""

import numpy as np
import pytest

from custom.case import CaseError
from custom.dosimetry.dvh import Metric, cumulative_dvh, parse_metric

RAMP_GY = np.arange(100) + 0.5  # a slab in a gradient of 1 Gy a voxel: 0 to 100 Gy between its faces


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Mean[Gy]", 50.0),
        ("Max[Gy]", 99.5),
        ("Min[Gy]", 0.5),
        ("D95%[Gy]", 5.0),
        ("D2%[Gy]", 98.0),
        ("D50%[Gy]", 50.0),
        ("D1cc[Gy]", 90.0),
        ("D95%[%]", 10.0),
        ("Mean[%]", 100.0),
        ("V20Gy[%]", 80.0),
        ("V20Gy[cc]", 8.0),
        ("V50%[%]", 75.0),
        ("V95%[cc]", 5.2),  # 47.5 Gy: the voxels from 47.5 to 99.5 Gy
    ],
)
def test_metrics_of_a_linear_gradient(text, expected):
    value = parse_metric(text).evaluate(RAMP_GY, voxel_cc=0.1, prescription_gy=50.0)
    assert value == pytest.approx(expected, abs=0.51 if text == "V95%[cc]" else 1e-9)


def test_metric_text_round_trip():
    for text in ("Mean[Gy]", "D0.1cc[Gy]", "V20Gy[cc]", "D95%[%]", "V100%[%]"):
        assert str(parse_metric(text)) == text
    assert parse_metric("D0.1cc[Gy]") == Metric("D", "Gy", 0.1, "cc")


@pytest.mark.parametrize("text", ["D95[Gy]", "V20[%]", "Dmax", "D0%[Gy]", "D120%[Gy]", "V20Gy[Gy]", "mean[Gy]", ""])
def test_bad_metric_is_named_in_the_error(text):
    with pytest.raises(CaseError, match="metric"):
        parse_metric(text)


def test_share_of_prescription_needs_one():
    with pytest.raises(CaseError, match="prescribed dose"):
        parse_metric("D95%[%]").evaluate(RAMP_GY, 0.1)


def test_empty_structure_is_nan_and_small_structure_gives_its_minimum():
    assert np.isnan(parse_metric("Mean[Gy]").evaluate(np.array([]), 0.1))
    assert parse_metric("D5cc[Gy]").evaluate(np.array([3.0, 4.0]), 0.1) == 3.0


def test_sphere_in_a_gradient():
    """Analytic DVH of a sphere in a linear gradient: V(d) is the volume of a spherical cap."""
    radius, gradient = 20.0, 1.0  # mm, Gy / mm
    axis = np.arange(-24, 25, 1.0)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    mask, dose = x**2 + y**2 + z**2 <= radius**2, 30 + gradient * z
    height = radius - (40.5 - 30) / gradient  # 40.5 Gy lies between two planes of voxel centres
    cap = np.pi * height**2 * (3 * radius - height) / 3
    assert parse_metric("V40.5Gy[cc]").evaluate(dose[mask], 0.001) == pytest.approx(cap / 1000, rel=0.02)
    assert parse_metric("Mean[Gy]").evaluate(dose[mask], 0.001) == pytest.approx(30, abs=1e-6)
    dvh = cumulative_dvh(dose, mask, 0.001, step_gy=0.5)
    assert dvh.volume_cc == pytest.approx(4 / 3 * np.pi * radius**3 / 1000, rel=0.01)
    assert dvh.volume_percent[0] == 100 and dvh.volume_percent[-1] == 0
    assert (np.diff(dvh.volume_percent) <= 0).all()
    assert np.interp(30, dvh.dose_gy, dvh.volume_percent) == pytest.approx(50, abs=3)


def test_dvh_errors():
    with pytest.raises(CaseError, match="shape"):
        cumulative_dvh(np.zeros((2, 2, 2)), np.ones((3, 2, 2), bool), 0.1)
    with pytest.raises(CaseError, match="no voxels"):
        cumulative_dvh(np.zeros((2, 2, 2)), np.zeros((2, 2, 2), bool), 0.1)
