"""Building blocks shared by the networks: residual 3D U-Net, attention, embeddings and the noise schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from custom.case import CaseError

__all__ = [
    "Attention",
    "NoiseSchedule",
    "ResidualBlock",
    "ResidualUNet3D",
    "StableSiLU",
    "make_norm",
    "pad_to_multiple",
    "pixel_shuffle_3d",
    "position_encoding",
    "time_encoding",
]


class StableSiLU(nn.Module):
    """SiLU of an input clamped to ``[-limit, limit]``, so that no activation overflows in half precision.

    Args:
        limit: largest magnitude let through; the ADDiff-Dose paper names the function without defining it.
    """

    def __init__(self, limit: float = 20.0) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x.clamp(-self.limit, self.limit))


class ChannelNorm(nn.Module):
    """Layer normalisation of every voxel over its channels, so that a crop and the whole volume are treated alike.

    Args:
        channels: channels of its input.
        affine: whether it has a learned scale and shift.
    """

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def make_norm(kind: str, channels: int, affine: bool = True) -> nn.Module:
    """Normalisation layer by name.

    Args:
        kind: ``"instance"`` (one group a channel), ``"group"`` (groups of 8 channels or fewer), ``"channel"`` (each
            voxel over its channels: no statistic depends on the field of view) or ``"none"``.
        channels: channels of its input.
        affine: whether it has a learned scale and shift of its own.

    Raises:
        CaseError: for any other name.
    """
    if kind == "instance":
        return nn.InstanceNorm3d(channels, affine=affine)
    if kind == "group":
        return nn.GroupNorm(max(channels // 8, 1) if channels % 8 == 0 else 1, channels, affine=affine)
    if kind == "channel":
        return ChannelNorm(channels, affine)
    if kind == "none":
        return nn.Identity()
    raise CaseError(f"network: normalisation {kind!r}; expected 'instance', 'group', 'channel' or 'none'")


def make_activation(kind: str) -> nn.Module:
    """``"silu"`` or ``"stable_silu"`` (:class:`StableSiLU`)."""
    if kind == "silu":
        return nn.SiLU()
    if kind == "stable_silu":
        return StableSiLU()
    raise CaseError(f"network: activation {kind!r}; expected 'silu' or 'stable_silu'")


def zero_init(module: nn.Module) -> nn.Module:
    """Set every parameter of ``module`` to zero, so that the branch it ends starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Append zeros at the far end of the three spatial axes of ``(B, C, X, Y, Z)`` up to a multiple of ``multiple``.

    At least one axis gets twice ``multiple``, since normalisation wants more than one voxel at the lowest level.
    """
    extra = [-int(n) % multiple for n in x.shape[2:]]
    if all(int(n) <= multiple for n in x.shape[2:]):
        extra[0] += multiple
    if not any(extra):
        return x
    return F.pad(x, (0, extra[2], 0, extra[1], 0, extra[0]))


def pixel_shuffle_3d(x: Tensor, factor: int = 2) -> Tensor:
    """Turn ``(B, C * factor^3, X, Y, Z)`` into ``(B, C, factor X, factor Y, factor Z)`` (Shi et al., CVPR 2016)."""
    b, c, i, j, k = x.shape
    out = c // factor**3
    x = x.reshape(b, out, factor, factor, factor, i, j, k).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, out, i * factor, j * factor, k * factor)


def time_encoding(t: Tensor, dim: int, longest_period: float = 10000.0) -> Tensor:
    """Sinusoidal encoding of time steps ``(B,)`` as ``(B, dim)`` (Vaswani et al. 2017; Ho et al. 2020)."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(longest_period) / half))
    angle = t.float()[:, None] * frequency[None]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def position_encoding(shape: Sequence[int], dim: int, device: torch.device) -> Tensor:
    """Sinusoidal encoding of the voxel positions of a grid as ``(1, X*Y*Z, dim)``, a third of ``dim`` an axis."""
    part = dim // 6 * 2
    axes = [time_encoding(torch.arange(n, device=device), part, 100.0) for n in shape]
    i, j, k = shape  # no int(): a traced network is to take other sizes
    grid = torch.cat(
        [
            axes[0][:, None, None].expand(i, j, k, part),
            axes[1][None, :, None].expand(i, j, k, part),
            axes[2][None, None].expand(i, j, k, part),
        ],
        dim=-1,
    )
    return F.pad(grid.reshape(1, -1, 3 * part), (0, dim - 3 * part))


