"""The broad part of the dose: what a voxel gets by where it lies in the patient, by perceptrons at half resolution.

A U-Net in windows of a quarter of a metre errs on a large scale: averaged over blocks of 60 x 60 x 40 mm, half of its
error is still there, since how much dose each beam carries is decided by the whole patient. A perceptron for each voxel
sees that: the three plans, blurred over up to 25 mm, the voxel's place relative to the targets, and means over the
patient. What both say is averaged at half resolution. Asked about single voxels the perceptrons know what is finer
than a block better than the U-Net, even taught by blocks alone, and the mean of both is better still.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from custom.case import CaseError
from custom.networks.beams import beam_channels, corrected_beams
from custom.networks.neighbourhoods import gaussian_means, slopes

__all__ = ["BroadBranch", "BroadVoxels", "PerceptronEnsemble", "mean_of_blocks", "spread_means"]

WANTED = ("plan_prior", "prescription", "body")
SPACING = ("spacing_x", "spacing_y", "spacing_z")
SPACING_UNIT_MM = 4.0  # of the context's spacing_x, ...
PLACE_UNIT_MM = 50.0
SLOPED = (  # each a sum of channels
    {"plan_prior": 1.0},
    {"prescription": 1.0},
    {"plan_prior_coverage": 1.0, "plan_prior_sparing": -1.0},
    {"beam_low": 1.0},
)
FAR = 1e3  # in that unit, where there are no targets
HALF = 0.5  # of the highest prescription: a voxel above it belongs to the targets
HIGHEST = 0.95
TURNS = (1, 2, 3, 9)  # of the angle around the targets; 9 for nine beams
INSIDE = 0.3  # share of a block within the body from which on it counts
AT_ONCE = 2048  # voxels that pass the perceptrons together, few enough for a processor's cache
ALL = slice(None)  # members
RANGE = 4.0  # standard deviations to which a patient's figures are cut


class BroadVoxels(NamedTuple):
    """One patient at half resolution, or (blocks of one voxel) at the full one.

    Args:
        voxels: ``(N, F)`` features of the blocks inside the body.
        patient: ``(P,)`` features of the patient.
        inside: ``(X/2, Y/2, Z/2)`` boolean, where the N blocks lie, in C order.
        body: ``(X/2, Y/2, Z/2)`` share of each block that is body.
        plan: ``(X/2, Y/2, Z/2)`` plan prior, mean over the block.
    """

    voxels: Tensor
    patient: Tensor
    inside: Tensor
    body: Tensor
    plan: Tensor


class BroadBranch(nn.Module):
    """Mean dose of blocks of 2 x 2 x 2 voxels over the whole patient, and how it enters the dose of a U-Net.

    Until :meth:`begin` is told otherwise its share is zero, so that an untrained branch changes nothing. In the targets
    blocks have none: there the dose is told by its extremes (D95, D1), which a mean absolute error rounds off.

    Args:
        spatial_channels, context_channels: names of what :meth:`features` gets; ``plan_prior``, ``prescription``,
            ``body`` and the three ``spacing_`` must be among them.
        blurred: channels that are also given as means over a neighbourhood; absent ones are left out.
        scales_mm: standard deviations of these neighbourhoods (Gaussian).
        beam_scales_mm: the same for the dose of each beam.
        slope_scales_mm: which of ``scales_mm`` also give the slopes of four means (``SLOPED``) along the three axes.
        width, depth, members, patient_width, patient_dropout: see :class:`PerceptronEnsemble`.
        fine_members: so many of the members, evenly chosen, also tell the dose of single voxels; it is mixed with the
            U-Net's before the blocks' means are set. 0 leaves what is finer than a block to the U-Net.
        fine_share, target_share: of that dose, beside the targets and in them (there in all of the dose).

    Raises:
        CaseError: a channel that is missing, or more fine members than there are.
    """

    taken_whole = True  # its share without its perceptrons would spoil the dose (custom.networks.growth)

    def __init__(
        self,
        spatial_channels: Sequence[str],
        context_channels: Sequence[str],
        blurred: Sequence[str] = (
            "plan_prior", "plan_prior_coverage", "plan_prior_sparing", "beam_high", "beam_low", "prescription",
            "body", "ct",
        ),
        scales_mm: Sequence[float] = (12.0, 25.0, 5.0),
        beam_scales_mm: Sequence[float] = (),
        slope_scales_mm: Sequence[float] = (),
        width: int = 160,
        depth: int = 3,
        members: int = 6,
        patient_width: int = 48,
        patient_dropout: float = 0.1,
        fine_members: int = 0,
        fine_share: float = 0.5,
        target_share: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= fine_members <= members:
            raise CaseError(f"broad branch: fine_members {fine_members}; expected 0 to the {members} members")
        step = members // fine_members if fine_members else 1
        self.fine_members = slice(0, step * fine_members, step) if fine_members else None
        self.fine_share, self.target_share = fine_share, target_share
        spatial, context = list(spatial_channels), list(context_channels)
        missing = [n for n in WANTED if n not in spatial] + [n for n in SPACING if n not in context]
        if missing:
            raise CaseError(f"broad branch: channels {missing} are missing; found {spatial} and {context}")
        self.plan, self.prescription, self.body = (spatial.index(name) for name in WANTED)
        self.spacing = [context.index(name) for name in SPACING]
        self.blurred = [spatial.index(name) for name in blurred if name in spatial]
        self.beams = beam_channels(spatial)  # the first features of a voxel are the spatial channels
        self.scales_mm, self.spatial_channels = tuple(scales_mm), len(spatial)
        self.beam_scales_mm, self.slope_scales_mm = tuple(beam_scales_mm), tuple(slope_scales_mm)
        apart = sorted(set(self.slope_scales_mm) - set(self.scales_mm))
        if apart:
            raise CaseError(f"broad branch: slope_scales_mm {apart} are not among scales_mm {list(scales_mm)}")
        self.sloped = _sloped([name for name in blurred if name in spatial]) if self.slope_scales_mm else None
        self.structures = [i for i, name in enumerate(spatial) if name.startswith("sdm_")] if self.beams else []
        places = 6 + 2 * len(TURNS) + 3
        self.averaged = len(spatial) + len(self.blurred) * len(self.scales_mm) + places  # over the patient
        voxel_features = self.averaged + len(self.beams) * len(self.beam_scales_mm)
        voxel_features += 3 * len(SLOPED) * len(self.slope_scales_mm)
        patient_features = len(context) + self.averaged + len(self.beams) * len(self.structures)
        for name, size in (("voxel", voxel_features), ("patient", patient_features)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.register_buffer("share", torch.zeros(()))
        self.perceptrons = PerceptronEnsemble(
            voxel_features, patient_features, 1 + len(self.beams), width, depth, members, patient_width, patient_dropout
        )

    @torch.no_grad()
    def features(self, spatial: Tensor, context: Tensor, edge_voxels: int = 2) -> BroadVoxels:
        """What the perceptrons see of one patient.

        Args:
            spatial: ``(n, X, Y, Z)``.
            context: ``(m,)``.
            edge_voxels: of a block; 1 for the voxels themselves.
        """
        with torch.autocast(spatial.device.type, enabled=False):  # places and kernels want more digits than bfloat16's
            spatial, context = mean_of_blocks(spatial.float(), edge_voxels), context.float()
            body = spatial[self.body]
            inside = body > INSIDE
            edges_mm = edge_voxels * SPACING_UNIT_MM * context[self.spacing]
            means = {scale: gaussian_means(spatial[self.blurred], scale, edges_mm) for scale in self.scales_mm}
            rows = [spatial, *means.values(), _places(spatial[self.prescription], body, edges_mm)]
            rows += [gaussian_means(spatial[self.beams], scale, edges_mm) for scale in self.beam_scales_mm]
            rows += [slopes(torch.einsum("sc,cxyz->sxyz", self.sloped.to(spatial), means[scale]), edges_mm)
                     for scale in self.slope_scales_mm]  # fmt: skip
            voxels = torch.cat([part[:, inside] for part in rows]).T
            within = (voxels[:, self.structures] > 0).float()
            in_structures = voxels[:, self.beams].T @ within / within.sum(0).clamp_min(1)
            patient = torch.cat([context, voxels[:, : self.averaged].mean(0), in_structures.flatten()])
        return BroadVoxels(voxels, patient, inside, body, spatial[self.plan])

    def begin(self, patients: Iterable[tuple[Tensor, Tensor]], share: float) -> None:
        """Take the features' scale from patients, and from now on this share in the dose.

        Args:
            patients: ``(voxels, patient)`` of :class:`BroadVoxels` each.
            share: of this branch in the mean over a block; the U-Net has the rest.

        Raises:
            CaseError: no patients, or a share outside 0 to 1.
        """
        found = [(v.float().mean(0), v.float().std(0), p.float()) for v, p in patients]
        if len(found) < 2 or not 0 <= share <= 1:
            raise CaseError(f"broad branch: {len(found)} patients, share {share}; expected two or more and 0 to 1")
        means, spreads, patient = (torch.stack(part) for part in zip(*found))
        self.voxel_mean.copy_(means.mean(0))
        self.voxel_std.copy_(_spread(spreads.mean(0)))
        self.patient_mean.copy_(patient.mean(0))
        self.patient_std.copy_(_spread(patient.std(0)))
        self.share.fill_(share)

    def forward(self, voxels: Tensor, patient: Tensor, members: slice = ALL) -> Tensor:
        """Each member's correction of the plan prior ``(M, B, V)``, for ``voxels`` (B, V, F), ``patient`` (B, P)."""
        beams = voxels[..., self.beams].float()
        voxels = (voxels.float() - self.voxel_mean) / self.voxel_std
        patient = ((patient.float() - self.patient_mean) / self.patient_std).clamp(-RANGE, RANGE)
        output = self.perceptrons(voxels, patient, members)
        return output[..., 0] + corrected_beams(output[..., 1:].float(), beams, dim=-1)

    def places_voxels(self, voxels: Tensor, patient: Tensor) -> Tensor:
        """Where blocks lie, ``(B, V, 3)`` in voxels of full resolution, of ``voxels`` (B, V, F), ``patient`` (B, P)."""
        first = len(self.blurred) * len(self.scales_mm) + self.spatial_channels
        return voxels[..., first : first + 3] * PLACE_UNIT_MM / (SPACING_UNIT_MM * patient[:, None, self.spacing])

    def blend(self, dose: Tensor, spatial: Tensor, context: Tensor) -> Tensor:
        """The dose with this branch's share in the mean over each block.

        Args:
            dose: ``(B, 1, X, Y, Z)``, zero outside the body.
            spatial: ``(B, n, X, Y, Z)``.
            context: ``(B, m)``.
        """
        if self.share == 0:
            return dose
        mixed = [self._blend(*item) for item in zip(dose[:, 0].float(), spatial, context)]
        return torch.stack(mixed)[:, None]

    def told(self, spatial: Tensor, context: Tensor, where: Tensor) -> Tensor:
        """Dose of single voxels ``(X, Y, Z)`` by all members, without any U-Net; nought where not asked.

        Args:
            spatial: ``(n, X, Y, Z)``.
            context: ``(m,)``.
            where: ``(X, Y, Z)`` boolean.
        """
        seen, patient = self.features(spatial, context, edge_voxels=1), self.features(spatial, context).patient
        asked = seen._replace(voxels=seen.voxels[where[seen.inside]], inside=seen.inside & where)
        return self._dose(asked, patient, ALL).clamp_min(0)

    def _blend(self, dose: Tensor, spatial: Tensor, context: Tensor) -> Tensor:
        seen = self.features(spatial, context)
        body, targets = spatial[[self.body]], (spatial[[self.prescription]] > HALF).to(dose.dtype)
        mean = mean_of_blocks(dose[None])[0]
        goal = torch.lerp(mean, self._dose(seen, seen.patient, ALL), self.share)
        if self.fine_members is not None:
            fine = self._dose(self.features(spatial, context, edge_voxels=1), seen.patient, self.fine_members)
            dose = torch.lerp(dose, fine, self.fine_share + (self.target_share - self.fine_share) * targets[0])
            mean = mean_of_blocks(dose[None])[0]
        change = torch.where(seen.inside, goal - mean, torch.zeros_like(mean))
        return (dose + spread_means(change[None], body, targets)[0]).clamp_min(0) * body[0]

    def _dose(self, seen: BroadVoxels, patient: Tensor, members: slice) -> Tensor:
        """Mean dose of these members, ``(X/2, Y/2, Z/2)`` or ``(X, Y, Z)``; nought outside the body."""
        whole = torch.jit.is_tracing() or not len(seen.voxels)  # a trace would keep the number of parts
        parts = [seen.voxels] if whole else seen.voxels.split(AT_ONCE)
        correction = torch.cat([self(part[None], patient[None], members).float().mean(0)[0] for part in parts])
        dose = torch.zeros_like(seen.plan)
        dose[seen.inside] = seen.plan[seen.inside] + correction
        return dose


