"""ADDiff-Dose: a CT autoencoder, a structure encoder, a dose prior and a conditional denoiser behind one tensor.

The dose is diffused in voxel space; the CT's latent and the structures are conditions; the "prior dose map" is one the
network predicts itself, never the reference. Where the paper leaves a choice open, the docstrings say what was taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from custom.case import CaseError
from custom.networks.blocks import (
    Attention,
    NoiseSchedule,
    ResidualBlock,
    ResidualUNet3D,
    StableSiLU,
    pad_to_multiple,
    position_encoding,
    time_encoding,
    zero_init,
)

__all__ = ["ADDiffDose", "ConditionalLayer", "Conditions", "LightweightVAE3D", "PriorBranch", "StructureEncoder"]


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
        channels, encoder_blocks, decoder_blocks, norm, activation: see :class:`ResidualUNet3D`.
        embedding_dim: width of the context embedding.
    """

    def __init__(
        self,
        in_channels: int,
        detail_channels: int,
        context_channels: int,
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
            in_channels, 1, channels, encoder_blocks, decoder_blocks, embedding_dim,
            norm=norm, activation=activation, detail_channels=detail_channels,
        )  # fmt: skip
        self.multiple = self.unet.multiple
        zero_init(self.unet.out)

    def forward(self, spatial: Tensor, detail: Tensor, context: Tensor) -> Tensor:
        """Dose correction ``(B, 1, X, Y, Z)`` as a fraction of the highest prescription."""
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
        feature_channels: channels of the structure features of each level.
        context_channels: context values.
        channels, encoder_blocks, decoder_blocks, attention_levels, heads, norm: see :class:`ResidualUNet3D`.
        embedding_dim: width of the time and context embedding (256 in the paper).
        conditional: arguments of :class:`ConditionalLayer`.
    """

    def __init__(
        self,
        in_channels: int,
        token_dim: int,
        feature_channels: Sequence[int],
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

    def forward(self, x: Tensor, t: Tensor, context: Tensor, features: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """Network output for ``x`` (B, in_channels, X, Y, Z) at time steps ``t`` (B,)."""
        embedding = self.time(time_encoding(t, self.embedding_dim)) + self.context(context)
        levels = self.unet.encode(x, embedding, features)
        levels[-1] = self.conditional(levels[-1], tokens, embedding)
        return self.unet.decode(levels, embedding, x[:, :1])


@dataclass(frozen=True)
class Conditions:
    """What the denoiser needs of a case, computed once and used at every step.

    ``size`` is the image's; tensors of the field of view are padded to the network's multiple.

    Args:
        prior: ``(B, 1, X, Y, Z)`` predicted dose, or None without a prior branch.
        body: ``(B, 1, X, Y, Z)``.
        image: ``(B, N, X, Y, Z)`` prior and image channels that the denoiser sees.
        features: structure features, a tensor a level.
        tokens: ``(B, M, token_dim)``.
        context: ``(B, n)``.
        size: spatial size of the image before padding.
    """

    prior: Tensor | None
    body: Tensor
    image: Tensor
    features: list[Tensor]
    tokens: Tensor
    context: Tensor
    size: tuple[int, int, int]


class ADDiffDose(nn.Module):
    """Dose prediction network: ``image`` (B, C, X, Y, Z) in, dose (B, 1, X, Y, Z) out.

    The dose is a fraction of the highest prescription, not negative and zero outside the body. Any spatial size works.

    Args:
        condition_channels: name of every channel of ``image``: spatial channels first, then the context channels,
            which are constant over the volume and not negative (read as their maximum, so zero padding is harmless).
            Must hold ``"body"``; ``"ct"`` (HU/1000), ``"plan_prior"`` and ``"has_ct"`` are used where present.
        context_channels: which of them are context; the last ones.
        structure_channels: channels of the structure encoder; by default prescription, distance maps and masks.
        detail_channels: channels that enter the prior once more near its output, and that the denoiser sees.
        prior: arguments of :class:`PriorBranch`; None for the paper's system without a regression branch.
        denoiser: arguments of :class:`Denoiser`; None for a regression model.
        ct_encoder: arguments of :class:`LightweightVAE3D`; None leaves the CT's latent out.
        structure_widths: channels of the structure encoder's levels; as many as the denoiser has.
        token_dim: width of the condition tokens.
        schedule: arguments of :class:`NoiseSchedule`.
        residual_scale: the diffused variable is ``(dose - prior) / residual_scale``; ``2 dose - 1`` without a prior.
        frozen: parts without gradients, kept in eval mode (the paper fixes the VAE's encoder in stage 2).

    Raises:
        CaseError: for channel names that do not fit.
    """

    def __init__(
        self,
        condition_channels: Sequence[str],
        context_channels: Sequence[str] = (),
        structure_channels: Sequence[str] | None = None,
        detail_channels: Sequence[str] = ("plan_prior", "prescription", "ct", "body"),
        prior: Mapping[str, Any] | None = None,
        denoiser: Mapping[str, Any] | None = None,
        ct_encoder: Mapping[str, Any] | None = None,
        structure_widths: Sequence[int] = (8, 16, 32, 64),
        token_dim: int = 96,
        schedule: Mapping[str, Any] | None = None,
        residual_scale: float = 0.05,
        frozen: Sequence[str] = ("ct_encoder",),
    ) -> None:
        super().__init__()
        if prior is None and denoiser is None:
            raise CaseError("ADDiffDose: neither a prior nor a denoiser; give the arguments of at least one")
        self.channels = _ChannelMap(condition_channels, context_channels, structure_channels, detail_channels)
        n_spatial, n_context = len(self.channels.spatial), len(context_channels)
        n_detail = len(self.channels.detail)
        self.residual_scale = residual_scale
        self.gain = nn.Parameter(torch.ones(())) if prior is not None and self.channels.plan is not None else None
        self.prior = None if prior is None else PriorBranch(n_spatial, n_detail, n_context, **prior)
        self.ct_encoder = None if ct_encoder is None else LightweightVAE3D(**ct_encoder)
        self.schedule = NoiseSchedule(**(schedule or {}))
        self.structure_encoder = self.structure_tokens = self.ct_tokens = self.denoiser = None
        if denoiser is not None:
            self.structure_encoder = StructureEncoder(len(self.channels.structure), structure_widths)
            self.structure_tokens = nn.Conv3d(structure_widths[-1], token_dim, 1)
            if self.ct_encoder is not None:
                self.ct_tokens = nn.Conv3d(self.ct_encoder.latent_channels, token_dim, 1)
            inputs = 1 + n_detail + (prior is not None)
            self.denoiser = Denoiser(inputs, token_dim, structure_widths, n_context, **denoiser)
        parts = [self.prior, self.ct_encoder, self.denoiser and self.denoiser.unet]
        self.multiple = max(part.multiple for part in parts if part is not None)
        self.frozen = [name for name in frozen if getattr(self, name, None) is not None]
        for name in self.frozen:
            getattr(self, name).requires_grad_(False)
        self.to(memory_format=torch.channels_last_3d)

    def train(self, mode: bool = True) -> ADDiffDose:
        super().train(mode)
        for name in self.frozen:
            part = getattr(self, name)
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def split(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Spatial channels ``(B, n, X, Y, Z)`` and context values ``(B, m)`` of an image."""
        expected = len(self.channels.names)
        if image.ndim != 5 or image.shape[1] != expected:
            raise CaseError(f"network: image of shape {tuple(image.shape)}; expected (B, {expected}, X, Y, Z)")
        n = len(self.channels.spatial)
        if n == expected:
            return image, image.new_zeros(image.shape[0], 1)
        return image[:, :n], image[:, n:].amax(dim=(2, 3, 4))

    def predict_prior(self, image: Tensor) -> Tensor:
        """Dose ``(B, 1, X, Y, Z)`` of the regression branch; negative values are cut in eval mode only."""
        if self.prior is None:
            raise CaseError("network: this system has no prior branch; give `prior` to ADDiffDose")
        spatial, context = self.split(image)
        size = spatial.shape[2:]
        dose = self._prior(pad_to_multiple(spatial, self.multiple), context)
        return _crop(dose, size)

    def encode(self, image: Tensor, prior: Tensor | None = None) -> Conditions:
        """Everything of the image that the denoiser needs; no gradient reaches the prior branch through it.

        Args:
            image: ``(B, C, X, Y, Z)``.
            prior: dose of :meth:`predict_prior`, where it is known already.
        """
        spatial, context = self.split(image)
        size = tuple(spatial.shape[2:])
        spatial = pad_to_multiple(spatial, self.multiple)
        if self.prior is not None:
            with torch.no_grad():
                known = None if prior is None else pad_to_multiple(prior.detach(), self.multiple)
                prior = (self._prior(spatial, context) if known is None else known).float()
        body = spatial[:, self.channels.body]
        if self.denoiser is None:
            return Conditions(prior, body, spatial[:, :0], [], spatial.new_zeros(0), context, size)
        seen = spatial[:, self.channels.detail]
        seen = seen if prior is None else torch.cat([prior.to(seen.dtype), seen], dim=1)
        features = self.structure_encoder(spatial[:, self.channels.structure])
        deepest = self.structure_tokens(features[-1])
        tokens = self._tokens(deepest)
        if self.ct_encoder is not None:
            tokens = torch.cat([tokens, self._ct_tokens(spatial, context)], dim=1)
        return Conditions(prior, body, seen, features, tokens, context, size)

    def denoise_output(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Raw output of the denoiser, in the schedule's parameterization, for ``x_t`` (B, 1, X, Y, Z), ``t`` (B,)."""
        if self.denoiser is None:
            raise CaseError("network: this system has no denoiser; give `denoiser` to ADDiffDose")
        x = torch.cat([pad_to_multiple(x_t, self.multiple).to(conditions.image.dtype), conditions.image], dim=1)
        output = self.denoiser(x, t, conditions.context, conditions.features, conditions.tokens)
        return _crop(output, conditions.size).float()

    def denoise(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Estimate of ``x_0`` from ``x_t`` at time steps ``t`` (B,)."""
        return self.schedule.to_x0(self.denoise_output(x_t, t, conditions), x_t, t)

    def from_dose(self, dose: Tensor, conditions: Conditions) -> Tensor:
        """The diffused variable of a dose ``(B, 1, X, Y, Z)``; inverse of :meth:`to_dose` inside the body."""
        if conditions.prior is None:
            return 2 * dose - 1
        return (dose - _crop(conditions.prior, conditions.size)) / self.residual_scale

    def to_dose(self, x0: Tensor, conditions: Conditions) -> Tensor:
        """Dose of the diffused variable: not negative, zero outside the body."""
        if conditions.prior is None:
            dose = (x0 + 1) / 2
        else:
            dose = _crop(conditions.prior, conditions.size) + self.residual_scale * x0
        return dose.clamp_min(0) * _crop(conditions.body, conditions.size)

    def forward(self, image: Tensor) -> Tensor:
        """Default prediction: the dose after one deterministic step from t = T, or the prior without a denoiser."""
        if self.denoiser is None:
            return self.predict_prior(image).float()
        conditions = self.encode(image)
        x_t = torch.zeros_like(image[:, :1])
        t = torch.full((image.shape[0],), self.schedule.num_train_timesteps - 1, device=image.device)
        return self.to_dose(self.denoise(x_t, t, conditions), conditions)

    def _prior(self, spatial: Tensor, context: Tensor) -> Tensor:
        dose = self.prior(spatial, spatial[:, self.channels.detail], context).float()
        if self.gain is not None:
            dose = torch.addcmul(dose, spatial[:, self.channels.plan], self.gain)
        dose = dose * spatial[:, self.channels.body]
        return dose if self.training else dose.clamp_min(0)

    def _ct_tokens(self, spatial: Tensor, context: Tensor) -> Tensor:
        ct = self.ct_encoder.scale_ct(spatial[:, self.channels.ct])
        with torch.set_grad_enabled(torch.is_grad_enabled() and "ct_encoder" not in self.frozen):
            latent, _ = self.ct_encoder.encode(ct)
        if self.channels.has_ct is not None:
            latent = latent * context[:, self.channels.has_ct, None, None, None].to(latent.dtype)
        return self._tokens(self.ct_tokens(latent))

    @staticmethod
    def _tokens(x: Tensor) -> Tensor:
        shape = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        return tokens + position_encoding(shape[2:], shape[1], x.device).to(tokens.dtype)


class _ChannelMap:
    """Where the named channels lie in the image; single channels as slices, so that they keep their axis."""

    def __init__(self, names, context, structure, detail) -> None:
        self.names = list(names)
        self.spatial = self.names[: len(self.names) - len(context)]
        if self.names[len(self.spatial) :] != list(context):
            raise CaseError(f"network: context_channels {list(context)} are not the last of {self.names}")
        if "body" not in self.spatial:
            raise CaseError(f"network: no 'body' among the spatial condition_channels {self.spatial}")
        if structure is None:
            others = ("ct", "body", "plan_prior")
            structure = [n for n in self.spatial if n not in others and not n.startswith("beam")]
        unknown = [n for n in structure if n not in self.spatial]
        if unknown:
            raise CaseError(f"network: structure_channels {unknown} are not among {self.spatial}")
        self.structure = [self.spatial.index(n) for n in structure]
        self.detail = [self.spatial.index(n) for n in detail if n in self.spatial]
        self.body = self._one("body")
        self.plan = self._one("plan_prior")
        self.ct = self._one("ct")
        self.has_ct = None if "has_ct" not in context else slice(list(context).index("has_ct"), None)
        if self.has_ct is not None:
            self.has_ct = slice(self.has_ct.start, self.has_ct.start + 1)

    def _one(self, name: str) -> slice | None:
        if name not in self.spatial:
            return None
        index = self.spatial.index(name)
        return slice(index, index + 1)


def _crop(x: Tensor, size: Sequence[int]) -> Tensor:
    i, j, k = size
    return x[:, :, :i, :j, :k]
