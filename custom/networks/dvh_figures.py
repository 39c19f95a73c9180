"""What is known of a patient's structures before a DVH is estimated: figures of their anatomy, plans and dose.

Knowledge-based planning foretells a structure's DVH from where it lies (overlap with the targets, distances to them: Wu
et al., Med Phys 36, 5497, 2009; Yuan et al., Med Phys 39, 6868, 2012). Here the plan prior adds what a plan can reach
there: its DVH, the same over a neighbourhood of 5 mm (which tells how sharp a bend of the dose the structure asks for),
its dose where the structure is hottest and coldest, and around the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from custom.case import CaseError
from custom.networks.beams import beam_channels
from custom.networks.neighbourhoods import gaussian_means

__all__ = ["METRICS", "DvhFigures", "StructureFigures", "dvh_metrics", "mean_of"]

ORGANS = ("SpinalCord", "Brainstem", "Parotid_R", "Parotid_L", "Esophagus", "Larynx", "Bone_Mandible")
TARGETS = ("target_high", "target_mid", "target_low")
PLANS = ("plan_prior", "plan_prior_coverage", "plan_prior_sparing")
SPACING = ("spacing_x", "spacing_y", "spacing_z")
SPACING_UNIT_MM = 4.0  # of the context's spacing_x, ...
PLACE_UNIT_MM = 50.0
DISTANCE_UNIT_MM = 50.0  # of the sdm_ channels, which end there
VOLUMES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # share of the structure that gets less
NEAR = (0.05, 0.25, 0.5, 0.75, 0.95)  # share of the structure that is farther from a target
METRICS = 3  # D99, D95, D1 of a target; D0.1cc and the mean of an organ, and one unused
TARGET_SHARES = (0.01, 0.05, 0.99)
HOT_MM3 = 100.0
NEIGHBOUR_MM = 5.0
SURFACE_MM = 15.0
HOTTEST = 0.02  # of the structure, and no less than HOT_MM3
COLDEST = 0.05  # of a target
WARM = 0.1  # of an organ's part outside the targets
SHELLS_MM = (0.0, 5.0, 10.0, 20.0, 40.0, 49.0)  # from the targets


class StructureFigures(NamedTuple):
    """What is known of a patient's structures before the estimate.

    Args:
        values: ``(S, F)``, nan where a structure is absent.
        first: ``(S, 3)`` metrics of the first guess, from which the estimate departs: the plan prior's, or those of
            the dose that was predicted.
    """

    values: Tensor
    first: Tensor


class DvhFigures:
    """Figures of all structures of a patient, in groups.

    Of the structure: ``plan`` (quantiles and mean of the plan prior's dose), ``trade_offs`` (how other plans depart),
    ``distances`` (size; quantiles of the distances to the targets), ``overlaps``, ``place`` (relative to the targets),
    ``beams`` (mean dose of each), ``ct`` (mean), ``nearby`` (metrics of the plan prior's dose over 5 mm, less those of
    its dose) and ``nearby_trade_offs``, ``hot`` and ``cold`` (means of the plans, of the plans over 5 mm and of the
    body over 5 and 15 mm), ``dose`` (metrics of the predicted dose, less the plan prior's). Of the others:
    ``others_plan``, ``others_dose``, ``others_present``. Of the patient: ``shells`` and ``context``.

    Args:
        spatial_channels, context_channels: names of what is given.
        organs, targets: structures, each with a channel ``sdm_...``; those without are left out.
        sees_dose: whether a predicted dose is given too; the first guess is then its metrics.

    Raises:
        CaseError: a channel that is missing.
    """

    def __init__(self, spatial_channels: Sequence[str], context_channels: Sequence[str], organs: Sequence[str] = ORGANS,
                 targets: Sequence[str] = TARGETS, sees_dose: bool = False) -> None:
        spatial, context = list(spatial_channels), list(context_channels)
        missing = [n for n in ("plan_prior", "body") if n not in spatial] + [n for n in SPACING if n not in context]
        if missing or not any(f"sdm_{name}" in spatial for name in targets):
            missing = missing or [f"sdm_{name}" for name in targets]
            raise CaseError(f"DVH estimate: channels {missing} are missing; found {spatial} and {context}")
        self.names = [name for name in (*targets, *organs) if f"sdm_{name}" in spatial]
        self.targets = [name in targets for name in self.names]
        self.structures = [spatial.index(f"sdm_{name}") for name in self.names]
        self.to_targets = [i for i, is_target in zip(self.structures, self.targets) if is_target]
        self.plans = [spatial.index(name) for name in PLANS if name in spatial]
        self.beams = beam_channels(spatial)
        self.ct = [spatial.index("ct")] if "ct" in spatial else []
        self.body = spatial.index("body")
        self.spacing = [context.index(name) for name in SPACING]
        self.sees_dose = sees_dose
        self.sizes = self._group_sizes(len(context))

    def _group_sizes(self, n_context: int) -> dict[str, int]:
        """Size of each group of a structure's figures, in their order; absent groups are left out."""
        count, plans, beams, targets = len(self.names), len(self.plans), len(self.beams), len(self.to_targets)
        own = {
            "plan": len(VOLUMES) + 1, "trade_offs": (plans - 1) * (len(VOLUMES) + 1),
            "distances": 1 + len(NEAR) * targets, "overlaps": count, "place": 5, "beams": 2 * beams, "ct": len(self.ct),
            "nearby": METRICS, "nearby_trade_offs": METRICS * (plans - 1), "hot": 2 * plans + 2, "cold": 2 * plans + 2,
            "dose": METRICS * self.sees_dose,
        }  # fmt: skip
        others = {"others_plan": 3 * count, "others_dose": METRICS * count * self.sees_dose, "others_present": count,
                  "shells": (len(SHELLS_MM) - 1) * plans, "context": n_context}
        return {name: size for name, size in {**own, **others}.items() if size}

    def masks(self, spatial: Tensor) -> list[Tensor]:
        """``(X, Y, Z)`` boolean of each structure, inside the body."""
        body = spatial[self.body] > 0
        return [(spatial[i] > 0) & body for i in self.structures]

    def metrics(self, dose: Tensor, spatial: Tensor, context: Tensor) -> Tensor:
        """Metrics ``(S, 3)`` of a dose ``(X, Y, Z)``: D99, D95, D1 of targets, D0.1cc, mean and nothing of organs."""
        voxels = self.hot_voxels(context)
        return torch.stack([dvh_metrics(dose[mask], voxels, is_target)
                            for mask, is_target in zip(self.masks(spatial), self.targets)])  # fmt: skip

    def hot_voxels(self, context: Tensor) -> Tensor:
        """Voxels in 0.1 cc, at least one, as OpenKBP counts them."""
        edges_mm = SPACING_UNIT_MM * context[self.spacing].float()
        return (HOT_MM3 / edges_mm.prod()).round().clamp_min(1)

    @torch.no_grad()
    def __call__(self, spatial: Tensor, context: Tensor, dose: Tensor | None = None) -> StructureFigures:
        """Figures of all structures.

        Args:
            spatial: ``(n, X, Y, Z)``.
            context: ``(m,)``.
            dose: ``(X, Y, Z)`` that was predicted, a fraction of the highest prescription; for ``sees_dose`` alone.
        """
        if self.sees_dose and dose is None:
            raise CaseError("DVH estimate: it departs from a predicted dose (sees_dose) and was given none")
        with torch.autocast(spatial.device.type, enabled=False):
            return self._figures(spatial.float(), context.float(), None if dose is None else dose.float())

    def _figures(self, spatial: Tensor, context: Tensor, dose: Tensor | None) -> StructureFigures:
        masks = self.masks(spatial)
        sizes = [len(self.plans), len(self.to_targets), len(self.beams), len(self.ct)]
        rows = spatial.flatten(1)[[*self.plans, *self.to_targets, *self.beams, *self.ct]]
        edges_mm = SPACING_UNIT_MM * context[self.spacing]
        axes = [torch.arange(n, device=spatial.device) * e / PLACE_UNIT_MM for n, e in zip(spatial.shape[1:], edges_mm)]
        voxels = self.hot_voxels(context)
        treated = torch.stack([m for m, is_target in zip(masks, self.targets) if is_target]).any(0)
        zero, treated_ends = _place(treated, axes)
        regions = _Regions(self, spatial, edges_mm, treated, voxels)
        own, brief, first = [], [], []
        for mask, is_target in zip(masks, self.targets):
            count = mask.sum()
            gone = torch.where(count > 0, 0.0, torch.nan)
            plans, distances, beams, ct = rows[:, mask.flatten()].split(sizes)
            doses = torch.cat([_quantiles(plans, VOLUMES), mean_of(plans)[:, None]], dim=1)  # (plans, V + 1)
            trade_offs = doses[1:] - doses[:1]
            size = torch.log(count.clamp_min(1) * edges_mm.prod() / 1e3)[None]
            near = _quantiles(distances, NEAR).flatten()
            overlaps = torch.stack([(mask & other).sum() / count.clamp_min(1) for other in masks])
            centre, ends = _place(mask, axes)
            place = torch.cat([centre - zero, ends - treated_ends])
            shares = mean_of(beams)
            metrics = dvh_metrics(plans[0], voxels, is_target)
            departure = [dvh_metrics(dose[mask], voxels, is_target) - metrics] if self.sees_dose else []
            parts = [doses[0], trade_offs.flatten(), size, near, overlaps, place,
                     shares / shares.sum().clamp_min(1e-3), shares, mean_of(ct),
                     *regions.of(mask, is_target), *departure]
            own.append(torch.cat(parts) + gone)
            brief.append([doses[0, [0, 3, -1]], *departure, 1 + gone])
            first.append(sum(departure, metrics))
        present = torch.stack([b[-1] for b in brief])
        others = [torch.stack([b[k] + b[-1][..., None] - 1 for b in brief]) for k in range(len(brief[0]) - 1)]
        shells = regions.shells()
        values = []
        for s, mine in enumerate(own):
            hidden = torch.zeros(len(own), 1, device=spatial.device)
            hidden[s] = torch.nan  # what is its own is among its own figures
            seen = [(o + hidden).flatten() for o in others]
            values.append(torch.cat([mine, *seen, torch.nan_to_num(present), shells, context]))
        return StructureFigures(torch.stack(values), torch.stack(first))


class _Regions:
    """Doses of the plans over neighbourhoods, in parts of structures, and in shells around the targets."""

    def __init__(self, known: DvhFigures, spatial: Tensor, edges_mm: Tensor, treated: Tensor,
                 hot_voxels: Tensor) -> None:
        self.treated, self.hot_voxels = treated, hot_voxels
        self.plans = spatial[known.plans]
        self.nearby = gaussian_means(self.plans, NEIGHBOUR_MM, edges_mm)
        surface = [gaussian_means(spatial[[known.body]], scale, edges_mm) for scale in (NEIGHBOUR_MM, SURFACE_MM)]
        self.doses = torch.cat([self.plans, self.nearby, *surface])
        self.distances = spatial[known.to_targets]
        self.around = (spatial[known.body] > 0) & ~treated

    def of(self, mask: Tensor, is_target: bool) -> list[Tensor]:
        """Figures of a structure, in the order of their groups."""
        nearby, *trade_offs = (dvh_metrics(dose[mask], self.hot_voxels, is_target) for dose in self.nearby)
        plan = dvh_metrics(self.plans[0][mask], self.hot_voxels, is_target)
        cold = mask & (self.plans[0] <= self._quantile(mask, COLDEST))
        cold = cold if is_target else self._hottest(mask & ~self.treated, WARM)
        hot = self._hottest(mask, HOTTEST)
        return [nearby - plan, *(m - nearby for m in trade_offs), *(mean_of(self.doses[:, m]) for m in (hot, cold))]

    def shells(self) -> Tensor:
        """Mean dose of the plans in shells around the targets: the first plan's, then how the others depart."""
        away = -DISTANCE_UNIT_MM * self.distances.amax(0)
        means = [mean_of(self.plans[:, self.around & (away > low) & (away <= high)])
                 for low, high in zip(SHELLS_MM[:-1], SHELLS_MM[1:])]  # fmt: skip
        doses = torch.stack(means, dim=1)
        return torch.cat([doses[0], (doses[1:] - doses[:1]).flatten()])

    def _hottest(self, mask: Tensor, share: float) -> Tensor:
        top = torch.maximum(self.hot_voxels / mask.sum().clamp_min(1), torch.full_like(self.hot_voxels, share))
        return mask & (self.plans[0] >= self._quantile(mask, (1 - top).clamp_min(0)))

    def _quantile(self, mask: Tensor, share: float | Tensor) -> Tensor:
        """Of the first plan's dose."""
        return _quantiles(self.plans[0][mask][None], share[None] if isinstance(share, Tensor) else [share])[0, 0]


def dvh_metrics(values: Tensor, hot_voxels: Tensor, is_target: bool) -> Tensor:
    """The three metrics of a structure's voxels ``(N,)``; OpenKBP's percentile rules."""
    if is_target:
        return _quantiles(values[None], TARGET_SHARES)[0]
    count = torch.ones_like(values).sum().clamp_min(1)
    top = _quantiles(values[None], (1 - hot_voxels / count).clamp_min(0)[None])[0, 0]
    mean = mean_of(values[None])[0]
    return torch.stack([top, mean, torch.zeros_like(mean)])


def _quantiles(values: Tensor, shares: Sequence[float] | Tensor) -> Tensor:
    """Quantiles ``(C, Q)`` along ``values`` (C, N); zero where N is 0 (a trace knows no branches)."""
    ordered = values.sort(dim=1).values
    last = (torch.ones_like(values[0]).sum() - 1).clamp_min(0)
    at = (shares if isinstance(shares, Tensor) else torch.tensor(shares, device=values.device)) * last
    ordered = torch.cat([ordered, ordered.new_zeros(len(values), 1)], dim=1)
    low = at.floor().long()
    high = at.ceil().long()
    return torch.lerp(ordered[:, low], ordered[:, high], (at - low)[None])


def mean_of(values: Tensor) -> Tensor:
    """Mean ``(C,)`` along ``values`` (C, N); zero where N is 0."""
    return values.sum(1) / torch.ones_like(values).sum(1).clamp_min(1)


def _place(mask: Tensor, axes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Centre ``(3,)`` of a mask and its ends along the third axis ``(2,)``, in units of 50 mm."""
    count = mask.sum().clamp_min(1)
    sums = [mask.sum(dim=[d for d in range(3) if d != axis]) for axis in range(3)]
    centre = torch.stack([(s * a).sum() / count for s, a in zip(sums, axes)])
    along = sums[2] > 0
    low = torch.where(along, axes[2], axes[2].max()).min()
    high = torch.where(along, axes[2], axes[2].min()).max()
    return centre, torch.stack([low, high])
