"""What training minimises: each objective maps ``(network, batch)`` to named scalar terms.

A batch holds ``image`` (B, C, X, Y, Z), ``label`` (B, 1, X, Y, Z, fraction of the highest prescription), ``body``
(B, 1, X, Y, Z; where the dose counts), ``rois`` (B, R, X, Y, Z, 0/1) and ``prescription_gy`` (B,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from custom.case import CaseError
from custom.losses import criteria_dvh_l1, gradient_l1, masked_l1, sorted_dvh_l1
from custom.networks.broad import mean_of_blocks, spread_means
from custom.networks.noise import draw_noise

__all__ = ["AutoencoderObjective", "BroadObjective", "DiffusionObjective", "RegressionObjective"]

Batch = Mapping[str, Any]


class RegressionObjective:
    """L1 dose error of a one-pass prediction inside the body, with optional DVH and gradient terms.

    Args:
        dvh_weight: weight of the sorted-DVH distance.
        criteria_weight: weight of the OpenKBP criteria; wants ``target_names``, ``roi_names`` and the batch's
            ``voxel_cc`` (B,).
        gradient_weight: weight of the gradient term.
        roi_names: name of each channel of ``rois``.
        target_names: which of them are targets.
        predict: name of the network's method that predicts; a network without it is called itself.
        broad_share: share of the error's means over blocks of 2 x 2 x 2 voxels beside the targets that does not count,
            in any term, because the broad branch's dose takes its place (:mod:`custom.networks.broad`).
    """

    def __init__(
        self,
        dvh_weight: float = 0.0,
        criteria_weight: float = 0.0,
        gradient_weight: float = 0.0,
        roi_names: Sequence[str] = (),
        target_names: Sequence[str] = (),
        predict: str = "predict_prior",
        broad_share: float = 0.0,
    ) -> None:
        unknown = sorted(set(target_names) - set(roi_names))
        if unknown:
            raise CaseError(f"objective: target_names {unknown} are not among roi_names {list(roi_names)}")
        if criteria_weight and not roi_names:
            raise CaseError("objective: criteria_weight wants roi_names, the names of the channels of batch['rois']")
        self.dvh_weight = dvh_weight
        self.criteria_weight = criteria_weight
        self.gradient_weight = gradient_weight
        self.is_target = [name in target_names for name in roi_names]
        self.predict = predict
        self.broad_share = broad_share

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        pred = getattr(network, self.predict, network)(batch["image"]).float()
        return self.terms(pred, batch)

    def terms(self, pred: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms of a predicted dose ``(B, 1, X, Y, Z)``."""
        label, body = batch["label"].float(), batch["body"]
        if self.broad_share:
            pred = pred - self.broad_share * self._broad(pred - label, batch)
        terms = {"l1": masked_l1(pred, label, body)}
        if self.dvh_weight:
            terms["dvh"] = self.dvh_weight * sorted_dvh_l1(pred, label, batch["rois"])
        if self.criteria_weight:
            criteria = criteria_dvh_l1(pred, label, batch["rois"], self.is_target, batch["voxel_cc"])
            terms["criteria"] = self.criteria_weight * criteria
        if self.gradient_weight:
            terms["gradient"] = self.gradient_weight * gradient_l1(pred, label, body)
        return terms

    def _broad(self, error: Tensor, batch: Batch) -> Tensor:
        """What the broad branch replaces of ``error`` (B, 1, X, Y, Z), at full share."""
        body = (batch["body"][:, 0] > 0).to(error.dtype)
        targets = batch["rois"][:, [i for i, target in enumerate(self.is_target) if target]]
        targets = (targets > 0).any(1).to(error.dtype)
        return (body * spread_means(mean_of_blocks(error[:, 0] * body), body, targets))[:, None]


