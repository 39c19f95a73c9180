"""Soft metrics: the exact ones in the limit, with gradients that point the right way."""

import numpy as np
import pytest
import torch

from custom.case import CaseError
from custom.dosimetry.dvh import parse_metric
from custom.protocol.soft import Softness, soft_value

METRICS = ["Max[Gy]", "Min[Gy]", "Mean[Gy]", "Mean[%]", "D95%[Gy]", "D2%[Gy]", "D0.1cc[Gy]", "D1cc[Gy]", "D95%[%]",
           "V20Gy[%]", "V40Gy[cc]", "V95%[%]"]
VOXEL_CC, RX_GY = 0.02, 50.0


@pytest.fixture(scope="module")
def dose_gy():
    return 60 * np.random.default_rng(0).beta(2, 2, 3000)


@pytest.mark.parametrize("text", METRICS)
def test_soft_tends_to_exact(dose_gy, text):
    metric = parse_metric(text)
    exact = metric.evaluate(dose_gy, VOXEL_CC, RX_GY)
    errors = []
    for temperature in (1.0, 0.1, 0.001):
        softness = Softness(2.0, 0.05).at(temperature)
        soft = soft_value(metric, torch.from_numpy(dose_gy), VOXEL_CC, RX_GY, softness)
        errors.append(abs(float(soft) - exact))
    assert errors[0] >= errors[1] - 1e-9 >= errors[2] - 2e-9 and errors[2] <= 0.01 * max(exact, 1)
    assert errors[0] < 6  # and is not far off at any temperature: Gy, or % of a volume


def test_a_maximum_is_the_mean_of_the_hottest_share():
    dose = torch.arange(100.0)
    value = soft_value(parse_metric("Max[Gy]"), dose, 1.0, RX_GY, Softness(volume_share=0.035))
    assert float(value) == pytest.approx((99 + 98 + 97 + 0.5 * 96) / 3.5)
    assert float(soft_value(parse_metric("Min[Gy]"), dose, 1.0, RX_GY, Softness(volume_share=0.02))) == 0.5
    assert float(soft_value(parse_metric("Max[Gy]"), dose[:3], 1.0, RX_GY, Softness(volume_share=0.0))) == 2


def test_a_volume_is_counted_by_a_sigmoid_of_the_stated_width():
    dose = torch.tensor([18.0, 20.0, 22.0])
    value = soft_value(parse_metric("V20Gy[%]"), dose, 1.0, RX_GY, Softness(dose_gy=2.0))
    assert float(value) == pytest.approx(100 / 3 * (1 / (1 + np.e) + 0.5 + np.e / (1 + np.e)), rel=1e-6)


@pytest.mark.parametrize("text", METRICS)
def test_gradients_are_finite_and_never_negative(dose_gy, text):
    """More dose anywhere never lowers a metric, and raises it somewhere."""
    dose = torch.from_numpy(dose_gy).requires_grad_()
    soft_value(parse_metric(text), dose, VOXEL_CC, RX_GY, Softness()).backward()
    assert torch.isfinite(dose.grad).all() and (dose.grad >= 0).all() and dose.grad.max() > 0


@pytest.mark.parametrize("text", ["Max[Gy]", "D95%[Gy]", "D0.1cc[Gy]", "V20Gy[%]", "Mean[Gy]"])
@pytest.mark.parametrize("dose", [[30.0], [30.0, 30.0, 30.0], [0.0, 0.0]])
def test_tiny_and_flat_structures(dose, text):
    metric, values = parse_metric(text), torch.tensor(dose, requires_grad=True)
    soft = soft_value(metric, values, VOXEL_CC, RX_GY, Softness())
    soft.backward()
    assert float(soft) == pytest.approx(metric.evaluate(np.array(dose), VOXEL_CC), abs=1e-4)
    assert torch.isfinite(values.grad).all()


def test_empty_structures_and_bad_widths_are_refused():
    with pytest.raises(CaseError, match="expected the doses"):
        soft_value(parse_metric("Mean[Gy]"), torch.zeros(0), 1.0, RX_GY, Softness())
    with pytest.raises(CaseError, match="dose_gy > 0"):
        Softness(dose_gy=0.0)
