"""Gaussian processes against equations written out, and against functions that are known."""

import pytest
import torch

from custom.networks.gaussian_process import GpTask, covariance, fit_family, group_kernels

GROUPS = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])  # two groups of two inputs


def inputs(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_kernels_are_means_over_each_group():
    a, b = inputs(3), inputs(5, 1)
    distances, products = group_kernels(a, b, GROUPS.double())
    assert distances.shape == products.shape == (2, 3, 5)
    assert float(distances[1, 2, 4]) == pytest.approx(float((a[2, 2:] - b[4, 2:]).square().mean()))
    assert float(products[0, 1, 3]) == pytest.approx(float((a[1, :2] * b[3, :2]).mean()))


def test_left_out_estimates_are_those_of_a_fit_without_the_patient():
    """The covariance's parameters kept, a patient's estimate from the others alone (Rasmussen and Williams, 5.12)."""
    x = inputs(30)
    y = x[:, 0] + 0.3 * inputs(30, 2)[:, 0]
    (fit,) = fit_family([GpTask(x, y)], GROUPS, steps=30)
    kernel = covariance(*group_kernels(x, x, GROUPS.double()), fit.relevance, fit.slope, fit.amplitude)
    unit = 1.4826 * (y - y.median()).abs().median()
    z = ((y - y.median()) / unit).clamp(-2.5, 2.5)
    # K w = z - noise w, for the weights in units of z
    w = fit.weights / unit
    noise = float(((z - kernel @ w) / w).median())
    others = torch.arange(30) != 7
    solved = torch.linalg.solve(kernel[others][:, others] + noise * torch.eye(29).double(), z[others])
    expected = y.median() + unit * (kernel[7, others] @ solved)
    assert float(fit.left_out[7]) == pytest.approx(float(expected), abs=1e-6)


def test_finds_what_matters_and_foretells_it():
    """Two tasks of one family depend on the first group, one of them not in a line."""
    x, z = inputs(120), inputs(60, 3)
    functions = (lambda v: v[:, 0] - 0.5 * v[:, 1], lambda v: torch.sin(2 * v[:, 0]))
    noise = 0.1 * inputs(120, 4)
    fits = fit_family([GpTask(x, f(x) + noise[:, i]) for i, f in enumerate(functions)], GROUPS)
    for function, fit in zip(functions, fits):
        kernels = group_kernels(z, x, GROUPS.double())
        estimate = fit.offset + covariance(*kernels, fit.relevance, fit.slope, fit.amplitude) @ fit.weights
        error = (estimate - function(z)).abs().mean()
        assert error < 0.25 * function(z).abs().mean()
        assert fit.relevance[0] > 2 * fit.relevance[1]


def test_noise_alone_is_not_believed():
    x, y = inputs(80), inputs(80, 5)[:, 0]
    (fit,) = fit_family([GpTask(x, y)], GROUPS)
    assert (fit.left_out - y).abs().mean() < 1.15 * (y - y.median()).abs().mean()
    assert fit.left_out.std() < 0.6 * y.std()
