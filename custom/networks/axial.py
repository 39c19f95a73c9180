"""What the axial (2D) diffusion networks share: slices as a batch, named channels, the diffused dose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from custom.case import CaseError
from custom.networks.blocks import NoiseSchedule, make_norm, time_encoding, zero_init

__all__ = [
    "AxialConditions",
    "AxialDiffusion",
    "AxialResidualBlock",
    "TimeEmbedding",
    "channel_indices",
    "fold_slices",
    "patchify",
    "scale_ct",
    "unfold_slices",
    "unpatchify",
]


def fold_slices(x: Tensor) -> Tensor:
    """Axial slices of ``(B, C, X, Y, Z)`` as a batch ``(B * Z, C, X, Y)``."""
    return x.permute(0, 4, 1, 2, 3).flatten(0, 1)


def unfold_slices(x: Tensor, batch: int) -> Tensor:
    """Inverse of :func:`fold_slices`: ``(B * Z, C, X, Y)`` to ``(B, C, X, Y, Z)``."""
    return x.unflatten(0, (batch, -1)).permute(0, 2, 3, 4, 1)


def patchify(x: Tensor, patch: int) -> Tensor:
    """``(N, C, X, Y)`` to ``(N, C * patch^2, X / patch, Y / patch)``: no convolution then runs at full resolution."""
    return F.pixel_unshuffle(x, patch) if patch > 1 else x


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """Inverse of :func:`patchify`."""
    return F.pixel_shuffle(x, patch) if patch > 1 else x


def pad_plane(x: Tensor, multiple: int) -> Tensor:
    """Append zeros at the far end of both axes of ``(N, C, X, Y)`` up to a multiple of ``multiple``, at least twice it.

    Twice, since normalisation and attention want more than one voxel at the lowest level.
    """
    extra = [max(-int(n) % multiple, 2 * multiple - int(n)) for n in x.shape[2:]]
    return F.pad(x, (0, extra[1], 0, extra[0])) if any(extra) else x


def scale_ct(ct: Tensor, low: float = -1.0, high: float = 1.5) -> Tensor:
    """HU / 1000 clipped to ``[low, high]`` and mapped to [-1, 1], DoseDiff's range of -1000 to 1500 HU."""
    return 2 * (ct.clamp(low, high) - low) / (high - low) - 1


def channel_indices(names: Sequence[str], wanted: Sequence[str], what: str) -> list[int]:
    """Where the wanted channels lie.

    Raises:
        CaseError: a wanted channel is not there.
    """
    missing = [name for name in wanted if name not in names]
    if missing:
        raise CaseError(f"network: {what} {missing} are not among the condition_channels {list(names)}")
    return [list(names).index(name) for name in wanted]


class AxialResidualBlock(nn.Module):
    """GroupNorm - SiLU - conv - AdaGN - SiLU - conv, plus input, on slices ``(N, C, X, Y)`` (DoseDiff, eq. 11).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; a 1x1 convolution carries the input over where they differ.
        embedding_dim: width of the time embedding; 0 for a block that does not see the time.
        adaptive_norm: scale and shift the second norm by the embedding (AdaGN); False adds the embedding before it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int = 0, adaptive_norm: bool = True
    ) -> None:
        super().__init__()
        self.adaptive = bool(embedding_dim) and adaptive_norm
        self.norm1 = make_norm("group", in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm("group", out_channels, affine=not self.adaptive)
        self.embed = None
        if embedding_dim:
            self.embed = zero_init(nn.Linear(embedding_dim, (1 + self.adaptive) * out_channels))
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """``x`` (N, in_channels, X, Y), ``embedding`` (N, embedding_dim)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.embed is None:
            return self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        projected = self.embed(embedding)[:, :, None, None]
        if self.adaptive:
            scale, shift = projected.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + projected)
        return self.skip(x) + self.conv2(F.silu(h))


