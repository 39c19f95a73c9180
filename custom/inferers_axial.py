"""Inference of the axial diffusion networks: whole volumes in batches of slices, sampled by DDIM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from custom.case import CaseError
from custom.inferers import DoseDiffusionInferer
from custom.networks.ddim import ddim_sample

__all__ = ["AxialSliceInferer"]


class AxialSliceInferer(DoseDiffusionInferer):
    """Dose of a volume ``(B, C, X, Y, Z)``, axial slices batched, each with the neighbours that the network looks at.

    The noise belongs to the volume: any number of slices a batch gives the same dose, and a flip flips where
    it starts. (MONAI's ``SliceInferer`` knows neither neighbours nor noise.)

    Args:
        num_inference_steps: DDIM steps; DoseDiff takes 8.
        slices_per_batch: axial slices predicted together.
        eta: 0 for deterministic steps; 1 adds the noise of DoseDiff's eq. 7.
        stochastic: start from unit noise; False starts from zero, the middle of the noise.
        num_samples, seed, flips, condition_channels, swap_channels, autocast_dtype, with_std: see
            :class:`custom.inferers.DoseDiffusionInferer`.
    """

    def __init__(
        self,
        num_inference_steps: int = 8,
        slices_per_batch: int = 32,
        eta: float = 0.0,
        stochastic: bool = True,
        num_samples: int = 1,
        seed: int | None = 0,
        flips: Sequence[Sequence[int]] = (),
        condition_channels: Sequence[str] = (),
        swap_channels: Sequence[Sequence[str]] = (),
        autocast_dtype: str | None = None,
        with_std: bool = False,
    ) -> None:
        super().__init__(
            num_inference_steps=num_inference_steps, num_samples=num_samples, stochastic=stochastic, seed=seed,
            flips=flips, condition_channels=condition_channels, swap_channels=swap_channels,
            autocast_dtype=autocast_dtype, with_std=with_std,
        )  # fmt: skip
        if slices_per_batch < 1:
            raise CaseError(f"inferer: slices_per_batch {slices_per_batch}; expected 1 or more")
        self.slices_per_batch, self.eta = slices_per_batch, eta

    def _start(self, image: Tensor, network: nn.Module, generator: torch.Generator | None) -> Tensor:
        """The noise of each sample, ``(B, K, X, Y, Z)``, or zero."""
        shape = (image.shape[0], 1, *image.shape[2:])
        if not self.stochastic:
            return image.new_zeros((shape[0], self.num_samples, *shape[2:]), dtype=torch.float32)
        return torch.cat([_noise(shape, seed) for seed in self._seeds(generator)], dim=1).to(image.device)

    def _volume(
        self,
        image: Tensor,
        network: nn.Module,
        generator: torch.Generator | None,
        prior: Tensor | None,
        start: Tensor,
    ) -> Tensor:
        """Doses ``(B, K, X, Y, Z)``; each batch of slices encodes its conditions once for all samples."""
        seeds = self._seeds(generator) if self.eta else [0] * self.num_samples
        depth, halo, parts = image.shape[-1], network.halo, []
        for first in range(0, depth, self.slices_per_batch):
            last = min(first + self.slices_per_batch, depth)
            seen = slice(max(first - halo, 0), min(last + halo, depth))
            kept = slice(first - seen.start, last - seen.start)
            with torch.autocast(image.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
                conditions = network.encode(image[..., seen])
                doses = [self._sample(network, conditions, start[:, [k]], seen, seed)[..., kept]
                         for k, seed in enumerate(seeds)]
            parts.append(torch.cat(doses, dim=1))
        return torch.cat(parts, dim=-1)

    def _sample(self, network: nn.Module, conditions, start: Tensor, seen: slice, seed: int) -> Tensor:
        """One sample of the slices ``seen``, with that part of the volume's noise: ``start`` (B, 1, X, Y, Z)."""

        def noise(number: int) -> Tensor:
            return _noise(start.shape, seed + 1 + number)[..., seen].to(start.device)

        x0 = ddim_sample(network, start[..., seen], conditions, self.num_inference_steps, self.eta, noise)
        return network.to_dose(x0, conditions).float()

    def _seeds(self, generator: torch.Generator | None) -> list[int]:
        return torch.randint(2**31, (self.num_samples,), generator=generator).tolist()


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
