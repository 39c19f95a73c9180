"""Denoising diffusion implicit models: sampling in few steps (Song et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from custom.case import CaseError

__all__ = ["ddim_sample", "ddim_timesteps"]


def ddim_timesteps(num_train_timesteps: int, num_steps: int) -> list[int]:
    """Time steps from T down, evenly spaced so that the first is T itself (DoseDiff: ``tau_S = T``).

    Indices count from 0, so T is ``num_train_timesteps - 1``. Schedules that start below T, such as 0, 125, ..., 875,
    treat unit noise as something less noisy; those that end at 0 waste their last step.

    Raises:
        CaseError: fewer than one step, or more than the process has.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise CaseError(f"DDIM: {num_steps} steps; expected 1 to {num_train_timesteps}")
    return [round(num_train_timesteps * i / num_steps) - 1 for i in range(num_steps, 0, -1)]


def ddim_sample(
    network: nn.Module,
    x_t: Tensor,
    conditions: Any,
    num_steps: int,
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Sample ``x_0`` from ``x_t`` at t = T: eq. 12 and 16 of the DDIM paper, eq. 7 of DoseDiff.

    Each step goes from t to the next time step s with ``x_s = a_s x0 + sqrt(1 - a_s^2 - sigma^2) eps + sigma z``; the
    last one returns the estimate of ``x_0`` itself.

    Args:
        network: has ``schedule`` and ``denoise(x_t, t, conditions)``, the estimate of ``x_0``.
        x_t: start, ``(B, 1, X, Y, Z)``, usually unit noise.
        conditions: passed on.
        num_steps: evaluations of the denoiser.
        eta: 0 for the deterministic sampler; 1 for the noise of DoseDiff's eq. 7, which with all steps is DDPM.
        noise: z of a step (counted from 0), of ``x_t``'s shape; wanted when ``eta`` is not 0.
    """
    if eta and noise is None:
        raise CaseError(f"DDIM: eta is {eta:g}, which adds noise at every step; give the noise")
    alpha_bar = network.schedule.alpha_bar.double()
    steps = ddim_timesteps(len(alpha_bar), num_steps)
    for i, step in enumerate(steps):
        t = torch.full((x_t.shape[0],), step, device=x_t.device)
        x0 = network.denoise(x_t, t, conditions)
        if i + 1 == len(steps):
            break
        now, after = float(alpha_bar[step]), float(alpha_bar[steps[i + 1]])
        eps = (x_t - now**0.5 * x0) / (1 - now) ** 0.5
        sigma = eta * ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5
        x_t = after**0.5 * x0 + max(1 - after - sigma**2, 0.0) ** 0.5 * eps
        if eta:
            x_t = x_t + sigma * noise(i)
    return x0
