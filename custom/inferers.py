"""Inference: diffusion sampling in few steps or all of them, test-time flips, and sliding windows with linear decay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer, SlidingWindowInferer
from torch import Tensor, nn

from custom.case import CaseError
from custom.networks.noise import draw_noise
from custom.protocol.guidance import Guidance, Protocol
from custom.rois import mirror_order

__all__ = [
    "DoseDiffusionInferer",
    "FirstOutputInferer",
    "LinearDecaySlidingWindowInferer",
    "few_step_plan",
    "linear_decay_map",
    "sample_x0",
]

# Few-step plans: log(signal scale / noise scale) of the steps after t = T, and the weight with which each step after
# the first extrapolates the estimate of x_0. Fitted to Gaussians with their ideal denoiser (a "bespoke" solver in the
# sense of Shaul et al., ICML 2024), so that any standard deviation between 0.2 and 1.25 comes back: within 1 % for
# 3 and 4 steps, within 40 % for 2.
FITTED_PLANS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    2: ((0.5,), (1.0,)),
    3: ((-0.3177, 1.7136), (0.46418, 0.86785)),
    4: ((-1.1881, 0.4592, 2.0415), (0.61404, 0.32813, 0.84863)),
}


def few_step_plan(schedule: nn.Module, num_steps: int) -> tuple[list[int], list[float]]:
    """Time steps to evaluate, from T - 1 downwards, and the extrapolation weight of each (0 for the first).

    Without a fitted plan the steps are uniform in the logarithm of signal over noise, and the weights those of
    DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), which takes the last step at first order. Eight steps recover the
    standard deviation of a Gaussian within 2 %; every plan recovers its mean, and data without spread, exactly.

    Args:
        schedule: ``custom.networks.blocks.NoiseSchedule``.
        num_steps: evaluations of the denoiser.
    """
    if not 1 <= num_steps <= schedule.num_train_timesteps:
        raise CaseError(f"sampler: num_inference_steps {num_steps}; expected 1 to {schedule.num_train_timesteps}")
    alpha_bar = schedule.alpha_bar.double().cpu()
    levels = 0.5 * torch.log(alpha_bar / (1 - alpha_bar))
    first = schedule.num_train_timesteps - 1
    if num_steps in FITTED_PLANS:
        steps = torch.tensor(FITTED_PLANS[num_steps][0], dtype=torch.float64)
    else:
        highest = 3.25 if num_steps <= 10 else 4.5
        steps = torch.linspace(-1.5, highest, num_steps - 1, dtype=torch.float64)
    timesteps = [first, *((levels - level).abs().argmin().item() for level in steps)]
    timesteps = list(dict.fromkeys(int(t) for t in timesteps))  # many steps may fall on one another
    if num_steps in FITTED_PLANS and len(timesteps) == num_steps:
        return timesteps, [0.0, *FITTED_PLANS[num_steps][1]]
    level = [float(levels[t]) for t in timesteps]
    weights = [0.0] * len(timesteps)
    for i in range(1, len(timesteps) - 1):
        weights[i] = 0.5 * (level[i + 1] - level[i]) / (level[i] - level[i - 1])
    return timesteps, weights


def sample_x0(
    network: nn.Module,
    x_t: Tensor,
    conditions: Any,
    num_steps: int,
    generator: torch.Generator | None = None,
    guide: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Sample ``x_0`` (B, 1, X, Y, Z), starting from ``x_t`` at t = T.

    As many steps as the schedule has are DDPM's (Ho et al. 2020, eq. 7, posterior variance); fewer solve the
    probability-flow equation with a second-order multistep method in the estimate of ``x_0`` (:func:`few_step_plan`),
    each step leading exactly to the next entry of the time steps, the last one to the estimate itself.

    Args:
        network: has ``schedule`` and ``denoise(x_t, t, conditions)``.
        x_t: start, usually the network's noise.
        conditions: passed on.
        num_steps: evaluations of the denoiser.
        generator: random numbers on the CPU for DDPM.
        guide: moves every estimate of ``x_0``; None leaves it as the network gives it.
    """
    if num_steps == network.schedule.num_train_timesteps:
        return _sample_ddpm(network, x_t, conditions, generator, guide)
    timesteps, weights = few_step_plan(network.schedule, num_steps)
    before = None
    for i, (step, weight) in enumerate(zip(timesteps, weights)):
        t = torch.full((x_t.shape[0],), step, device=x_t.device)
        estimate = network.denoise(x_t, t, conditions)
        x0 = estimate if before is None else estimate + weight * (estimate - before)
        before = estimate
        if guide is not None:
            x0 = guide(x0)
        if i + 1 == len(timesteps):
            break
        a, s = network.schedule.scales(t)
        a_next, s_next = network.schedule.scales(torch.full_like(t, timesteps[i + 1]))
        x_t = s_next / s * x_t + (a_next - a * s_next / s) * x0
    return x0


