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
from custom.networks.addiff_parts import (
    ConditionalLayer,
    Denoiser,
    LightweightVAE3D,
    PriorBranch,
    StructureEncoder,
)
from custom.networks.beams import beam_channels, corrected_beams
from custom.networks.blocks import NoiseSchedule, pad_to_multiple, position_encoding
from custom.networks.broad import BroadBranch
from custom.networks.dvh_estimate import DvhEstimator
from custom.networks.noise import CorrelatedNoise, ScaleOfDose

__all__ = ["ADDiffDose", "ConditionalLayer", "Conditions", "LightweightVAE3D", "PriorBranch", "StructureEncoder"]


@dataclass(frozen=True)
class Conditions:
    """What the denoiser needs of a case, computed once and used at every step.

    ``size`` is the image's; tensors of the field of view are padded to the network's multiple.

    Args:
        prior: ``(B, 1, X, Y, Z)`` predicted dose, or None without a prior branch.
        body: ``(B, 1, X, Y, Z)``.
        image: ``(B, N, X, Y, Z)`` prior and image channels that the denoiser sees.
        features: structure features, a tensor a level; None without a structure encoder.
        tokens: ``(B, M, token_dim)``.
        context: ``(B, n)``.
        size: spatial size of the image before padding.
        beams: ``(B, n, X, Y, Z)`` the plan's dose of each beam, of that size; None where the noise has none.
    """

    prior: Tensor | None
    body: Tensor
    image: Tensor
    features: list[Tensor] | None
    tokens: Tensor
    context: Tensor
    size: tuple[int, int, int]
    beams: Tensor | None = None