class PerceptronEnsemble(nn.Module):
    """Residual perceptrons side by side: a voxel's features, scaled and shifted by what the patient's say.

    The patient's features pass a narrow layer with dropout, since there are as many of them as patients.

    Args:
        voxel_features, patient_features: inputs.
        outputs: of each member for each voxel.
        width, depth: of the layers behind the first one, and how many.
        members: perceptrons, which differ in their start and their dropout.
        patient_width: of the patient's layer.
        patient_dropout: share of it that is left out in training.
    """

    def __init__(
        self, voxel_features: int, patient_features: int, outputs: int, width: int, depth: int, members: int,
        patient_width: int, patient_dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width = width
        self.first = _Linears(members, voxel_features, width)
        self.patient = _Linears(members, patient_features, patient_width)
        self.dropout = nn.Dropout(patient_dropout)
        self.film = _Linears(members, patient_width, 2 * width)
        self.hidden = nn.ModuleList(_Linears(members, width, width) for _ in range(depth))
        self.last = _Linears(members, width, outputs)
        nn.init.zeros_(self.last.weight)

    def forward(self, voxels: Tensor, patient: Tensor, members: slice = ALL) -> Tensor:
        """``(M, B, V, outputs)`` of ``voxels`` (B, V, F) and ``patient`` (B, P), of these members."""
        batch, count = voxels.shape[:2]
        told = self.dropout(F.silu(self.patient(patient, members)))
        scale, shift = self.film(told, members)[:, :, None].chunk(2, dim=-1)  # (M, B, 1, width)
        x = self.first(voxels.flatten(0, 1), members).unflatten(1, (batch, count))
        x = F.silu(torch.addcmul(shift, x, 1 + scale)).flatten(1, 2)
        for layer in self.hidden:
            x = x + F.silu(layer(F.layer_norm(x, (self.width,)), members))
        return self.last(x, members).unflatten(1, (batch, count))


class _Linears(nn.Module):
    """Linear layers side by side: ``(R, in)``, or ``(M, R, in)`` with rows of each one's own, to ``(M, R, out)``."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        limit = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-limit, limit))

    def forward(self, x: Tensor, members: slice) -> Tensor:
        return torch.matmul(x, self.weight[members]) + self.bias[members]


def _spread(std: Tensor) -> Tensor:
    """Divisors of the features; one that is the same in all patients says nothing of another where it is not."""
    return torch.where(std > 1e-4, std + 1e-3, torch.full_like(std, 1e4))


def mean_of_blocks(x: Tensor, edge_voxels: int = 2) -> Tensor:
    """Means over blocks of 2 x 2 x 2 voxels (or another edge) of ``(C, X, Y, Z)``; outside it counts as zero."""
    i, j, k = (-n % edge_voxels for n in x.shape[1:])
    return F.avg_pool3d(F.pad(x[None], (0, k, 0, j, 0, i)), edge_voxels)[0]


def spread_means(means: Tensor, body: Tensor, targets: Tensor) -> Tensor:
    """Change of each voxel beside the targets that the blocks' means ask for, smooth from block to block.

    Trilinear between the blocks' centres: a change that all neighbours share arrives whole, one of a single block less.

    Args:
        means: changes of :func:`mean_of_blocks`, ``(C, X/2, Y/2, Z/2)``, rounded up.
        body, targets: ``(C, X, Y, Z)``; blocks with less than three tenths of body ask for nothing.
    """
    inside, high = mean_of_blocks(body), mean_of_blocks(targets)
    rate = torch.where(inside > INSIDE, (1 - high) / inside.clamp_min(INSIDE), torch.zeros_like(inside))
    wide = F.interpolate((rate * means)[:, None], scale_factor=2.0, mode="trilinear", align_corners=False)[:, 0]
    i, j, k = body.shape[1:]
    return (1 - targets) * wide[:, :i, :j, :k]  # also of what blocks beside the targets pass on


def _sloped(names: Sequence[str]) -> Tensor:
    """``(S, C)``: each of ``SLOPED`` as a sum of the blurred channels, which have these names.

    Raises:
        CaseError: a channel that is not among them.
    """
    missing = sorted({name for parts in SLOPED for name in parts} - set(names))
    if missing:
        raise CaseError(f"broad branch: slopes want the channels {missing} among `blurred`; found {list(names)}")
    return torch.tensor([[parts.get(name, 0.0) for name in names] for parts in SLOPED])


def _places(prescription: Tensor, body: Tensor, edges_mm: Tensor) -> Tensor:
    """Where each block lies relative to the targets, ``(C, X, Y, Z)``, in units of 50 mm; angles as sine and cosine."""
    axes = [torch.arange(n, device=body.device) * edge / PLACE_UNIT_MM for n, edge in zip(body.shape, edges_mm)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    targets = (prescription > HALF) * body
    highest = (prescription > HIGHEST) * body
    out = []
    for mask in (targets, torch.where(highest.sum() > 0, highest, targets)):
        centre = (grid * mask).sum((1, 2, 3)) / mask.sum().clamp_min(1e-6)
        out += list(grid - centre[:, None, None, None])
    angle = torch.atan2(out[1], out[0])
    for turns in TURNS:
        out += [torch.cos(turns * angle), torch.sin(turns * angle)]
    out.append(torch.hypot(out[0], out[1]))
    along = targets.amax((0, 1)) > 0
    low, high = torch.where(along, axes[2], FAR).min(), torch.where(along, axes[2], -FAR).max()
    out += [(axes[2] - low).expand_as(body), (high - axes[2]).expand_as(body)]
    return torch.stack(out)
