"""Gaussian processes for a few hundred patients: how a figure of a plan depends on what is known before planning.

Each task is one figure (the mean dose of a parotid, say). Its covariance is a Matern one and a linear one, each with a
relevance for every group of inputs; tasks of one family share these, up to a small deviation of their own, since 200
patients tell 30 relevances poorly. Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006: equation 2.25
(mean), 4.17 (Matern, order 3/2), 5.8 (marginal likelihood, maximised here by Adam), 5.12 (leave one out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GpFit", "GpTask", "covariance", "fit_family", "group_kernels"]

ROBUST_STD = 1.4826  # of the median absolute deviation
CUT = 2.5  # standard deviations from the median to which outcomes are drawn in
JITTER = 1e-4
# Where the search begins, as logarithms, and how strongly it is held there.
RELEVANCE, SLOPE, NOISE = -2.0, -2.5, -0.7
SLOPE_PRIOR, HOLD, OWN_HOLD = -3.0, 0.02, 2.0


@dataclass(frozen=True)
class GpTask:
    """One figure of one structure in the patients who have it.

    Args:
        inputs: ``(N, F)``, standardised.
        outcomes: ``(N,)``.
    """

    inputs: Tensor
    outcomes: Tensor


class GpFit(NamedTuple):
    """What :func:`fit_family` found for one task; the estimate is ``offset + covariance(z, inputs) @ weights``.

    Args:
        relevance: ``(G,)`` of the groups in the Matern covariance.
        slope: ``(G,)`` of the groups in the linear covariance.
        amplitude: of the Matern covariance, in units of the noise-free variance.
        weights: ``(N,)``, in the outcomes' unit.
        offset: the outcomes' median.
        left_out: ``(N,)`` each patient's estimate from all others.
    """

    relevance: Tensor
    slope: Tensor
    amplitude: Tensor
    weights: Tensor
    offset: Tensor
    left_out: Tensor


def group_kernels(a: Tensor, b: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared difference and mean product of each group's inputs, each ``(G, A, B)``.

    Args:
        a, b: ``(A, F)`` and ``(B, F)``.
        groups: ``(G, F)``, rows of zeros and ``1 / size``.
    """
    weighted = a[None] * groups[:, None]  # (G, A, F)
    products = weighted @ b.T
    squares = (weighted * a[None]).sum(-1)[:, :, None] + (groups @ (b * b).T)[:, None]
    return (squares - 2 * products).clamp_min(0), products


def covariance(distances: Tensor, products: Tensor, relevance: Tensor, slope: Tensor, amplitude: Tensor) -> Tensor:
    """Covariance ``(A, B)`` from :func:`group_kernels`."""
    apart = (3 * torch.einsum("g,gab->ab", relevance, distances)).clamp_min(1e-10).sqrt()
    return amplitude * (1 + apart) * torch.exp(-apart) + torch.einsum("g,gab->ab", slope, products)


def fit_family(tasks: Sequence[GpTask], groups: Tensor, steps: int = 50, learning_rate: float = 0.1) -> list[GpFit]:
    """Fit tasks that share the relevance of their inputs.

    Args:
        tasks: with the same inputs' meaning.
        groups: see :func:`group_kernels`.
        steps, learning_rate: of Adam on the negative logarithm of the marginal likelihood.
    """
    groups = groups.double()
    made = [_Standardised(task, groups) for task in tasks]
    count, n = len(groups), len(made)
    shared = torch.tensor([RELEVANCE, SLOPE]).double()[:, None].repeat(1, count).requires_grad_()
    own = torch.zeros(n, count, dtype=torch.double, requires_grad=True)
    scale = torch.tensor([[0.0, NOISE]]).double().repeat(n, 1).requires_grad_()
    optimizer = torch.optim.Adam([shared, own, scale], learning_rate)

    def matrix(i: int) -> tuple[Tensor, ...]:
        relevance, slope = torch.exp(shared[0] + own[i]), torch.exp(shared[1] + own[i])
        amplitude, noise = torch.exp(scale[i])
        return made[i].matrix(relevance, slope, amplitude, noise), relevance, slope, amplitude

    for _ in range(steps):
        optimizer.zero_grad()
        held = (shared[0] - RELEVANCE).square().sum() + (shared[1] - SLOPE_PRIOR).square().sum()
        loss = HOLD * n * held + OWN_HOLD * own.square().sum()
        for i in range(n):
            loss = loss + made[i].unlikelihood(matrix(i)[0])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return [made[i].result(*matrix(i)) for i in range(n)]


class _Standardised:
    """A task with its outcomes about zero and its groups' kernels."""

    def __init__(self, task: GpTask, groups: Tensor) -> None:
        y = task.outcomes.double()
        self.offset = y.median()
        self.unit = (ROBUST_STD * (y - self.offset).abs().median()).clamp_min(1e-6)
        self.y = ((y - self.offset) / self.unit).clamp(-CUT, CUT)
        inputs = task.inputs.double()
        self.kernels = group_kernels(inputs, inputs, groups)

    def matrix(self, relevance: Tensor, slope: Tensor, amplitude: Tensor, noise: Tensor) -> Tensor:
        eye = torch.eye(len(self.y), dtype=torch.double)
        return covariance(*self.kernels, relevance, slope, amplitude) + (noise + JITTER) * eye

    def unlikelihood(self, matrix: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(matrix)
        solved = torch.cholesky_solve(self.y[:, None], factor)[:, 0]
        return 0.5 * self.y @ solved + factor.diagonal().log().sum()

    def result(self, matrix: Tensor, relevance: Tensor, slope: Tensor, amplitude: Tensor) -> GpFit:
        inverse = torch.linalg.inv(matrix)
        solved = inverse @ self.y
        left_out = self.offset + self.unit * (self.y - solved / inverse.diagonal())
        return GpFit(relevance, slope, amplitude, self.unit * solved, self.offset, left_out)