def _sample_ddpm(
    network: nn.Module,
    x_t: Tensor,
    conditions: Any,
    generator: torch.Generator | None,
    guide: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    alpha_bar = network.schedule.alpha_bar.double()
    for step in range(len(alpha_bar) - 1, 0, -1):
        t = torch.full((x_t.shape[0],), step, device=x_t.device)
        x0 = network.denoise(x_t, t, conditions)
        x0 = x0 if guide is None else guide(x0)
        now, after = float(alpha_bar[step]), float(alpha_bar[step - 1])
        beta = 1 - now / after
        mean = after**0.5 * beta / (1 - now) * x0 + (now / after) ** 0.5 * (1 - after) / (1 - now) * x_t
        noise = draw_noise(network, x_t.shape, generator, getattr(conditions, "beams", None)).to(x_t)
        x_t = mean + (beta * (1 - after) / (1 - now)) ** 0.5 * noise
    x0 = network.denoise(x_t, torch.zeros(x_t.shape[0], dtype=torch.long, device=x_t.device), conditions)
    return x0 if guide is None else guide(x0)


def linear_decay_map(roi_size: Sequence[int], overlap_voxels: Sequence[int]) -> Tensor:
    """Blending weights ``roi_size`` of a window: 1 in its middle, falling linearly over the overlap at each end.

    In the overlap of two neighbours along one axis their weights add up to 1.
    """
    weight = torch.ones(tuple(roi_size))
    for axis, (n, overlap) in enumerate(zip(roi_size, overlap_voxels)):
        i = torch.arange(n, dtype=torch.float32)
        ramp = (torch.minimum(i, n - 1 - i) + 1) / (overlap + 1)
        shape = [1, 1, 1]
        shape[axis] = n
        weight = weight * ramp.clamp_max(1).reshape(shape)
    return weight


class LinearDecaySlidingWindowInferer(SlidingWindowInferer):
    """MONAI's sliding window with weights that decay linearly in the overlap, given in voxels an axis.

    Args:
        roi_size: window, voxels.
        overlap_voxels: overlap of neighbouring windows along each axis.
        **kwargs: of :class:`monai.inferers.SlidingWindowInferer`.
    """

    def __init__(self, roi_size: Sequence[int], overlap_voxels: Sequence[int] | int = 8, **kwargs: Any) -> None:
        overlaps = [overlap_voxels] * 3 if isinstance(overlap_voxels, int) else list(overlap_voxels)
        if any(not 0 <= o < n for o, n in zip(overlaps, roi_size)):
            raise CaseError(f"sliding window: overlap {overlaps} does not fit into windows of {list(roi_size)} voxels")
        # MONAI truncates n * (1 - overlap); the small number keeps rounding errors from changing the stride.
        fractions = [max(o - 1e-3, 0.0) / n for o, n in zip(overlaps, roi_size)]
        super().__init__(roi_size=list(roi_size), overlap=fractions, **kwargs)
        self.roi_weight_map = linear_decay_map(roi_size, overlaps)


class FirstOutputInferer(Inferer):
    """First of the network's outputs: the reconstruction of an autoencoder that also returns its latent's moments."""

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return network(inputs, *args, **kwargs)[0]


class DoseDiffusionInferer(Inferer):
    """Dose of an image: ``inferer(image, network)`` -> (B, 1, X, Y, Z), as a fraction of the highest prescription.

    Networks without a denoiser (regression baselines) are called directly, and so is one whose ``one_step`` is the
    prior for one deterministic step; flips and windows apply to them alike.

    Args:
        num_inference_steps: evaluations of the denoiser; the schedule's T for DDPM.
        num_samples: samples drawn; the call returns their mean.
        stochastic: start from the network's noise; False starts from zero, the middle of the noise. By default one step
            of one sample starts from zero, everything else from noise.
        seed: makes the samples repeatable; None draws from torch's generator.
        flips: test-time flips, each a list of spatial axes, for example ``[[0]]`` for left-right; averaged.
        condition_channels: names of the image's channels, for ``swap_channels``.
        swap_channels: pairs of channel names that change places when axis 0 (left-right) is flipped; as in training.
        roi_size: window for volumes that do not fit; None predicts the whole volume at once.
        overlap_voxels: overlap of the windows.
        prior_roi_size: window for the network's prior dose alone, such as the patch it was trained with: the statistics
            of its instance norms are then those of training. None predicts it on the whole image, or on each window of
            ``roi_size``. Where a volume is shorter than the window, the window is as short.
        prior_overlap_voxels: overlap of these windows.
        sw_batch_size: windows a batch.
        autocast_dtype: ``"bfloat16"`` or ``"float16"`` to run the network in it; None for float32.
        progress: show a bar over the windows.
        mean_of_samples: whether the dose beside the standard deviation is the samples' mean; False takes the estimate
            of one deterministic step, which is nearer to the reference when the samples are few or noisy.
        with_std: give the spread of the samples as a second channel.
        dvh_estimate: False leaves the estimate of the network's DVH (:mod:`custom.networks.dvh_estimate`) out.
        guidance: steers the dose toward the protocol; None, or a strength of 0, leaves every bit as it is.

    Raises:
        CaseError: for channel names that are not among ``condition_channels``, or guidance within windows.
    """

    def __init__(
        self,
        num_inference_steps: int = 1,
        num_samples: int = 1,
        stochastic: bool | None = None,
        seed: int | None = 0,
        flips: Sequence[Sequence[int]] = (),
        condition_channels: Sequence[str] = (),
        swap_channels: Sequence[Sequence[str]] = (),
        roi_size: Sequence[int] | None = None,
        overlap_voxels: Sequence[int] | int = 8,
        prior_roi_size: Sequence[int] | None = None,
        prior_overlap_voxels: Sequence[int] | int = 16,
        sw_batch_size: int = 1,
        autocast_dtype: str | None = None,
        progress: bool = False,
        with_std: bool = False,
        mean_of_samples: bool = True,
        guidance: Guidance | None = None,
        dvh_estimate: bool = True,
    ) -> None:
        super().__init__()
        self.dvh_estimate = dvh_estimate
        self.with_std, self.mean_of_samples = with_std, mean_of_samples
        self.guidance = guidance if guidance is not None and guidance.strength > 0 else None
        if self.guidance is not None and roi_size is not None:
            raise CaseError("inferer: guidance judges whole structures, a window sees but parts; leave roi_size out")
        if num_samples < 1:
            raise CaseError(f"inferer: num_samples {num_samples}; expected 1 or more")
        self.num_inference_steps = num_inference_steps
        self.num_samples = num_samples
        self.stochastic = (num_samples > 1 or num_inference_steps > 1) if stochastic is None else stochastic
        self.seed = seed
        self.flips = [[], *(list(axes) for axes in flips)]
        self.swapped_order = _swapped_order(list(condition_channels), swap_channels)
        if any(0 in axes for axes in self.flips) and not condition_channels:
            raise CaseError("inferer: a left-right flip (axis 0) wants condition_channels, to swap paired organs")
        self.window = None
        if roi_size is not None:
            self.window = LinearDecaySlidingWindowInferer(
                roi_size, overlap_voxels, sw_batch_size=sw_batch_size, progress=progress
            )
        self.prior_roi_size, self.sw_batch_size = prior_roi_size, sw_batch_size
        self.prior_overlap_voxels = prior_overlap_voxels
        self.autocast_dtype = None if autocast_dtype is None else getattr(torch, autocast_dtype)

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Mean of the samples ``(B, 1, X, Y, Z)`` of an image ``(B, C, X, Y, Z)``; ``with_std`` adds their spread."""
        if self.with_std:
            return torch.cat(self.mean_and_std(inputs, network), dim=1)
        return self.sample(inputs, network).mean(dim=0)

    def mean_and_std(self, inputs: Tensor, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Dose and standard deviation over the samples, each ``(B, 1, X, Y, Z)``; the latter 0 for one sample."""
        return self.dose_std_and_samples(inputs, network)[:2]

    def dose_std_and_samples(self, inputs: Tensor, network: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Those of :meth:`mean_and_std`, and the samples ``(K, B, 1, X, Y, Z)``."""
        samples = self.sample(inputs, network)
        if self.mean_of_samples:
            dose = samples.mean(dim=0)
        else:
            single = copy.copy(self)
            single.num_inference_steps, single.num_samples, single.stochastic = 1, 1, False
            dose = single.sample(inputs, network)[0]
        return dose, samples.std(dim=0, correction=int(samples.shape[0] > 1)), samples

    @torch.no_grad()
    def sample(self, inputs: Tensor, network: nn.Module) -> Tensor:
        """All samples ``(K, B, 1, X, Y, Z)``; each the mean over the flips, whose noise is the same one, flipped."""
        inputs = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs  # no MONAI metadata in the networks
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        shifted = self._shifted_priors(inputs, network)
        start = self._start(inputs, network, generator)
        total = 0.0
        for i, axes in enumerate(self.flips):
            image = self._flip(inputs, axes)
            prior = self._prior(image, network) if shifted is None else shifted[i]
            doses = self._volume(image, network, generator, prior, torch.flip(start, [a + 2 for a in axes]))
            total = total + torch.flip(doses, [a + 2 for a in axes])
        return (total / len(self.flips)).transpose(0, 1).unsqueeze(2)

    def _shifted_priors(self, inputs: Tensor, network: nn.Module) -> list[Tensor] | None:
        """Each flip's prior with what the DVH estimate asks of their mean; None where there is no estimate to ask."""
        if not self.dvh_estimate or getattr(network, "dvh", None) is None or network.dvh.share == 0:
            return None
        priors = [self._prior(self._flip(inputs, axes), network) for axes in self.flips]
        mean = sum(torch.flip(p, [a + 2 for a in axes]) for p, axes in zip(priors, self.flips)) / len(priors)
        shift = network.dvh_shift(mean, inputs)
        return [(p + torch.flip(shift, [a + 2 for a in axes])).clamp_min(0) for p, axes in zip(priors, self.flips)]

    def _volume(
        self,
        image: Tensor,
        network: nn.Module,
        generator: torch.Generator | None,
        prior: Tensor | None,
        start: Tensor,
    ) -> Tensor:
        """Doses ``(B, K, X, Y, Z)`` of an image, in windows where they are wanted."""
        if self.window is None:
            return self._predict(image, network, generator, start, prior)
        n, k = image.shape[1], image.shape[1] + self.num_samples

        def predict(patch: Tensor) -> Tensor:
            known = None if prior is None else patch[:, k:]
            return self._predict(patch[:, :n], network, generator, patch[:, n:k], known)

        # Every window gets its part of the start and the prior, so that they are the same as without windows.
        return self.window(torch.cat([image, start, *([] if prior is None else [prior])], dim=1), predict)

    def _flip(self, image: Tensor, axes: list[int]) -> Tensor:
        if not axes:
            return image
        swapped = self.swapped_order if 0 in axes else None
        flipped = torch.empty_like(image)  # channel by channel: of a large patient two images at a time are enough
        for channel, source in enumerate(swapped or range(image.shape[1])):
            flipped[:, channel] = torch.flip(image[:, source], [a + 1 for a in axes])
        return flipped

    def _autocast(self, image: Tensor) -> torch.autocast:
        return torch.autocast(image.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def _prior(self, image: Tensor, network: nn.Module) -> Tensor | None:
        """The network's prior dose, in windows of its own and blended; None where nothing is to be known beforehand."""
        whole = getattr(network, "sees_whole", False)
        apart = self.prior_roi_size is not None and getattr(network, "denoiser", None) is not None
        if getattr(network, "prior", None) is None or not (whole or apart):
            return None
        with self._autocast(image):
            dose = self._in_prior_windows(image, network.predict_prior).float()
            return network.blend(dose, image) if whole else dose

    def _in_prior_windows(self, image: Tensor, predict: Callable[[Tensor], Tensor]) -> Tensor:
        if self.prior_roi_size is None:
            return predict(image)
        size = [min(n, extent) for n, extent in zip(self.prior_roi_size, image.shape[2:])]
        overlap = self.prior_overlap_voxels
        overlap = [overlap] * 3 if isinstance(overlap, int) else overlap
        overlap = [min(o, n - 1) for o, n in zip(overlap, size)]
        return LinearDecaySlidingWindowInferer(size, overlap, sw_batch_size=self.sw_batch_size)(image, predict)

    def _start(self, image: Tensor, network: nn.Module, generator: torch.Generator | None) -> Tensor:
        """Where each sample starts at t = T, ``(B, K, X, Y, Z)``: the network's noise, or zero."""
        shape = (image.shape[0], self.num_samples, *image.shape[2:])
        if not self.stochastic:
            return image.new_zeros(shape, dtype=torch.float32)
        beams = network.noise_beams(image) if hasattr(network, "noise_beams") else None
        return draw_noise(network, shape, generator, beams).to(image.device)

    def _predict(
        self,
        image: Tensor,
        network: nn.Module,
        generator: torch.Generator | None,
        start: Tensor,
        prior: Tensor | None,
    ) -> Tensor:
        """Doses ``(B, K, X, Y, Z)`` of an image or a window of it; the conditions are encoded once."""
        with self._autocast(image):
            protocols = None if self.guidance is None else self.guidance.protocols(image)
            if self._in_one_pass(network):
                # A copy, since MONAI's windows weigh what they are given in place.
                dose = self._in_prior_windows(image, network).float() if prior is None else prior.clone()
                dose = dose if protocols is None else self.guidance(dose, protocols)
                return dose.expand(-1, self.num_samples, -1, -1, -1)
            conditions = network.encode(image) if prior is None else network.encode(image, prior)
            guide = None if protocols is None else self._guide(network, conditions, protocols)
            doses = []
            for x_t in start.split(1, dim=1):
                x0 = sample_x0(network, x_t, conditions, self.num_inference_steps, generator, guide)
                doses.append(network.to_dose(x0, conditions).float())
        return torch.cat(doses, dim=1)

    def _in_one_pass(self, network: nn.Module) -> bool:
        """Whether the network called once says all: it has no denoiser, or one step is not to go beyond its prior."""
        if getattr(network, "denoiser", None) is None:
            return True
        one_step = self.num_inference_steps == 1 and not self.stochastic
        return one_step and getattr(network, "one_step_is_prior", False)

    def _guide(self, network: nn.Module, conditions: Any, protocols: list[Protocol]) -> Callable[[Tensor], Tensor]:
        """The guidance as a map of ``x_0``; the dose is an affine function of it, but for its cut at zero."""

        def guide(x0: Tensor) -> Tensor:
            dose = network.to_dose(x0, conditions)
            moved = self.guidance(dose, protocols)
            return x0 + network.from_dose(moved, conditions) - network.from_dose(dose, conditions)

        return guide


def _swapped_order(names: list[str], pairs: Sequence[Sequence[str]]) -> list[int] | None:
    """Channel order with each pair of names exchanged; all of them are to be channels here."""
    if not names:
        return None
    if missing := [name for pair in pairs for name in pair if name not in names]:
        raise CaseError(f"inferer: swap_channels name {missing}, not among the condition_channels {names}")
    return mirror_order(names, pairs)
