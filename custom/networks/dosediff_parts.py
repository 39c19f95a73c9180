"""The parts of DoseDiff's MMFNet: encoders, fusionFormer, decoder, and the network that joins them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from custom.case import CaseError
from custom.networks.axial import AxialResidualBlock, TimeEmbedding, patchify, unpatchify
from custom.networks.blocks import make_norm, position_encoding, zero_init

__all__ = ["Decoder", "Encoder", "FusionFormer", "MMFNet"]


class Encoder(nn.Module):
    """Residual encoder of slices: features at full, 1/2, 1/4, ... of the resolution, one a level.

    Args:
        in_channels: channels of the input.
        channels: channels of each level.
        blocks: residual blocks a level.
        embedding_dim: width of the time embedding; 0 for an encoder that does not see the time.
        adaptive_norm: see :class:`AxialResidualBlock`.
    """

    def __init__(
        self, in_channels: int, channels: Sequence[int], blocks: int, embedding_dim: int, adaptive_norm: bool
    ) -> None:
        super().__init__()
        self.lead_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        inputs = [channels[0], *channels[:-1]]
        self.down = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2, padding=1) for c in channels[:-1])
        self.levels = nn.ModuleList(
            nn.ModuleList(
                AxialResidualBlock(a if n == 0 else b, b, embedding_dim, adaptive_norm) for n in range(blocks)
            )
            for a, b in zip(inputs, channels)
        )

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> list[Tensor]:
        """Features of every level for ``x`` (N, in_channels, X, Y) and ``embedding`` (N, embedding_dim)."""
        h = self.lead_in(x)
        features = []
        for i, blocks in enumerate(self.levels):
            h = h if i == 0 else self.down[i - 1](h)
            for block in blocks:
                h = block(h, embedding)
            features.append(h)
        return features


class Decoder(nn.Module):
    """Residual decoder that joins each level's features to what comes up from below.

    Args:
        channels: channels of each level, first level first.
        blocks: residual blocks a level.
        out_channels: channels of the output at the first level's resolution.
        embedding_dim: width of the time embedding.
        adaptive_norm: see :class:`AxialResidualBlock`.
    """

    def __init__(
        self, channels: Sequence[int], blocks: int, out_channels: int, embedding_dim: int, adaptive_norm: bool
    ) -> None:
        super().__init__()
        above = [*channels[1:], channels[-1]]  # what comes from below into each level
        skips = [*channels[:-1], 0]
        self.up = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels[1:])
        self.levels = nn.ModuleList(
            nn.ModuleList(
                AxialResidualBlock(a + s if n == 0 else c, c, embedding_dim, adaptive_norm) for n in range(blocks)
            )
            for a, s, c in zip(above, skips, channels)
        )
        self.norm_out = make_norm("group", channels[0])
        self.out = zero_init(nn.Conv2d(channels[0], out_channels, 3, padding=1))

    def forward(self, features: Sequence[Tensor], embedding: Tensor) -> Tensor:
        """Output ``(N, out_channels, X, Y)`` of the features of every level, the lowest of them fused already."""
        h = features[-1]
        for i in range(len(self.levels) - 1, -1, -1):
            if i < len(self.up):
                h = self.up[i](F.interpolate(h, scale_factor=2.0, mode="nearest"))
                h = torch.cat([h, features[i]], dim=1)
            for block in self.levels[i]:
                h = block(h, embedding)
        return self.out(F.silu(self.norm_out(h)))


class FusionFormer(nn.Module):
    """Attention from CT (query) to distance maps (key) that weights the noisy dose's features (value): eq. 12 and 13.

    The feature maps are cut into ``patch`` x ``patch`` pieces, each flattened to one token. The paper's "2 x 2
    non-overlapping patches" may also mean four patches altogether, whose layers would fit one image size only; pieces
    of 2 x 2 voxels fit any. Position encodings and the scale of the dot product (1 / sqrt(dim)) are the usual ones, on
    which the paper is silent.

    Args:
        channels: channels of the three feature maps.
        dim: width of the tokens.
        patch: voxels along each edge of a piece.
        mlp_ratio: width of the perceptron as a multiple of ``dim``.
    """

    def __init__(self, channels: int, dim: int, patch: int = 2, mlp_ratio: int = 2) -> None:
        super().__init__()
        self.patch, self.dim = patch, dim
        pieces = channels * patch**2
        self.embed = nn.ModuleList(nn.Sequential(nn.Linear(pieces, dim), nn.LayerNorm(dim)) for _ in range(3))
        self.beta, self.gamma, self.delta = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim)
        )
        self.out = nn.Linear(dim, pieces)

    def forward(self, ct: Tensor, distance: Tensor, dose: Tensor) -> Tensor:
        """Fused features of the three maps, all ``(N, channels, X, Y)`` with sizes that ``patch`` divides."""
        size = [n // self.patch for n in dose.shape[2:]]
        where = position_encoding([*size, 1], self.dim, dose.device).to(dose.dtype)
        query, key, value = (
            embed(patchify(x, self.patch).flatten(2).transpose(1, 2)) + where
            for embed, x in zip(self.embed, (ct, distance, dose))
        )
        value = self.delta(value)
        attended = F.scaled_dot_product_attention(self.beta(query), self.gamma(key), value) + value
        tokens = self.mlp(attended) + attended
        return unpatchify(self.out(tokens).transpose(1, 2).unflatten(2, size), self.patch)


class MMFNet(nn.Module):
    """Multi-encoder, multi-scale fusion network (paper, section II-D and Fig. 2).

    Args:
        ct_channels: channels of the CT image.
        distance_channels: channels of the distance maps.
        channels: channels of each level; one less is the number of down-samplings (paper: 128, 128, 256, 384, 512).
        blocks: residual blocks a level.
        embedding_dim: width of the time embedding.
        multi_scale: sum the three encoders' features at every level (the paper's MS).
        fusion_former: fuse the lowest level by :class:`FusionFormer` (the paper's FF). With neither, CT, distance maps
            and noisy dose are concatenated and one encoder reads them, the ablation's plain diffusion model.
        fusion_dim: width of its tokens.
        adaptive_norm: see :class:`AxialResidualBlock`.
        timed_conditions: give the time also to the CT's and the distance maps' encoders, as the paper's "each
            Res-block" has it; False lets them run once a volume instead of once a step.
        patch: edge of the pixels that are stacked as channels before the first and unstacked after the last
            convolution; 1 is the paper's.
    """

    def __init__(
        self,
        ct_channels: int,
        distance_channels: int,
        channels: Sequence[int] = (128, 128, 256, 384, 512),
        blocks: int = 2,
        embedding_dim: int = 512,
        multi_scale: bool = True,
        fusion_former: bool = True,
        fusion_dim: int = 512,
        adaptive_norm: bool = True,
        timed_conditions: bool = True,
        patch: int = 1,
    ) -> None:
        super().__init__()
        if len(channels) < 2:
            raise CaseError(f"MMFNet: channels {list(channels)}; expected two levels or more")
        self.multi_scale, self.timed, self.patch = multi_scale, timed_conditions, patch
        self.separate = multi_scale or fusion_former
        self.multiple = patch * 2 ** (len(channels) - 1) * (2 if fusion_former else 1)
        self.time = TimeEmbedding(embedding_dim)

        def encoder(inputs: int, timed: bool = True) -> Encoder:
            return Encoder(inputs * patch**2, channels, blocks, embedding_dim if timed else 0, adaptive_norm)

        self.ct_encoder = self.distance_encoder = None
        if self.separate:
            self.ct_encoder = encoder(ct_channels, timed_conditions)
            self.distance_encoder = encoder(distance_channels, timed_conditions)
        self.dose_encoder = encoder(1 if self.separate else 1 + ct_channels + distance_channels)
        self.fusion = FusionFormer(channels[-1], fusion_dim) if fusion_former else None
        self.decoder = Decoder(channels, blocks, patch**2, embedding_dim, adaptive_norm)

    def encode(self, ct: Tensor, distance: Tensor) -> tuple:
        """What the steps share: both condition images, or their features where those do not depend on the time."""
        ct, distance = patchify(ct, self.patch), patchify(distance, self.patch)
        if self.timed or not self.separate:
            return ct, distance
        return self.ct_encoder(ct), self.distance_encoder(distance)

    def forward(self, dose: Tensor, t: Tensor, conditions: tuple) -> Tensor:
        """Output ``(N, 1, X, Y)`` for noisy slices ``dose`` of that shape, ``t`` (N,) and what :meth:`encode` gave."""
        embedding, dose = self.time(t), patchify(dose, self.patch)
        ct, distance = conditions
        if not self.separate:
            features = self.dose_encoder(torch.cat([dose, ct, distance], dim=1), embedding)
            return unpatchify(self.decoder(features, embedding), self.patch)
        if self.timed:
            ct, distance = self.ct_encoder(ct, embedding), self.distance_encoder(distance, embedding)
        noisy = self.dose_encoder(dose, embedding)
        features = noisy
        if self.multi_scale:
            features = [a + b + c for a, b, c in zip(noisy, ct, distance)]
        if self.fusion is not None:
            features[-1] = features[-1] + self.fusion(ct[-1], distance[-1], noisy[-1])
        return unpatchify(self.decoder(features, embedding), self.patch)
