"""DVH estimate: what a structure's dose-volume histogram will be, from the patients planned before.

A Gaussian process says how the reference's DVH departs from a first guess: from the plan prior's, or from that of the
dose that the network predicts. It sees figures of whole structures (:mod:`custom.networks.dvh_figures`) of a few
hundred patients and nothing else, so it errs otherwise than a network that sees voxels. The dose is then moved within
each structure, by a function of itself, until its figures are nearer to the estimate. That function's slope is bounded:
what two processors compute differently must not grow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from custom.case import CaseError
from custom.networks.dvh_figures import METRICS, ORGANS, TARGETS, DvhFigures, StructureFigures, dvh_metrics, mean_of
from custom.networks.gaussian_process import GpTask, covariance, fit_family, group_kernels

__all__ = ["DvhEstimator"]

KINDS = ("is_vmat", "is_lung", "prescription_level")  # of plans; what was not among the patients is not estimated
KIND_TOLERANCE = 0.015
STEEPNESS = 4  # of the change towards an organ's hottest voxels
STRETCH = 2.0  # of the span between two metrics of a target, at most; and 1 / 2 at least
RANGE = 3.0  # standard deviations to which figures are cut
LARGEST = 0.1  # of the prescription, by which no figure of a structure is changed
FEWEST = 3  # patients with a structure, without whom nothing is learnt of it
# Times the squared distance within which 95 % of the patients have another: so far a patient is believed, and at twice
# that not at all.
ODD = 1.5


class DvhEstimator(nn.Module):
    """Estimates D99, D95 and D1 of targets, D0.1cc and mean of organs, and moves a dose a share of the way there.

    Until :meth:`fit` it changes nothing. It knows the patients it was fitted to by standardised figures of their
    structures (no voxels); the dose of a patient who is unlike all of them, or whose plan is of another kind
    (technique, site, prescription), is left as it is.

    Args:
        spatial_channels, context_channels: names of what :class:`~custom.networks.dvh_figures.DvhFigures` gets.
        patients: most that :meth:`fit` is given.
        organs, targets: structures, each with a channel ``sdm_...``; those without are left out.
        sees_dose: depart from the dose that is to be moved, not from the plan prior. :meth:`fit` then wants doses that
            were predicted without having seen the patient, or it learns to trust a dose that is known by heart.

    Raises:
        CaseError: a channel that is missing.
    """

    taken_whole = True  # a part of it would move doses somewhere (custom.networks.growth)

    def __init__(
        self,
        spatial_channels: Sequence[str],
        context_channels: Sequence[str],
        patients: int = 196,
        organs: Sequence[str] = ORGANS,
        targets: Sequence[str] = TARGETS,
        sees_dose: bool = False,
    ) -> None:
        super().__init__()
        self.figures = DvhFigures(spatial_channels, context_channels, organs, targets, sees_dose)
        self.names, self.targets = self.figures.names, self.figures.targets
        context = list(context_channels)
        self.kinds = [context.index(name) - len(context) for name in KINDS if name in context]  # the figures' last ones
        self.patients = patients
        sizes = self.figures.sizes
        self.groups = list(sizes)
        total, count = sum(sizes.values()), len(self.names)
        start = 0
        membership = torch.zeros(len(sizes), total)
        for row, size in enumerate(sizes.values()):
            membership[row, start : start + size] = 1 / size
            start += size
        self.register_buffer("membership", membership, persistent=False)
        for name, shape in {
            "mean": (count, total), "std": (count, total), "seen": (count, patients, total),
            "weights": (count, METRICS, patients), "offset": (count, METRICS), "amplitude": (count, METRICS),
            "relevance": (count, METRICS, len(sizes)), "slope": (count, METRICS, len(sizes)), "reach": (count,),
            "kinds_low": (len(self.kinds),), "kinds_high": (len(self.kinds),), "share": (),
        }.items():  # fmt: skip
            self.register_buffer(name, torch.zeros(shape))

    def fit(
        self, patients: Sequence[tuple[StructureFigures, Tensor]], share: float, steps: int = 50
    ) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """Learn from reference doses how a structure's metrics depart from the first guess.

        Args:
            patients: figures, and the reference's metrics ``(S, 3)`` (:meth:`metrics`) of each.
            share: of the estimate in the metrics; the dose keeps the rest.
            steps: of the search for the covariances' parameters.

        Returns:
            For each structure and metric, the departures estimated with that patient left out, and the true ones.

        Raises:
            CaseError: too few patients or too many, or a share outside 0 to 1.
        """
        if not FEWEST <= len(patients) <= self.patients or not 0 <= share <= 1:
            raise CaseError(f"DVH estimate: {len(patients)} patients, share {share}; expected {FEWEST} to "
                            f"{self.patients} patients (network_def#dvh#patients) and a share of 0 to 1")
        values = torch.stack([figures.values for figures, _ in patients]).cpu()  # (P, S, F)
        departure = torch.stack([reference.cpu() - figures.first.cpu() for figures, reference in patients])
        for buffer in self.buffers():
            if buffer is not self.membership:
                buffer.zero_()
        self.kinds_low.copy_(values[:, 0, self.kinds].amin(0))
        self.kinds_high.copy_(values[:, 0, self.kinds].amax(0))
        report = {}
        for family in (True, False):
            found = [(s, *self._standardise(s, values[:, s])) for s, kind in enumerate(self.targets) if kind is family]
            found = [(s, inputs, rows) for s, inputs, rows in found if len(rows) >= FEWEST]
            metrics = range(METRICS if family else METRICS - 1)
            tasks = [(s, k, rows, GpTask(inputs[rows], departure[rows, s, k])) for s, inputs, rows in found
                     for k in metrics]
            fits = fit_family([task for *_, task in tasks], self.membership.cpu(), steps) if tasks else []
            for (s, k, rows, task), fit in zip(tasks, fits):
                self.weights[s, k, rows] = fit.weights.to(self.weights)
                self.offset[s, k], self.amplitude[s, k] = fit.offset, fit.amplitude
                self.relevance[s, k], self.slope[s, k] = fit.relevance, fit.slope
                report[self.names[s], k] = (fit.left_out.float(), task.outcomes)
            for s, inputs, rows in found:
                self.seen[s, : len(inputs)] = inputs.to(self.seen)
                apart = self._apart(inputs[rows].to(self.seen), s)[:, rows]
                apart.fill_diagonal_(torch.inf)
                self.reach[s] = ODD * apart.amin(1).quantile(0.95)
        self.share.fill_(share)
        return report

    def _standardise(self, s: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """``values`` (P, F) in standard deviations, which are kept; and which patients have the structure."""
        there = ~torch.isnan(values[:, 0])
        known = values[there]
        mean = torch.nan_to_num(known.nanmean(0))
        spread = torch.nan_to_num((known - mean).square().nanmean(0).sqrt())
        self.mean[s] = mean
        self.std[s] = torch.where(spread > 1e-4, spread, torch.full_like(spread, 1e4))
        return self._scaled(s, values), there.nonzero()[:, 0]

    def _scaled(self, s: int, values: Tensor) -> Tensor:
        scaled = (values - self.mean[s].to(values)) / self.std[s].to(values)
        return torch.nan_to_num(scaled).clamp(-RANGE, RANGE)

    def _apart(self, inputs: Tensor, s: int) -> Tensor:
        """Squared distance of ``inputs`` (N, F) to every patient, by what matters for the structure; ``(N, P)``.

        Infinite to those who have no such structure.
        """
        distances, _ = group_kernels(inputs, self.seen[s], self.membership)
        distances = torch.einsum("g,gnp->np", self.relevance[s].mean(0), distances)
        return distances.masked_fill((self.weights[s] == 0).all(0), torch.inf)

    def estimate(self, figures: StructureFigures) -> tuple[Tensor, Tensor]:
        """Metrics ``(S, 3)``, and how far each structure is to be believed, 0 to 1, ``(S,)``."""
        metrics, trust = [], []
        kinds = figures.values[0, self.kinds]
        same = (kinds > self.kinds_low - KIND_TOLERANCE) & (kinds < self.kinds_high + KIND_TOLERANCE)
        for s in range(len(self.names)):
            inputs = self._scaled(s, figures.values[s : s + 1])
            kernels = group_kernels(inputs, self.seen[s], self.membership)
            rows = [covariance(*kernels, self.relevance[s, k], self.slope[s, k], self.amplitude[s, k])[0]
                    @ self.weights[s, k] + self.offset[s, k] for k in range(METRICS)]  # fmt: skip
            metrics.append(figures.first[s] + torch.stack(rows))
            nearest = self._apart(inputs, s)[0].amin() / self.reach[s].clamp_min(1e-6)
            known = (self.reach[s] > 0) & ~torch.isnan(figures.values[s, 0]) & same.all()
            trust.append(torch.where(known, (2 - nearest).clamp(0, 1), torch.zeros_like(nearest)))
        return torch.stack(metrics), torch.stack(trust)

    @torch.no_grad()
    def shift(self, dose: Tensor, spatial: Tensor, context: Tensor) -> Tensor:
        """What is to be added to a dose so that its metrics come nearer to the estimate.

        Args:
            dose: ``(B, 1, X, Y, Z)``, a fraction of the highest prescription, zero outside the body.
            spatial: ``(B, n, X, Y, Z)``.
            context: ``(B, m)``.
        """
        if self.share == 0:
            return torch.zeros_like(dose)
        with torch.autocast(dose.device.type, enabled=False):
            moved = [self._moved(*item) for item in zip(dose[:, 0].float(), spatial, context)]
        return torch.stack(moved)[:, None] - dose

    def _moved(self, dose: Tensor, spatial: Tensor, context: Tensor) -> Tensor:
        masks = self.figures.masks(spatial)
        free = ~torch.stack([m for m, is_target in zip(masks, self.targets) if is_target]).any(0)
        goal, trust = self.estimate(self.figures(spatial, context, dose))
        voxels = self.figures.hot_voxels(context)
        now = torch.stack([dvh_metrics(dose[m], voxels, t) for m, t in zip(masks, self.targets)])
        goal = now + (self.share * trust)[:, None] * (goal - now).clamp(-LARGEST, LARGEST)
        for mask, is_target, wanted in zip(masks, self.targets, goal):  # once each: what is asked again and again
            inside = dose[mask]  # runs away where a metric is but one voxel's dose
            found = dvh_metrics(inside, voxels, is_target)
            if is_target:
                change = _target_change(inside, found, wanted)
            else:  # of an organ, the targets' part is not touched
                change = _organ_change(inside, found, wanted) * free[mask]
            dose = dose.clone()
            dose[mask] = (inside + change).clamp_min(0)
        return dose


def _target_change(dose: Tensor, found: Tensor, wanted: Tensor) -> Tensor:
    """What voxels of a target get more, linear in their dose between D99, D95 and D1 and constant beyond.

    D95 is met; the spans to the others change by a factor of ``STRETCH`` at most.
    """
    spans = found.diff().clamp_min(1e-6)
    wanted_spans = torch.minimum(torch.maximum(wanted.diff(), spans / STRETCH), spans * STRETCH)
    low, high = wanted_spans - spans
    below = ((found[1] - dose) / spans[0]).clamp(0, 1)
    above = ((dose - found[1]) / spans[1]).clamp(0, 1)
    return wanted[1] - found[1] - low * below + high * above


def _organ_change(dose: Tensor, found: Tensor, wanted: Tensor) -> Tensor:
    """What voxels of an organ get more, so that its mean is met, and its D0.1cc as far as a slope of a half allows.

    No voxel moves farther than the two: of an organ within a target few are free, and far below its mean.
    """
    missing = wanted - found
    top = found[0].clamp_min(1e-3)
    hot = (dose / top).clamp(0, 1) ** STEEPNESS
    mean = mean_of(hot[None])[0]
    room = (1 - mean).clamp_min(1e-3)
    largest = 0.5 * top * room / STEEPNESS
    more = torch.minimum(torch.maximum(missing[0] - missing[1], -largest), largest)
    farthest = missing[:2].abs().max()
    return torch.minimum(torch.maximum(missing[1] + more * (hot - mean) / room, -farthest), farthest)
