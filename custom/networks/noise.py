"""Noise as the residual is: what the diffusion adds to a dose looks like the errors that it is to learn.

The residual of a predicted dose is no white noise. Where the dose is high or nil it errs less than in between, its
neighbours err alike over centimetres, and the more alike the more of their dose comes from the same beams: it looks
like beams that carry more or less than was thought. White noise of one size leaves such data visible until almost all
of the schedule is over, all that matters is decided in one step, and the small scales never come out clean. With noise
of the residual's own correlation, and the residual in units of its own local size, the ideal denoiser of Gaussian data
is a number at each time step, few steps suffice, and a network has only to learn what is not Gaussian. The reverse
process stays as it was, since this is the white one in other coordinates (Voleti et al., Score-based denoising
diffusion with non-isotropic Gaussian noise models, NeurIPS 2022 workshop).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from custom.case import CaseError

__all__ = ["CorrelatedNoise", "ScaleOfDose", "draw_noise"]


class CorrelatedNoise(nn.Module):
    """Gaussian noise of unit variance in every voxel, smooth on several scales and, where there are beams, along them.

    A field is a sum of independent parts, each white noise under a Gaussian filter of standard deviation ``s`` voxels;
    over ``d`` voxels a part's correlation is ``exp(-d^2 / (4 s^2))``. Each beam has a field of its own, by which it
    carries more or less; its weight in a voxel is its dose there over the root of the sum of their squares. So the
    correlation of two voxels is that of their distance, times the cosine of their beams' doses.

    Args:
        scales_voxels: ``s`` of each part; 0 is white.
        shares: of each part in the variance; their sum is taken as 1.
        elsewhere: dose of a further field that all voxels have, as a fraction of the prescription, for where the beams
            have none.

    Raises:
        CaseError: scales and shares that do not fit together.
    """

    def __init__(self, scales_voxels: Sequence[float], shares: Sequence[float], elsewhere: float = 0.02) -> None:
        super().__init__()
        scales, parts = [float(s) for s in scales_voxels], [float(w) for w in shares]
        if not scales or len(scales) != len(parts) or min(scales) < 0 or min(parts) <= 0 or elsewhere <= 0:
            raise CaseError(f"noise: scales_voxels {scales}, shares {parts} and elsewhere {elsewhere}; expected as "
                            "many scales as shares, no scale below 0, the others above 0")
        self.scales_voxels, self.shares = scales, [w / sum(parts) for w in parts]
        self.elsewhere = elsewhere

    def draw(
        self, shape: Sequence[int], generator: torch.Generator | None = None, beams: Tensor | None = None
    ) -> Tensor:
        """Noise on the CPU, in float32.

        Args:
            shape: ``(..., X, Y, Z)``; ``(B, K, X, Y, Z)`` where there are beams.
            generator: makes it repeatable.
            beams: dose of each beam, ``(B, n, X, Y, Z)``; None, or n = 0, for one field.
        """
        with torch.autocast("cpu", enabled=False):
            if beams is None or not beams.shape[1]:
                return self._field(shape, generator)
            doses = beams.detach().float().cpu()
            length = (doses.square().sum(1, keepdim=True) + self.elsewhere**2).sqrt()
            total = self._field(shape, generator) * (self.elsewhere / length)
            for dose in doses.split(1, dim=1):
                total += self._field(shape, generator) * (dose / length)
        return total

    def correlation(self, places_voxels: Tensor, beams: Tensor) -> Tensor:
        """Correlation of the voxels of one drawn noise, ``(..., V, V)``.

        Args:
            places_voxels: where they lie, ``(..., V, 3)``.
            beams: dose of each beam in each, ``(..., V, n)``.
        """
        exact = "donot_use_mm_for_euclid_dist"  # a voxel's distance to itself is to be none
        squared = torch.cdist(places_voxels, places_voxels, compute_mode=exact).square()
        alike = torch.zeros_like(squared)
        for scale, share in zip(self.scales_voxels, self.shares):
            alike += share * (torch.exp(squared / (-4 * scale**2)) if scale else (squared == 0).to(squared.dtype))
        doses = torch.cat([beams, torch.full_like(beams[..., :1], self.elsewhere)], dim=-1)
        weights = doses / doses.norm(dim=-1, keepdim=True)
        return alike * (weights @ weights.transpose(-1, -2))

    def _field(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        total = torch.zeros(tuple(shape))
        for scale, share in zip(self.scales_voxels, self.shares):
            total += share**0.5 * _smooth(tuple(shape), scale, generator)
        return total


class ScaleOfDose(nn.Module):
    """Size of the residual where the prior dose is ``d``: linear between given points, constant beyond them.

    Args:
        scale: one number for all doses, or pairs ``(dose, size)`` in rising order of the dose; both are fractions of
            the highest prescription.

    Raises:
        CaseError: points out of order, or sizes that are not above 0.
    """

    def __init__(self, scale: float | Sequence[Sequence[float]]) -> None:
        super().__init__()
        points = [(0.0, float(scale))] if isinstance(scale, (int, float)) else [tuple(map(float, p)) for p in scale]
        doses, sizes = [p[0] for p in points], [p[-1] for p in points]
        rising = all(a < b for a, b in zip(doses, doses[1:]))
        if not points or any(len(p) != 2 for p in points) or not rising or min(sizes) <= 0:
            raise CaseError(f"residual_scale {scale}; expected a number above 0, or pairs (dose, size) in rising order "
                            "of the dose, sizes above 0")
        self.register_buffer("doses", torch.tensor(doses), persistent=False)
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)

    def forward(self, prior: Tensor) -> Tensor:
        """Size for each voxel of ``prior``, of the same shape, in float32."""
        dose = prior.float()
        if len(self.doses) == 1:
            return self.sizes.expand_as(dose)
        dose = dose.clamp(self.doses[0], self.doses[-1])
        after = torch.bucketize(dose, self.doses).clamp(1, len(self.doses) - 1)
        low, high = self.doses[after - 1], self.doses[after]
        return torch.lerp(self.sizes[after - 1], self.sizes[after], (dose - low) / (high - low))


def draw_noise(
    network: nn.Module, shape: Sequence[int], generator: torch.Generator | None = None, beams: Tensor | None = None
) -> Tensor:
    """The noise of a network's diffusion, ``shape`` (B, K, X, Y, Z) on the CPU; white where it has none of its own.

    Args:
        network: may have ``noise``.
        shape, generator, beams: see :meth:`CorrelatedNoise.draw`.
    """
    noise = getattr(network, "noise", None)
    return torch.randn(tuple(shape), generator=generator) if noise is None else noise.draw(shape, generator, beams)


def _smooth(shape: tuple[int, ...], scale_voxels: float, generator: torch.Generator | None) -> Tensor:
    """White noise under a Gaussian filter, its variance brought back to 1 in every voxel, at the edges too.

    The white noise lies on every n-th voxel, n the filter's standard deviation rounded down, which is as good.
    """
    if not scale_voxels:
        return torch.randn(shape, generator=generator)
    stride = max(1, int(scale_voxels))
    nodes = [torch.arange(0, n - 1 + stride, stride, dtype=torch.float32) for n in shape[-3:]]
    field = torch.randn((*shape[:-3], *(len(n) for n in nodes)), generator=generator)
    for axis, (count, node) in enumerate(zip(shape[-3:], nodes), len(shape) - 3):
        place = torch.arange(count, dtype=torch.float32)
        kernel = torch.exp(-0.5 * ((place[:, None] - node[None]) / scale_voxels).square())
        kernel = kernel / kernel.square().sum(1, keepdim=True).sqrt()
        field = torch.tensordot(field, kernel, dims=([axis], [1])).movedim(-1, axis)
    return field