class Attention(nn.Module):
    """Multi-head attention of tokens ``(B, N, dim)`` to a context ``(B, M, context_dim)``, or to themselves.

    Args:
        dim: width of the queries and of the output.
        heads: number of heads; divides ``dim``.
        context_dim: width of the context; ``dim`` by default.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        if dim % heads:
            raise CaseError(f"network: {heads} attention heads do not divide {dim} channels; choose a divisor")
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(context_dim or dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        query = self._split(self.query(x))
        key, value = (self._split(part) for part in self.key_value(x if context is None else context).chunk(2, dim=-1))
        y = F.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class SpatialAttention(nn.Module):
    """Residual multi-head self-attention over all voxels of ``(B, C, X, Y, Z)``, for the deep levels of a U-Net."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads)
        zero_init(self.attention.out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.attention(self.norm(tokens))
        return x + tokens.transpose(1, 2).reshape(x.shape)


class ResidualBlock(nn.Module):
    """norm - activation - conv - norm - scale and shift by the embedding (AdaGN/FiLM) - activation - conv, plus input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; a 1x1x1 convolution carries the input over where they differ.
        embedding_dim: width of the embedding that scales and shifts the second norm; 0 for none.
        norm: see :func:`make_norm`.
        activation: ``"silu"`` or ``"stable_silu"``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int = 0, norm: str = "instance", activation="silu"
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, in_channels)
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(norm, out_channels, affine=embedding_dim == 0)
        self.film = zero_init(nn.Linear(embedding_dim, 2 * out_channels)) if embedding_dim else None
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)
        self.activation = make_activation(activation)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(self.activation(self.norm1(x))))
        if self.film is not None and embedding is not None:
            scale, shift = self.film(embedding)[:, :, None, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift.to(h.dtype), h, (1 + scale).to(h.dtype))
        return self.skip(x) + self.conv2(self.activation(h))


class ResidualUNet3D(nn.Module):
    """Residual 3D U-Net whose first level already runs at half resolution.

    A stride-2 convolution leads in, a sub-voxel (pixel shuffle) convolution leads out, so that no convolution of the
    body runs at full resolution, where it would cost eight times as much. Skips are added, not concatenated.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output at full resolution.
        channels: channels at 1/2, 1/4, 1/8, ... of the resolution; their count is the number of down-samplings.
        encoder_blocks: residual blocks of each level on the way down.
        decoder_blocks: residual blocks of each level but the last on the way up.
        embedding_dim: width of the embedding that modulates every block; 0 for none.
        attention_levels: levels (0 = first) that end in multi-head self-attention.
        heads: attention heads.
        norm: see :func:`make_norm`.
        activation: ``"silu"`` or ``"stable_silu"``.
        feature_channels: channels of the extra features added at each level; None for none.
        detail_channels: full-resolution channels that enter once more before the last decoder level; 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        encoder_blocks: Sequence[int],
        decoder_blocks: Sequence[int],
        embedding_dim: int = 0,
        attention_levels: Sequence[int] = (),
        heads: int = 4,
        norm: str = "instance",
        activation: str = "silu",
        feature_channels: Sequence[int] | None = None,
        detail_channels: int = 0,
    ) -> None:
        super().__init__()
        levels = len(channels)
        if len(encoder_blocks) != levels or len(decoder_blocks) != levels - 1:
            raise CaseError(
                f"U-Net: {levels} channel counts want {levels} encoder_blocks and {levels - 1} decoder_blocks; "
                f"found {list(encoder_blocks)} and {list(decoder_blocks)}"
            )

        def stage(level: int, count: int) -> nn.ModuleList:
            width = channels[level]
            return nn.ModuleList(
                ResidualBlock(width, width, embedding_dim, norm, activation) for _ in range(count)
            )

        self.multiple = 2**levels
        inputs = [in_channels, *channels[:-1]]
        self.down = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in zip(inputs, channels))
        self.encoder = nn.ModuleList(stage(i, encoder_blocks[i]) for i in range(levels))
        self.decoder = nn.ModuleList(stage(i, decoder_blocks[i]) for i in range(levels - 1))
        self.up = nn.ModuleList(nn.Conv3d(channels[i + 1], channels[i], 1) for i in range(levels - 1))
        self.attention = nn.ModuleDict({str(i): SpatialAttention(channels[i], heads) for i in attention_levels})
        self.inject = nn.ModuleList(
            nn.Conv3d(a, b, 1) for a, b in zip(feature_channels or (), channels)
        )
        self.detail = nn.Conv3d(detail_channels, channels[0], 2, stride=2) if detail_channels else None
        self.norm_out = make_norm(norm, channels[0])
        self.activation = make_activation(activation)
        self.out = nn.Conv3d(channels[0], 8 * out_channels, 1)

    def encode(
        self, x: Tensor, embedding: Tensor | None = None, features: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Features of every level, from 1/2 downwards; ``x``'s size is a multiple of :attr:`multiple`."""
        levels = []
        for i, (down, blocks) in enumerate(zip(self.down, self.encoder)):
            x = down(x)
            if features is not None and len(self.inject):
                x = x + self.inject[i](features[i])
            for block in blocks:
                x = block(x, embedding)
            if str(i) in self.attention:
                x = self.attention[str(i)](x)
            levels.append(x)
        return levels

    def decode(
        self, levels: Sequence[Tensor], embedding: Tensor | None = None, detail: Tensor | None = None
    ) -> Tensor:
        """Output ``(B, out_channels, X, Y, Z)`` of the features of :meth:`encode` and the full-resolution detail."""
        x = levels[-1]
        for i in range(len(self.up) - 1, -1, -1):
            x = F.interpolate(self.up[i](x), scale_factor=2.0, mode="trilinear", align_corners=False)
            x = x + levels[i]
            if i == 0 and self.detail is not None and detail is not None:
                x = x + self.detail(detail)
            for block in self.decoder[i]:
                x = block(x, embedding)
        x = self.activation(self.norm_out(x))
        # in bfloat16 this layer's own rounding takes the largest error of a dose from 0.09 to 0.11 Gy
        with torch.autocast(x.device.type, enabled=False):
            return pixel_shuffle_3d(self.out(x.to(self.out.weight.dtype)))

    def forward(self, x: Tensor, embedding: Tensor | None = None, detail: Tensor | None = None) -> Tensor:
        """Map ``(B, in_channels, X, Y, Z)`` to ``(B, out_channels, X, Y, Z)``."""
        return self.decode(self.encode(x, embedding), embedding, detail)


class NoiseSchedule(nn.Module):
    """The forward process ``x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps`` (Ho et al. 2020, eq. 4).

    Args:
        num_train_timesteps: T.
        beta_start: first beta of the linear schedule.
        beta_end: last beta.
        parameterization: what the network's output means: ``"epsilon"``, ``"v"`` (Salimans & Ho 2022: ``v =
            a eps - s x_0``) or ``"sample"``.
        clip_x0: largest magnitude of the estimate of x_0; noise prediction wants one, since it divides by the signal
            scale, 0.006 at t = T. None for none.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        parameterization: str = "v",
        clip_x0: float | None = None,
    ) -> None:
        super().__init__()
        if parameterization not in ("epsilon", "v", "sample"):
            raise CaseError(f"noise schedule: parameterization {parameterization!r}; expected epsilon, v or sample")
        self.num_train_timesteps = num_train_timesteps
        self.parameterization = parameterization
        self.clip_x0 = clip_x0
        beta = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        self.register_buffer("alpha_bar", torch.cumprod(1 - beta, dim=0).float(), persistent=False)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale ``(a, s)`` of time steps ``(B,)``, each ``(B, 1, 1, 1, 1)``; ``a^2 + s^2 = 1``."""
        alpha_bar = self.alpha_bar[t].reshape(-1, 1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t`` of ``x_0``, unit noise of the same shape and time steps ``(B,)``."""
        a, s = self.scales(t)
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network's output should be."""
        if self.parameterization == "sample":
            return x0
        a, s = self.scales(t)
        return noise if self.parameterization == "epsilon" else a * noise - s * x0

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Estimate of ``x_0`` from the network's output."""
        if self.parameterization == "sample":
            x0 = output
        else:
            a, s = self.scales(t)
            x0 = (x_t - s * output) / a if self.parameterization == "epsilon" else a * x_t - s * output
        return x0 if self.clip_x0 is None else x0.clamp(-self.clip_x0, self.clip_x0)