class TimeEmbedding(nn.Module):
    """Sinusoidal encoding of the time steps ``(N,)`` and a two-layer perceptron, to ``(N, dim)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(time_encoding(t, self.dim))


@dataclass(frozen=True)
class AxialConditions:
    """What the denoiser needs of a volume, computed once and used at every step.

    Args:
        body: ``(B, 1, X, Y, Z)``, 1 inside.
        level: ``(B, 1, 1, 1, 1)`` highest prescription in units of the context channel ``prescription_level``.
        maps: the network's own condition tensors, folded to slices and padded.
        size: spatial size of the image.
    """

    body: Tensor
    level: Tensor
    maps: Any
    size: tuple[int, int, int]


class AxialDiffusion(nn.Module, ABC):
    """Base of networks that diffuse the dose slice by slice: ``image`` (B, C, X, Y, Z) in, dose (B, 1, X, Y, Z) out.

    The diffused variable runs from -1 (no dose) to 1 (``dose_span``). Outside the body it is known to be -1, and the
    estimate says so, so that sampling sees there what training did. A subclass gives :meth:`encode_maps` and
    :meth:`predict`.

    Args:
        condition_channels: name of every channel of ``image``; must hold ``body`` and ``prescription_level``.
        multiple: the slices are padded to a multiple of it.
        schedule: arguments of :class:`NoiseSchedule`.
        dose_span: dose of 1.0 in units of ``prescription_level``; 8/7 is DoseDiff's 80 for a level of 1 at 70.
        halo: slices on either side that a slice's prediction looks at.
    """

    def __init__(
        self,
        condition_channels: Sequence[str],
        multiple: int,
        schedule: Mapping[str, Any] | None = None,
        dose_span: float = 8 / 7,
        halo: int = 0,
    ) -> None:
        super().__init__()
        self.names = list(condition_channels)
        self.body_channel, self.level_channel = channel_indices(self.names, ("body", "prescription_level"), "channels")
        self.multiple, self.dose_span, self.halo = multiple, dose_span, halo
        self.schedule = NoiseSchedule(**{"clip_x0": 1.0, **(schedule or {})})

    @property
    def denoiser(self) -> nn.Module:
        """The part that inferers look for: a network that has it samples."""
        return self

    @abstractmethod
    def encode_maps(self, image: Tensor) -> Any:
        """Condition tensors of the network, from the image ``(B, C, X, Y, Z)``."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, maps: Any) -> Tensor:
        """Raw output ``(N, 1, X, Y)`` for padded noisy slices ``x`` of the same shape and time steps ``t`` (N,)."""

    def encode(self, image: Tensor) -> AxialConditions:
        """Everything of the image that the denoiser needs."""
        image = image.as_tensor() if hasattr(image, "as_tensor") else image
        if image.ndim != 5 or image.shape[1] != len(self.names):
            raise CaseError(f"network: image of shape {tuple(image.shape)}; expected (B, {len(self.names)}, X, Y, Z)")
        body = (image[:, self.body_channel, None] > 0.5).to(image.dtype)
        level = image[:, self.level_channel].amax(dim=(1, 2, 3)).reshape(-1, 1, 1, 1, 1)
        return AxialConditions(body, level, self.encode_maps(image), tuple(image.shape[2:]))

    def slices(self, x: Tensor) -> Tensor:
        """Slices of ``(B, C, X, Y, Z)`` as a padded batch ``(B * Z, C, X', Y')``."""
        return pad_plane(fold_slices(x), self.multiple).contiguous(memory_format=torch.channels_last)

    def denoise_output(self, x_t: Tensor, t: Tensor, conditions: AxialConditions) -> Tensor:
        """Raw output of the denoiser, in the schedule's parameterization, for ``x_t`` (B, 1, X, Y, Z), ``t`` (B,)."""
        i, j, k = conditions.size
        output = self.predict(self.slices(x_t), t.repeat_interleave(k), conditions.maps)
        return unfold_slices(output[:, :, :i, :j], x_t.shape[0]).float()

    def denoise(self, x_t: Tensor, t: Tensor, conditions: AxialConditions) -> Tensor:
        """Estimate of ``x_0`` from ``x_t`` at time steps ``t`` (B,); -1, no dose, outside the body."""
        x0 = self.schedule.to_x0(self.denoise_output(x_t, t, conditions), x_t, t)
        return torch.where(conditions.body > 0, x0, -torch.ones_like(x0))

    def from_dose(self, dose: Tensor, conditions: AxialConditions) -> Tensor:
        """The diffused variable of a dose ``(B, 1, X, Y, Z)``; inverse of :meth:`to_dose` inside the body."""
        return 2 * dose * conditions.level / self.dose_span - 1

    def to_dose(self, x0: Tensor, conditions: AxialConditions) -> Tensor:
        """Dose, as a fraction of the highest prescription, of the diffused variable; zero outside the body."""
        dose = (x0 + 1) / 2 * self.dose_span / conditions.level
        return dose.clamp_min(0) * conditions.body

    def forward(self, image: Tensor) -> Tensor:
        """Prediction in one deterministic step from the middle of the noise at t = T; inferers take more steps."""
        conditions = self.encode(image)
        x_t = torch.zeros_like(conditions.body)
        t = torch.full((image.shape[0],), self.schedule.num_train_timesteps - 1, device=image.device)
        return self.to_dose(self.denoise(x_t, t, conditions), conditions)