class DiffusionObjective:
    """Noise, v or x_0 error of the denoiser inside the body, the prior branch detached.

    The error of the network's output is turned into that of ``x_0`` and weighted by ``min(SNR, snr_limit)`` (Hang et
    al., ICCV 2023), whatever the parameterization; ``snr_limit=None`` is the plain error of the output, as in the
    ADDiff-Dose paper. Voxels count by the dose that an error is there: a network whose diffused variable has not the
    same unit everywhere has ``dose_unit``.

    Args:
        snr_limit: see above.
        one_step_share: share of the batches at t = T from ``x_T = 0``, which is what one deterministic step sees;
            their L1 error is in units of x_0, so that it weighs as much as the noisy batches.
        kind: ``"mse"`` or ``"l1"``.
        generator: random numbers on the CPU; torch's own by default.
    """

    def __init__(
        self,
        snr_limit: float | None = 5.0,
        one_step_share: float = 0.25,
        kind: str = "mse",
        generator: torch.Generator | None = None,
    ) -> None:
        if kind not in ("mse", "l1"):
            raise CaseError(f"diffusion objective: kind {kind!r}; expected 'mse' or 'l1'")
        self.snr_limit = snr_limit
        self.one_step_share = one_step_share
        self.kind = kind
        self.generator = generator

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        image, label, body = batch["image"], batch["label"].float(), batch["body"]
        conditions = network.encode(image)
        x0 = network.from_dose(label, conditions)
        last = network.schedule.num_train_timesteps - 1
        if self.one_step_share and float(torch.rand((), generator=self.generator)) < self.one_step_share:
            t = torch.full((image.shape[0],), last, device=image.device)
            x0_hat = network.denoise(torch.zeros_like(x0), t, conditions)
            return {"one_step": masked_l1(x0_hat, x0, body)}
        t = torch.randint(0, last + 1, (image.shape[0],), generator=self.generator).to(image.device)
        noise = draw_noise(network, x0.shape, self.generator, getattr(conditions, "beams", None)).to(x0)
        x_t = network.schedule.add_noise(x0, noise, t)
        output = network.denoise_output(x_t, t, conditions)
        error = output - network.schedule.target(x0, noise, t)
        error = error.abs() if self.kind == "l1" else error.square()
        weight = self._weight(network.schedule, t)
        counts = (body > 0).to(error.dtype)
        if hasattr(network, "dose_unit"):
            unit = network.dose_unit(conditions).to(error.dtype)
            counts = counts * (unit if self.kind == "l1" else unit.square())
        per_patient = (error * weight * counts).sum((1, 2, 3, 4)) / counts.sum((1, 2, 3, 4)).clamp_min(1e-12)
        return {"diffusion": per_patient.mean()}

    def _weight(self, schedule: nn.Module, t: Tensor) -> Tensor | float:
        """``min(SNR, limit)`` for the error of x_0, as a weight of the output's error (for the L1: its root)."""
        if self.snr_limit is None:
            return 1.0
        a, s = schedule.scales(t)
        snr = (a / s).square()
        x0_error_per_output = {"sample": torch.ones_like(s), "v": s.square(), "epsilon": 1 / snr}
        weight = snr.clamp_max(self.snr_limit) * x0_error_per_output[schedule.parameterization]
        return weight if self.kind == "mse" else weight.sqrt()


class BroadObjective:
    """L1 error of each perceptron of the broad branch, in the voxels that ``RandBroadVoxelsd`` has drawn.

    The batch holds ``voxels`` (B, V, F), ``patient`` (B, P), ``residual`` (B, V) and ``weight`` (B, V).

    A patient's errors are far from independent: a beam that carries more than the anatomy tells shifts thousands of
    voxels at once, and counting each of them teaches the patient by heart. With ``independent`` the errors are first
    made independent, as in generalised least squares (Aitken 1935): in units of their size, each less what those before
    it foretell by the correlation of :class:`custom.networks.noise.CorrelatedNoise`; and back in dose.

    Args:
        independent: variance of what a voxel errs on its own, over that of the correlated noise; None counts the errors
            as they are.
    """

    def __init__(self, independent: float | None = None) -> None:
        if independent is not None and independent <= 0:
            raise CaseError(f"broad objective: independent {independent}; expected a share above 0, or None")
        self.independent = independent

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        voxels, patient, weight = batch["voxels"], batch["patient"], batch["weight"].float()
        pred = network.broad(voxels, patient).float()
        error = pred - batch["residual"].float()
        if self.independent is not None:
            error = self._independent(network, error, pred, voxels.float(), patient.float())
        return {"l1": (error.abs() * weight).mean() / weight.mean()}

    def _independent(self, network: nn.Module, error: Tensor, pred: Tensor, voxels: Tensor, patient: Tensor) -> Tensor:
        """``error`` (M, B, V), made independent voxel by voxel."""
        if getattr(network, "noise", None) is None:
            raise CaseError("broad objective: `independent` wants the network's noise; give `noise` to the network")
        with torch.no_grad(), torch.autocast(error.device.type, enabled=False):
            dose = voxels[..., network.channels.plan][..., 0] + pred.mean(0)
            size = network.residual_scale(dose.clamp_min(0))
            places = network.broad.places_voxels(voxels, patient)
            alike = network.noise.correlation(places, voxels[..., network.broad.beams])
            own = self.independent * torch.eye(alike.shape[-1], device=alike.device)
            factor = torch.linalg.cholesky(alike + own)
        with torch.autocast(error.device.type, enabled=False):
            scaled = (error / size).permute(1, 2, 0)
            return torch.linalg.solve_triangular(factor, scaled, upper=False).permute(2, 0, 1) * size


class AutoencoderObjective:
    """L1 of the CT's reconstruction and an annealed Kullback-Leibler term (stage 1).

    Args:
        ct_channel: index of the CT channel (HU/1000) in ``image``.
        kl_weight: final weight of the KL term, per latent element.
        anneal: share of the run over which the weight rises from 0, linearly.
    """

    def __init__(self, ct_channel: int = 0, kl_weight: float = 1e-3, anneal: float = 0.0) -> None:
        self.ct_channel = ct_channel
        self.kl_weight = kl_weight
        self.anneal = anneal
        self.progress = 0.0  # of the run; custom.engines.ObjectiveUpdate says so

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        autoencoder = network.ct_encoder
        ct = autoencoder.scale_ct(batch["image"][:, self.ct_channel : self.ct_channel + 1])
        reconstruction, mean, log_variance = autoencoder(ct)
        weight = self.kl_weight * (min(1.0, self.progress / self.anneal) if self.anneal else 1.0)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).float().mean()
        return {"reconstruction": F.l1_loss(reconstruction.float(), ct.float()), "kl": weight * kl}
