"""DDIM against what is known in closed form: Gaussian data with its ideal denoiser, single points, and DDPM."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from custom.case import CaseError
from custom.networks.blocks import NoiseSchedule
from custom.networks.ddim import ddim_sample, ddim_timesteps


class IdealDenoiser(nn.Module):
    """E[x_0 | x_t] of x_0 ~ N(mean, std^2): ``mean + a std^2 / (a^2 std^2 + s^2) (x_t - a mean)``."""

    def __init__(self, mean: float, std: float, steps: int = 1000) -> None:
        super().__init__()
        self.schedule, self.mean, self.std, self.seen = NoiseSchedule(steps), mean, std, []

    def denoise(self, x_t, t, conditions):
        self.seen.append(int(t[0]))
        a, s = (scale.double() for scale in self.schedule.scales(t))
        return self.mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (x_t - a * self.mean)


def unit_noise(n=4096, seed=0) -> torch.Tensor:
    return torch.randn(1, 1, n, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
def test_time_steps_begin_at_t_and_are_even(steps):
    found = ddim_timesteps(1000, steps)
    assert found[0] == 999 and len(set(found)) == steps
    gaps = {a - b for a, b in zip(found, found[1:])}
    assert all(abs(gap - 1000 / steps) <= 1 for gap in gaps)


def test_eight_steps_are_those_of_the_paper():
    assert ddim_timesteps(1000, 8) == [999, 874, 749, 624, 499, 374, 249, 124]
    assert ddim_timesteps(1000, 1000) == list(range(999, -1, -1))
    for wrong in (0, 1001):
        with pytest.raises(CaseError, match="expected 1 to 1000"):
            ddim_timesteps(1000, wrong)


@pytest.mark.parametrize("steps", [1, 3, 8, 50])
def test_data_without_spread_comes_back_exactly(steps):
    x0 = ddim_sample(IdealDenoiser(0.3, 0.0), unit_noise(16), None, steps)
    torch.testing.assert_close(x0, torch.full_like(x0, 0.3))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (-0.7, 0.2), (0.4, 1.0)])
def test_eight_steps_follow_the_product_formula(mean, std):
    """For Gaussian data a DDIM step is linear in x - a mean; eight steps multiply eight known factors.

    With r = a std^2 / (a^2 std^2 + s^2) the residual from t to u grows by ``a_u r + s_u (1 - a r) / s``; the last step
    leaves ``r``.
    """
    network = IdealDenoiser(mean, std)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()
    steps = [999, 874, 749, 624, 499, 374, 249, 124]
    factor = 1.0
    for n, step in enumerate(steps):
        a, s = math.sqrt(alpha_bar[step]), math.sqrt(1 - alpha_bar[step])
        r = a * std**2 / (a**2 * std**2 + s**2)
        if n == 7:
            factor *= r
        else:
            after = alpha_bar[steps[n + 1]]
            factor *= math.sqrt(after) * r + math.sqrt(1 - after) * (1 - a * r) / s
    noise = unit_noise(32)
    found = ddim_sample(network, noise, None, 8)
    expected = mean + factor * (noise - math.sqrt(alpha_bar[999]) * mean)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert network.seen == steps


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_many_steps_reach_the_probability_flow_solution(std):
    """x_0 = mean + std (x_T - a_T mean) / sqrt(a_T^2 std^2 + s_T^2); the error falls as the steps grow."""
    network, noise = IdealDenoiser(0.2, std), unit_noise(32)
    a, s = (float(v) for v in network.schedule.scales(torch.tensor([999])))
    exact = 0.2 + std * (noise - a * 0.2) / math.sqrt(a**2 * std**2 + s**2)
    errors = [float((ddim_sample(network, noise, None, n) - exact).abs().max()) for n in (8, 50, 250, 1000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * std


def test_all_steps_with_noise_are_ddpm():
    """eta = 1 with every step: the ancestral sampler's posterior mean and variance (Ho et al., eq. 7), step by step."""
    network = IdealDenoiser(0.2, 0.5, steps=20)
    noises = [unit_noise(8, seed) for seed in range(1, 20)]
    found = ddim_sample(network, unit_noise(8), None, 20, eta=1.0, noise=lambda i: noises[i])
    alpha_bar, x = network.schedule.alpha_bar.double(), unit_noise(8)
    for i, step in enumerate(range(19, 0, -1)):
        x0 = network.denoise(x, torch.tensor([step]), None)
        now, after = alpha_bar[step], alpha_bar[step - 1]
        beta = 1 - now / after
        mean = after.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - after) / (1 - now) * x
        x = mean + (beta * (1 - after) / (1 - now)).sqrt() * noises[i]
    torch.testing.assert_close(found, network.denoise(x, torch.tensor([0]), None), atol=1e-6, rtol=1e-5)


def test_noisy_steps_keep_mean_and_spread():
    network = IdealDenoiser(0.2, 0.5)
    found = ddim_sample(network, unit_noise(), None, 200, eta=1.0, noise=lambda i: unit_noise(seed=i + 1))
    assert float(found.mean()) == pytest.approx(0.2, abs=0.03)
    assert float(found.std()) == pytest.approx(0.5, abs=0.03)


def test_noise_is_asked_for():
    with pytest.raises(CaseError, match="give the noise"):
        ddim_sample(IdealDenoiser(0.0, 1.0), unit_noise(4), None, 8, eta=1.0)
