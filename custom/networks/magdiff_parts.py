"""The parts of MAGDiff-ADC: spatially-adaptive normalisation at every layer, the guided U-Net, and the calibration.

Only the abstract of MAGDiff-ADC is public. It names the parts; what they are made of is *inferred* from the literature
on SPADE (Park et al., CVPR 2019) and said so at each class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import Convolution
from monai.networks.blocks.spade_norm import SPADE
from torch import Tensor, nn
from torch.nn import functional as F

from custom.networks.axial import TimeEmbedding, patchify, unpatchify
from custom.networks.blocks import zero_init

__all__ = ["AdaptiveDoseCalibration", "GuidedBlock", "GuidedUNet", "SpatialNorm"]


class SpatialNorm(SPADE):
    """``normalised(x) (1 + gamma(map)) + beta(map)``, gamma and beta from two convolutions of the map (SPADE, eq. 1).

    MONAI's block, but for one thing: it also instance-normalises gamma and beta, so that a map that is constant over
    the slice (no structure at all, or a presence flag) says nothing, and their convolutions' biases never learn. Here
    gamma and beta are as in the paper.

    Args:
        map_channels: channels of the anatomy map.
        channels: channels of the features.
        hidden_channels: channels between map and gamma, beta.
    """

    def __init__(self, map_channels: int, channels: int, hidden_channels: int) -> None:
        super().__init__(map_channels, channels, 3, 2, hidden_channels, "INSTANCE")
        self.mlp_gamma, self.mlp_beta = (
            zero_init(Convolution(2, hidden_channels, channels, kernel_size=3, act=None, norm=None)) for _ in range(2)
        )


class GuidedBlock(nn.Module):
    """Residual block whose both normalisations are spatially adaptive; the time is added between them.

    *Inferred*: where the norm sits (as in SPADE's residual block) and how the time enters (Ho et al. 2020).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        map_channels: channels of the anatomy map.
        embedding_dim: width of the time embedding.
        hidden_channels: see :class:`SpatialNorm`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, map_channels: int, embedding_dim: int, hidden_channels: int
    ) -> None:
        super().__init__()
        self.norm1 = SpatialNorm(map_channels, in_channels, hidden_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding_dim, out_channels)
        self.norm2 = SpatialNorm(map_channels, out_channels, hidden_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, anatomy: Tensor, embedding: Tensor) -> Tensor:
        """``x`` (N, in_channels, X, Y), ``anatomy`` (N, map_channels, X, Y), ``embedding`` (N, embedding_dim)."""
        h = self.conv1(F.silu(self.norm1(x, anatomy)))
        h = self.norm2(h, anatomy) + self.time(embedding)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(h))


class GuidedUNet(nn.Module):
    """Conditional U-Net whose every layer is guided by the anatomy of adjacent slices.

    *Inferred*: widths and depth; that one convolution condenses the anatomy for all layers, and that it enters by the
    norms alone, averaged (not sampled, which would lose thin organs) to each level's resolution.

    Args:
        map_channels: channels of the anatomy map.
        channels: channels of each level; one less is the number of down-samplings.
        blocks: residual blocks a level.
        embedding_dim: width of the time embedding.
        hidden_channels: see :class:`SpatialNorm`.
        guide_channels: channels of the condensed anatomy.
        patch: edge of the pixels stacked as channels before the first and unstacked after the last convolution.
    """

    def __init__(
        self,
        map_channels: int,
        channels: Sequence[int] = (64, 128, 256, 256),
        blocks: int = 2,
        embedding_dim: int = 256,
        hidden_channels: int = 64,
        guide_channels: int = 64,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.patch, self.multiple = patch, patch * 2 ** (len(channels) - 1)
        self.time = TimeEmbedding(embedding_dim)
        self.condense = nn.Conv2d(map_channels * patch**2, guide_channels, 3, padding=1)

        def stage(inputs: int, width: int) -> nn.ModuleList:
            return nn.ModuleList(
                GuidedBlock(inputs if n == 0 else width, width, guide_channels, embedding_dim, hidden_channels)
                for n in range(blocks)
            )

        self.lead_in = nn.Conv2d(patch**2, channels[0], 3, padding=1)
        inputs = [channels[0], *channels[:-1]]
        self.encoder = nn.ModuleList(stage(a, b) for a, b in zip(inputs, channels))
        self.down = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2, padding=1) for c in channels[:-1])
        self.up = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in zip(channels, channels[1:]))
        self.decoder = nn.ModuleList(stage(2 * c, c) for c in channels[:-1])
        self.norm_out = SpatialNorm(guide_channels, channels[0], hidden_channels)
        self.out = zero_init(nn.Conv2d(channels[0], patch**2, 3, padding=1))

    def encode(self, anatomy: Tensor) -> list[Tensor]:
        """The anatomy map ``(N, map_channels, X, Y)``, condensed, at the resolution of every level."""
        maps = [self.condense(patchify(anatomy, self.patch))]
        for _ in self.down:
            maps.append(F.avg_pool2d(maps[-1], 2))
        return maps

    def forward(self, x: Tensor, t: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Output ``(N, 1, X, Y)`` for noisy slices ``x`` of that shape, ``t`` (N,) and the maps of :meth:`encode`."""
        embedding = self.time(t)
        h, features = self.lead_in(patchify(x, self.patch)), []
        for i, blocks in enumerate(self.encoder):
            h = h if i == 0 else self.down[i - 1](h)
            for block in blocks:
                h = block(h, maps[i], embedding)
            features.append(h)
        for i in range(len(self.decoder) - 1, -1, -1):
            h = self.up[i](F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = torch.cat([h, features[i]], dim=1)
            for block in self.decoder[i]:
                h = block(h, maps[i], embedding)
        return unpatchify(self.out(F.silu(self.norm_out(h, maps[0]))), self.patch)


class AdaptiveDoseCalibration(nn.Module):
    """Light, fully convolutional correction of a predicted dose inside the regions of interest.

    From the abstract: lightweight, fully convolutional, refines dose values within ROIs. *Inferred*: four 3x3
    convolutions on dose and anatomy whose output is added to the dose where any structure is; it starts as nothing.

    Args:
        map_channels: channels of the anatomy map.
        channels: channels inside.
        layers: convolutions before the last one.
    """

    def __init__(self, map_channels: int, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        inputs = [1 + map_channels, *[channels] * (layers - 1)]
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, channels, 3, padding=1), nn.SiLU()) for a in inputs)
        )
        self.out = zero_init(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, dose: Tensor, anatomy: Tensor, region: Tensor) -> Tensor:
        """Corrected dose ``(N, 1, X, Y)``; ``region`` (N, 1, X, Y) is 1 where it may change."""
        return dose + region * self.out(self.body(torch.cat([dose, anatomy], dim=1)))
