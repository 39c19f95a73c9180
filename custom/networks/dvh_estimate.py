"""DVH estimate: what a structure's dose-volume histogram will be, from the patients planned before.

Knowledge-based planning predicts a few figures of each structure's DVH from the patient's anatomy (overlap with the
targets, distances to them: Wu et al., Med Phys 36, 5497, 2009; Yuan et al., Med Phys 39, 6868, 2012). Here the plan
prior is the first guess, and a Gaussian process says how the reference departs from it. It sees whole structures of a
few hundred patients and nothing else, so it errs otherwise than a network that sees voxels, and the mean of both is
better than either. The dose is then moved within each structure, by a function of itself, until its figures are that
mean. That function's slope is bounded: what two processors compute differently must not grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from custom.case import CaseError
from custom.networks.beams import beam_channels
from custom.networks.gaussian_process import GpTask, covariance, fit_family, group_kernels

__all__ = ["DvhEstimator", "StructureFigures"]

ORGANS = ("SpinalCord", "Brainstem", "Parotid_R", "Parotid_L", "Esophagus", "Larynx", "Bone_Mandible")
TARGETS = ("target_high", "target_mid", "target_low")
PLANS = ("plan_prior", "plan_prior_coverage", "plan_prior_sparing")
SPACING = ("spacing_x", "spacing_y", "spacing_z")
KINDS = ("is_vmat", "is_lung", "prescription_level")  # of plans; what was not among the patients is not estimated
KIND_TOLERANCE = 0.015
SPACING_UNIT_MM = 4.0  # of the context's spacing_x, ...
PLACE_UNIT_MM = 50.0
VOLUMES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # share of the structure that gets less
NEAR = (0.05, 0.25, 0.5, 0.75, 0.95)  # share of the structure that is farther from a target
METRICS = 3  # D99, D95, D1 of a target; D0.1cc and the mean of an organ, and one unused
TARGET_SHARES = (0.01, 0.05, 0.99)
HOT_MM3 = 100.0
STEEPNESS = 4  # of the change towards an organ's hottest voxels
STRETCH = 2.0  # of the span between two metrics of a target, at most; and 1 / 2 at least
RANGE = 3.0  # standard deviations to which figures are cut
LARGEST = 0.1  # of the prescription, by which no figure of a structure is changed
FEWEST = 3  # patients with a structure, without whom nothing is learnt of it
# Times the squared distance within which 95 % of the patients have another: so far a patient is believed, and at twice
# that not at all.
ODD = 1.5


class StructureFigures(NamedTuple):
    """What is known of a patient's structures before the dose is.

    Args:
        values: ``(S, F)``, nan where a structure is absent.
        plan: ``(S, 3)`` the plan prior's metrics.
    """

    values: Tensor
    plan: Tensor


class DvhEstimator(nn.Module):
    """Estimates D99, D95 and D1 of targets, D0.1cc and mean of organs, and moves a dose a share of the way there.

    Until :meth:`fit` it changes nothing. It knows the patients it was fitted to by standardised figures of their
    structures (no voxels); the dose of a patient who is unlike all of them, or whose plan is of another kind
    (technique, site, prescription), is left as it is.

    Args:
        spatial_channels, context_channels: names of what :meth:`figures` gets.
        patients: most that :meth:`fit` is given.
        organs, targets: structures, each with a channel ``sdm_...``; those without are left out.

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
    ) -> None:
        super().__init__()
        spatial, context = list(spatial_channels), list(context_channels)
        missing = [n for n in ("plan_prior", "body") if n not in spatial] + [n for n in SPACING if n not in context]
        if missing or not any(f"sdm_{name}" in spatial for name in targets):
            missing = missing or [f"sdm_{name}" for name in targets]
            raise CaseError(f"DVH estimate: channels {missing} are missing; found {spatial} and {context}")
        self.names = [name for name in (*targets, *organs) if f"sdm_{name}" in spatial]
        self.targets = [name in targets for name in self.names]
        self.structures = [spatial.index(f"sdm_{name}") for name in self.names]
        self.plans = [spatial.index(name) for name in PLANS if name in spatial]
        self.beams = beam_channels(spatial)
        self.ct = [spatial.index("ct")] if "ct" in spatial else []
        self.body = spatial.index("body")
        self.spacing = [context.index(name) for name in SPACING]
        self.kinds = [context.index(name) - len(context) for name in KINDS if name in context]  # the figures' last ones
        self.patients = patients
        sizes = self._group_sizes(len(context))
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

    def _group_sizes(self, n_context: int) -> dict[str, int]:
        """Size of each group of a structure's figures, in their order."""
        count, plans, beams = len(self.names), len(self.plans), len(self.beams)
        own = {
            "plan": len(VOLUMES) + 1, "trade_offs": (plans - 1) * (len(VOLUMES) + 1),
            "distances": 1 + len(NEAR) * sum(self.targets), "overlaps": count, "place": 5, "beams": 2 * beams,
            "ct": len(self.ct),
        }  # fmt: skip
        others = {"others_plan": 3 * count, "others_trade_offs": (plans - 1) * count, "others_size": count,
                  "others_place": 2 * count, "others_present": count, "context": n_context}  # fmt: skip
        return {name: size for name, size in {**own, **others}.items() if size}

    def masks(self, spatial: Tensor) -> list[Tensor]:
        """``(X, Y, Z)`` boolean of each structure, inside the body."""
        body = spatial[self.body] > 0
        return [(spatial[i] > 0) & body for i in self.structures]

    @torch.no_grad()
    def figures(self, spatial: Tensor, context: Tensor) -> StructureFigures:
        """Figures of all structures.

        Args:
            spatial: ``(n, X, Y, Z)``.
            context: ``(m,)``.
        """
        with torch.autocast(spatial.device.type, enabled=False):
            spatial, context = spatial.float(), context.float()
            masks = self.masks(spatial)
            to_targets = [i for i, is_target in zip(self.structures, self.targets) if is_target]
            sizes = [len(self.plans), len(to_targets), len(self.beams), len(self.ct)]
            rows = spatial.flatten(1)[[*self.plans, *to_targets, *self.beams, *self.ct]]
            edges_mm = SPACING_UNIT_MM * context[self.spacing]
            axes = [torch.arange(n, device=spatial.device) * e / PLACE_UNIT_MM
                    for n, e in zip(spatial.shape[1:], edges_mm)]  # fmt: skip
            voxels = self._hot_voxels(context)
            treated = torch.stack([m for m, is_target in zip(masks, self.targets) if is_target]).any(0)
            zero, treated_ends = _place(treated, axes)
            own, brief, plan = [], [], []
            for mask, is_target in zip(masks, self.targets):
                count = mask.sum()
                gone = torch.where(count > 0, 0.0, torch.nan)
                plans, distances, beams, ct = rows[:, mask.flatten()].split(sizes)
                doses = torch.cat([_quantiles(plans, VOLUMES), _mean(plans)[:, None]], dim=1)  # (plans, V + 1)
                trade_offs = doses[1:] - doses[:1]
                size = torch.log(count.clamp_min(1) * edges_mm.prod() / 1e3)[None]
                near = _quantiles(distances, NEAR).flatten()
                overlaps = torch.stack([(mask & other).sum() / count.clamp_min(1) for other in masks])
                centre, ends = _place(mask, axes)
                place = torch.cat([centre - zero, ends - treated_ends])
                shares = _mean(beams)
                parts = [doses[0], trade_offs.flatten(), size, near, overlaps, place,
                         shares / shares.sum().clamp_min(1e-3), shares, _mean(ct)]
                own.append(torch.cat(parts) + gone)
                brief.append([doses[0, [0, 3, -1]], trade_offs[:, -1], size, place[1:3], 1 + gone])
                plan.append(_metrics(plans[0], voxels, is_target))
            present = torch.stack([b[-1] for b in brief])
            others = [torch.stack([b[k] + b[-1][..., None] - 1 for b in brief]) for k in range(4)]
            values = []
            for s, mine in enumerate(own):
                hidden = torch.zeros(len(own), 1, device=spatial.device)
                hidden[s] = torch.nan  # what is its own is among its own figures
                seen = [(o + hidden).flatten() for o in others]
                values.append(torch.cat([mine, *seen, torch.nan_to_num(present), context]))
            return StructureFigures(torch.stack(values), torch.stack(plan))

    def fit(
        self, patients: Sequence[tuple[StructureFigures, Tensor]], share: float, steps: int = 100
    ) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """Learn from reference doses how a structure's metrics depart from the plan prior's.

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
        departure = torch.stack([reference.cpu() - figures.plan.cpu() for figures, reference in patients])
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
            metrics.append(figures.plan[s] + torch.stack(rows))
            nearest = self._apart(inputs, s)[0].amin() / self.reach[s].clamp_min(1e-6)
            known = (self.reach[s] > 0) & ~torch.isnan(figures.values[s, 0]) & same.all()
            trust.append(torch.where(known, (2 - nearest).clamp(0, 1), torch.zeros_like(nearest)))
        return torch.stack(metrics), torch.stack(trust)

    def metrics(self, dose: Tensor, spatial: Tensor, context: Tensor) -> Tensor:
        """Metrics ``(S, 3)`` of a dose ``(X, Y, Z)``: D99, D95, D1 of targets, D0.1cc, mean and nothing of organs."""
        voxels = self._hot_voxels(context)
        return torch.stack([_metrics(dose[mask], voxels, is_target)
                            for mask, is_target in zip(self.masks(spatial), self.targets)])  # fmt: skip

    def _hot_voxels(self, context: Tensor) -> Tensor:
        """Voxels in 0.1 cc, at least one, as OpenKBP counts them."""
        edges_mm = SPACING_UNIT_MM * context[self.spacing].float()
        return (HOT_MM3 / edges_mm.prod()).round().clamp_min(1)

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
        masks = self.masks(spatial)
        free = ~torch.stack([m for m, is_target in zip(masks, self.targets) if is_target]).any(0)
        goal, trust = self.estimate(self.figures(spatial, context))
        voxels = self._hot_voxels(context)
        now = torch.stack([_metrics(dose[m], voxels, t) for m, t in zip(masks, self.targets)])
        goal = now + (self.share * trust)[:, None] * (goal - now).clamp(-LARGEST, LARGEST)
        for mask, is_target, wanted in zip(masks, self.targets, goal):  # once each: what is asked again and again
            inside = dose[mask]  # runs away where a metric is but one voxel's dose
            found = _metrics(inside, voxels, is_target)
            if is_target:
                change = _target_change(inside, found, wanted)
            else:  # of an organ, the targets' part is not touched
                change = _organ_change(inside, found, wanted) * free[mask]
            dose = dose.clone()
            dose[mask] = (inside + change).clamp_min(0)
        return dose


def _quantiles(values: Tensor, shares: Sequence[float]) -> Tensor:
    """Quantiles ``(C, Q)`` along ``values`` (C, N); zero where N is 0 (a trace knows no branches)."""
    ordered = values.sort(dim=1).values
    last = (torch.ones_like(values[0]).sum() - 1).clamp_min(0)
    at = torch.as_tensor(shares, device=values.device) * last
    ordered = torch.cat([ordered, ordered.new_zeros(len(values), 1)], dim=1)
    low = at.floor().long()
    high = at.ceil().long()
    return torch.lerp(ordered[:, low], ordered[:, high], (at - low)[None])


def _mean(values: Tensor) -> Tensor:
    """Mean ``(C,)`` along ``values`` (C, N); zero where N is 0."""
    return values.sum(1) / torch.ones_like(values).sum(1).clamp_min(1)


def _metrics(values: Tensor, hot_voxels: Tensor, is_target: bool) -> Tensor:
    """The three metrics of a structure's voxels ``(N,)``; OpenKBP's percentile rules."""
    if is_target:
        return _quantiles(values[None], TARGET_SHARES)[0]
    count = torch.ones_like(values).sum().clamp_min(1)
    top = _quantiles(values[None], (1 - hot_voxels / count).clamp_min(0)[None])[0, 0]
    mean = _mean(values[None])[0]
    return torch.stack([top, mean, torch.zeros_like(mean)])


def _place(mask: Tensor, axes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Centre ``(3,)`` of a mask and its ends along the third axis ``(2,)``, in units of 50 mm."""
    count = mask.sum().clamp_min(1)
    sums = [mask.sum(dim=[d for d in range(3) if d != axis]) for axis in range(3)]
    centre = torch.stack([(s * a).sum() / count for s, a in zip(sums, axes)])
    along = sums[2] > 0
    low = torch.where(along, axes[2], axes[2].max()).min()
    high = torch.where(along, axes[2], axes[2].min()).max()
    return centre, torch.stack([low, high])


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
    mean = _mean(hot[None])[0]
    room = (1 - mean).clamp_min(1e-3)
    largest = 0.5 * top * room / STEEPNESS
    more = torch.minimum(torch.maximum(missing[0] - missing[1], -largest), largest)
    farthest = missing[:2].abs().max()
    return torch.minimum(torch.maximum(missing[1] + more * (hot - mean) / room, -farthest), farthest)
