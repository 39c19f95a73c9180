"""The parts of ADDiff-Dose: CT autoencoder, structure encoder, conditional layer, prior branch and denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from custom.networks.blocks import (
    Attention,
    ResidualBlock,
    ResidualUNet3D,
    StableSiLU,
    pad_to_multiple,
    position_encoding,
    time_encoding,
    zero_init,
)

__all__ = ["ConditionalLayer", "Denoiser", "LightweightVAE3D", "PriorBranch", "StructureEncoder", "context_mlp"]


class LightweightVAE3D(nn.Module):
    """Convolutional variational autoencoder of the CT, 16 times smaller along each axis with four levels.

    The paper flattens to fully connected layers; here mean and log-variance are 1x1x1 convolutions, so any size fits.

    Args:
        channels: channels of each stride-2 level (kernel 4, padding 1).
        latent_channels: channels of the latent.
    """

    def __init__(self, channels: Sequence[int] = (16, 32, 64, 128), latent_channels: int = 8) -> None:
        super().__init__()
        self.multiple = 2 ** len(channels)
        self.latent_channels = latent_channels
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(nn.Conv3d(a, b, 4, stride=2, padding=1), nn.BatchNorm3d(b), StableSiLU())
                for a, b in zip([1, *channels[:-1]], channels)
            )
        )
        self.moments = nn.Conv3d(channels[-1], 2 * latent_channels, 1)
        widths = [*reversed(channels)]
        self.expand = nn.Conv3d(latent_channels, widths[0], 1)
        self.decoder = nn.Sequential(
            *(
                nn.Sequential(nn.ConvTranspose3d(a, b, 4, stride=2, padding=1), nn.BatchNorm3d(b), StableSiLU())
                for a, b in zip(widths[:-1], widths[1:])
            ),
            nn.ConvTranspose3d(widths[-1], 1, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    @staticmethod
    def scale_ct(ct: Tensor) -> Tensor:
        """HU/1000 to the autoencoder's own range: -1000 HU is 0, 1000 HU is 1."""
        return ((ct + 1) / 2).clamp(0, 1)

    def encode(self, ct01: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance ``(B, latent_channels, X/16, Y/16, Z/16)`` of ``(B, 1, X, Y, Z)`` in [0, 1]."""
        mean, log_variance = self.moments(self.encoder(ct01)).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def decode(self, latent: Tensor) -> Tensor:
        """CT ``(B, 1, X, Y, Z)`` in [0, 1]."""
        return self.decoder(self.expand(latent))

    def forward(self, ct01: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction of any size of input, mean and log-variance; the latent is sampled in training only."""
        mean, log_variance = self.encode(pad_to_multiple(ct01, self.multiple))
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        i, j, k = ct01.shape[2:]
        return self.decode(latent)[:, :, :i, :j, :k], mean, log_variance


class StructureEncoder(nn.Module):
    """3D convolutional projection of the target and organ channels to features of every level of the denoiser.

    Args:
        in_channels: structure channels.
        channels: channels at 1/2, 1/4, 1/8, ... of the resolution.
        norm: see :func:`custom.networks.blocks.make_norm`.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], norm: str = "group") -> None:
        super().__init__()
        self.channels = tuple(channels)
        inputs = [in_channels, *channels[:-1]]
        self.down = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in zip(inputs, channels))
        self.blocks = nn.ModuleList(ResidualBlock(c, c, 0, norm, "stable_silu") for c in channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for down, block in zip(self.down, self.blocks):
            x = block(down(x))
            features.append(x)
        return features


class ConditionalLayer(nn.Module):
    """Merge the deepest image features with structure and CT tokens, time and context (paper, Fig. 1).

    A 1x1x1 convolution, a Transformer block (multi-head self-attention and a two-layer perceptron), and multi-head
    cross-attention of the voxels to the condition tokens and to one token of the time and context embedding.

    Args:
        channels: channels of the image features.
        token_dim: width of the condition tokens.
        embedding_dim: width of the time and context embedding.
        dim: width inside.
        heads: attention heads.
    """

    def __init__(self, channels: int, token_dim: int, embedding_dim: int, dim: int = 96, heads: int = 4) -> None:
        super().__init__()
        self.project = nn.Conv3d(channels, dim, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = Attention(dim, heads)
        self.cross_attention = Attention(dim, heads, token_dim)
        self.embedding_token = nn.Linear(embedding_dim, token_dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.out = zero_init(nn.Conv3d(dim, channels, 1))

    def forward(self, x: Tensor, tokens: Tensor, embedding: Tensor) -> Tensor:
        """``x`` (B, channels, X, Y, Z), ``tokens`` (B, N, token_dim), ``embedding`` (B, embedding_dim)."""
        h = self.project(x)
        shape = h.shape
        h = h.flatten(2).transpose(1, 2)
        h = h + position_encoding(shape[2:], shape[1], h.device).to(h.dtype)
        h = h + self.self_attention(self.norms[0](h))
        context = torch.cat([tokens, self.embedding_token(embedding)[:, None].to(tokens.dtype)], dim=1)
        h = h + self.cross_attention(self.norms[1](h), context)
        h = h + self.mlp(self.norms[2](h))
        return x + self.out(h.transpose(1, 2).reshape(shape))


class PriorBranch(nn.Module):
    """Residual U-Net that predicts the dose in one pass, as a correction of the plan prior where there is one.

    Args:
        in_channels: spatial condition channels.
        detail_channels: channels that also enter before the last decoder level, undiluted.
        context_channels: context values.
        beams: further outputs, one a beam, by which the plan's dose of each beam is corrected.
        channels, encoder_blocks, decoder_blocks, norm, activation: see :class:`ResidualUNet3D`.
        embedding_dim: width of the context embedding.
    """

    def __init__(
        self,
        in_channels: int,
        detail_channels: int,
        context_channels: int,
        beams: int = 0,
        channels: Sequence[int] = (24, 48, 96, 160),
        encoder_blocks: Sequence[int] = (1, 2, 2, 2),
        decoder_blocks: Sequence[int] = (1, 1, 1),
        norm: str = "instance",
        activation: str = "silu",
        embedding_dim: int = 64,
    ) -> None:
        super().__init__()
        self.context = context_mlp(context_channels, embedding_dim)
        self.unet = ResidualUNet3D(
            in_channels, 1 + beams, channels, encoder_blocks, decoder_blocks, embedding_dim,
            norm=norm, activation=activation, detail_channels=detail_channels,
        )  # fmt: skip
        self.multiple = self.unet.multiple
        zero_init(self.unet.out)

    def forward(self, spatial: Tensor, detail: Tensor, context: Tensor) -> Tensor:
        """Dose correction as a fraction of the highest prescription, then the beams': ``(B, 1 + beams, X, Y, Z)``."""
        return self.unet(spatial, self.context(context), detail)


def context_mlp(context_channels: int, embedding_dim: int) -> nn.Sequential:
    """Two-layer perceptron from the context values to an embedding, activated."""
    return nn.Sequential(
        nn.Linear(max(context_channels, 1), embedding_dim),
        nn.SiLU(),
        nn.Linear(embedding_dim, embedding_dim),
        nn.SiLU(),
    )


class Denoiser(nn.Module):
    """Conditional 3D U-Net of the reverse process: time and context by AdaGN, structures and CT by addition and tokens.

    Args:
        in_channels: the noisy variable, the prior dose and the selected image channels.
        token_dim: width of the condition tokens.
        feature_channels: channels of the structure features of each level; None for none.
        context_channels: context values.
        channels, encoder_blocks, decoder_blocks, attention_levels, heads, norm: see :class:`ResidualUNet3D`.
        embedding_dim: width of the time and context embedding (256 in the paper).
        conditional: arguments of :class:`ConditionalLayer`.
    """

    def __init__(
        self,
        in_channels: int,
        token_dim: int,
        feature_channels: Sequence[int] | None,
        context_channels: int,
        channels: Sequence[int] = (16, 32, 64, 96),
        encoder_blocks: Sequence[int] = (1, 1, 1, 1),
        decoder_blocks: Sequence[int] = (1, 1, 1),
        attention_levels: Sequence[int] = (3,),
        heads: int = 4,
        norm: str = "group",
        embedding_dim: int = 256,
        conditional: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.time = nn.Sequential(
            nn.Linear(embedding_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.context = context_mlp(context_channels, embedding_dim)
        self.unet = ResidualUNet3D(
            in_channels, 1, channels, encoder_blocks, decoder_blocks, embedding_dim,
            attention_levels, heads, norm, "stable_silu", feature_channels, detail_channels=1,
        )  # fmt: skip
        self.conditional = ConditionalLayer(channels[-1], token_dim, embedding_dim, **(conditional or {}))
        zero_init(self.unet.out)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, features: Sequence[Tensor] | None, tokens: Tensor
    ) -> Tensor:
        """Network output for ``x`` (B, in_channels, X, Y, Z) at time steps ``t`` (B,)."""
        embedding = self.time(time_encoding(t, self.embedding_dim)) + self.context(context)
        levels = self.unet.encode(x, embedding, features)
        levels[-1] = self.conditional(levels[-1], tokens, embedding)
        return self.unet.decode(levels, embedding, x[:, :1])