class ADDiffDose(nn.Module):
    """Dose prediction network: ``image`` (B, C, X, Y, Z) in, dose (B, 1, X, Y, Z) out.

    The dose is a fraction of the highest prescription, not negative and zero outside the body. Any spatial size works.

    Args:
        condition_channels: name of every channel of ``image``: spatial channels first, then the context channels,
            which are constant over the volume and not negative (read as their maximum, so zero padding is harmless).
            Must hold ``"body"``; ``"ct"`` (HU/1000), ``"plan_prior"`` and ``"has_ct"`` are used where present, and
            ``"plan_beam_..."``, whose doses the prior corrects one by one (:mod:`custom.networks.beams`).
        context_channels: which of them are context; the last ones.
        structure_channels: channels of the structure encoder; by default prescription, distance maps and masks.
        detail_channels: channels that enter the prior once more near its output, and that the denoiser sees.
        prior: arguments of :class:`PriorBranch`; None for the paper's system without a regression branch.
        denoiser: arguments of :class:`Denoiser`; None for a regression model.
        ct_encoder: arguments of :class:`LightweightVAE3D`; None leaves the CT's latent out.
        structure_widths: channels of the structure encoder's levels; as many as the denoiser has. None leaves the
            structure encoder out (the paper's ablation).
        token_dim: width of the condition tokens.
        schedule: arguments of :class:`NoiseSchedule`.
        residual_scale: the diffused variable is ``(dose - prior) / residual_scale``; ``2 dose - 1`` without a prior. A
            number, or pairs of the prior's dose and the scale there (:class:`~custom.networks.noise.ScaleOfDose`).
        noise: arguments of :class:`~custom.networks.noise.CorrelatedNoise`, what the diffusion adds; None for white.
        one_step: what one deterministic step from t = T gives: the answer of the ``"denoiser"``, or the ``"prior"``. At
            t = T the signal is gone (its scale is 0.006), x_T says nothing that the conditions do not, and the best
            estimate is the mean that the prior has learnt. Several steps, and samples, run the denoiser at each.
        frozen: parts without gradients, kept in eval mode (the paper fixes the VAE's encoder in stage 2).
        broad: arguments of :class:`~custom.networks.broad.BroadBranch`, which takes part in the prior's broad features
            as soon as it has been trained; None for none.
        dvh: arguments of :class:`~custom.networks.dvh_estimate.DvhEstimator`, which has its say in the prior's DVHs as
            soon as it has been fitted; None for none.

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
        structure_widths: Sequence[int] | None = (8, 16, 32, 64),
        token_dim: int = 96,
        schedule: Mapping[str, Any] | None = None,
        residual_scale: float | Sequence[Sequence[float]] = 0.05,
        noise: Mapping[str, Any] | None = None,
        one_step: str = "denoiser",
        frozen: Sequence[str] = ("ct_encoder",),
        broad: Mapping[str, Any] | None = None,
        dvh: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if prior is None and denoiser is None:
            raise CaseError("ADDiffDose: neither a prior nor a denoiser; give the arguments of at least one")
        if one_step not in ("denoiser", "prior") or (one_step == "prior" and prior is None):
            found = f"{one_step!r} of a network {'without' if prior is None else 'with'} a prior"
            raise CaseError(f"ADDiffDose: one_step {found}; expected 'denoiser', or 'prior' where there is one")
        if prior is None and (broad is not None or dvh is not None):
            raise CaseError("ADDiffDose: a broad branch or a DVH estimate without a prior that it could take part in; "
                            "give `prior` too")
        self.channels = _ChannelMap(condition_channels, context_channels, structure_channels, detail_channels)
        n_spatial, n_context = len(self.channels.spatial), len(context_channels)
        n_detail, n_beams = len(self.channels.detail), len(self.channels.beams)
        self.residual_scale, self.token_dim = ScaleOfDose(residual_scale), token_dim
        self.noise = None if noise is None else CorrelatedNoise(**noise)
        self.one_step_is_prior = denoiser is None or one_step == "prior"
        self.gain = nn.Parameter(torch.ones(())) if prior is not None and self.channels.plan is not None else None
        self.prior = None if prior is None else PriorBranch(n_spatial, n_detail, n_context, n_beams, **prior)
        self.broad = None if broad is None else BroadBranch(self.channels.spatial, context_channels, **broad)
        self.dvh = None if dvh is None else DvhEstimator(self.channels.spatial, context_channels, **dvh)
        self.ct_encoder = None if ct_encoder is None else LightweightVAE3D(**ct_encoder)
        self.schedule = NoiseSchedule(**(schedule or {}))
        self.structure_encoder = self.structure_tokens = self.ct_tokens = self.denoiser = None
        if denoiser is not None:
            if structure_widths is not None:
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
        image = _plain(image)
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

    def blend(self, prior: Tensor, image: Tensor) -> Tensor:
        """The dose of :meth:`predict_prior` with the broad branch's part; ``image`` is the whole patient."""
        return prior if self.broad is None else self.broad.blend(prior, *self.split(image))

    def dvh_shift(self, prior: Tensor, image: Tensor) -> Tensor:
        """What brings the DVHs of :meth:`blend`'s dose nearer to their estimate; ``image`` is the whole patient."""
        return torch.zeros_like(prior) if self.dvh is None else self.dvh.shift(prior, *self.split(image))

    @property
    def sees_whole(self) -> bool:
        """Whether the prior has parts that want the whole patient, and so is to be known before any window."""
        return self.broad is not None or self.dvh is not None

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
                prior = (self._prior(spatial, context) if known is None else known).float().clamp_min(0)
        body, beams = spatial[:, self.channels.body], self.noise_beams(image)
        if self.denoiser is None:
            return Conditions(prior, body, spatial[:, :0], [], spatial.new_zeros(0), context, size, beams)
        seen = spatial[:, self.channels.detail]
        seen = seen if prior is None else torch.cat([prior.to(seen.dtype), seen], dim=1)
        features, tokens = None, []
        if self.structure_encoder is not None:
            features = self.structure_encoder(spatial[:, self.channels.structure])
            tokens.append(self._tokens(self.structure_tokens(features[-1])))
        if self.ct_encoder is not None:
            tokens.append(self._ct_tokens(spatial, context))
        tokens = torch.cat(tokens, dim=1) if tokens else spatial.new_zeros(len(spatial), 0, self.token_dim)
        return Conditions(prior, body, seen, features, tokens, context, size, beams)

    def noise_beams(self, image: Tensor) -> Tensor | None:
        """Doses ``(B, n, X, Y, Z)`` along which the noise is smooth; None where it is the same in all directions."""
        if self.noise is None or not self.channels.beams:
            return None
        return self.split(image)[0][:, self.channels.beams]

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

    def dose_unit(self, conditions: Conditions) -> Tensor:
        """Dose that one unit of the diffused variable is, ``(B, 1, X, Y, Z)``."""
        if conditions.prior is None:
            return torch.full_like(_crop(conditions.body, conditions.size), 0.5, dtype=torch.float32)
        return self.residual_scale(_crop(conditions.prior, conditions.size))

    def from_dose(self, dose: Tensor, conditions: Conditions) -> Tensor:
        """The diffused variable of a dose ``(B, 1, X, Y, Z)``; inverse of :meth:`to_dose` inside the body."""
        if conditions.prior is None:
            return 2 * dose - 1
        return (dose - _crop(conditions.prior, conditions.size)) / self.dose_unit(conditions)

    def to_dose(self, x0: Tensor, conditions: Conditions) -> Tensor:
        """Dose of the diffused variable: not negative, zero outside the body."""
        if conditions.prior is None:
            dose = (x0 + 1) / 2
        else:
            dose = _crop(conditions.prior, conditions.size) + self.dose_unit(conditions) * x0
        return dose.clamp_min(0) * _crop(conditions.body, conditions.size)

    def forward(self, image: Tensor) -> Tensor:
        """Default prediction: the dose after one deterministic step from t = T."""
        image = _plain(image)
        prior = None if self.prior is None else self.blend(self.predict_prior(image).float(), image)
        if self.dvh is not None:
            prior = prior + self.dvh_shift(prior, image)
        if self.one_step_is_prior:
            return prior
        conditions = self.encode(image, prior)
        x_t = torch.zeros_like(image[:, :1])
        t = torch.full((image.shape[0],), self.schedule.num_train_timesteps - 1, device=image.device)
        return self.to_dose(self.denoise(x_t, t, conditions), conditions)

    def _prior(self, spatial: Tensor, context: Tensor) -> Tensor:
        output = self.prior(spatial, spatial[:, self.channels.detail], context).float()
        dose = output[:, :1]
        if self.channels.beams:
            dose = dose + corrected_beams(output[:, 1:], spatial[:, self.channels.beams], dim=1)[:, None]
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
            others = ("ct", "body")
            structure = [n for n in self.spatial if n not in others and not n.startswith(("beam", "plan_"))]
        unknown = [n for n in structure if n not in self.spatial]
        if unknown:
            raise CaseError(f"network: structure_channels {unknown} are not among {self.spatial}")
        self.structure = [self.spatial.index(n) for n in structure]
        self.detail = [self.spatial.index(n) for n in detail if n in self.spatial]
        self.beams = beam_channels(self.spatial)
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


def _plain(image: Tensor) -> Tensor:
    """The tensor without MONAI's metadata, which would be copied at every operation."""
    return image.as_tensor() if hasattr(image, "as_tensor") else image


def _crop(x: Tensor, size: Sequence[int]) -> Tensor:
    i, j, k = size
    return x[:, :, :i, :j, :k]
