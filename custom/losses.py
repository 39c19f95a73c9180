"""Dose losses on tensors in units of the prescription; each is a mean per patient, then over the batch.

Shapes everywhere: ``pred`` and ``ref`` are ``(B, 1, X, Y, Z)``, ``mask`` is ``(B, 1, X, Y, Z)``, ``rois`` is
``(B, R, X, Y, Z)`` boolean or 0/1. A loss whose every region is empty is zero, and still has a gradient (of zero).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from custom.case import CaseError

__all__ = ["criteria_dvh_l1", "gradient_l1", "masked_l1", "percentile", "sorted_dvh_l1"]


def masked_l1(pred: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference inside ``mask``: with the possible dose mask, OpenKBP's dose score."""
    _same_size(pred, ref, mask)
    weight = (mask > 0).to(pred.dtype)
    axes = (1, 2, 3, 4)
    total = ((pred - ref).abs() * weight).sum(axes)
    return (total / weight.sum(axes).clamp_min(1)).mean()


def gradient_l1(pred: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference of the finite differences between neighbours that both lie inside ``mask``."""
    _same_size(pred, ref, mask)
    error, inside = pred - ref, mask > 0
    terms = []
    for axis in (2, 3, 4):
        n = error.shape[axis] - 1
        both = (inside.narrow(axis, 1, n) & inside.narrow(axis, 0, n)).to(error.dtype)
        step = (error.narrow(axis, 1, n) - error.narrow(axis, 0, n)).abs() * both
        terms.append(step.sum((1, 2, 3, 4)) / both.sum((1, 2, 3, 4)).clamp_min(1))
    return torch.stack(terms).mean()


def sorted_dvh_l1(pred: Tensor, ref: Tensor, rois: Tensor) -> Tensor:
    """Mean distance between the dose-volume histograms, ``mean |sort(pred) - sort(ref)|`` over each structure.

    This is the exact Wasserstein-1 distance of the two dose distributions of a structure, the area between its DVHs.
    """
    terms = [
        (sorted_pred - sorted_ref).abs().mean() for _, sorted_pred, sorted_ref in _sorted_rois(pred, ref, rois)
    ]
    return _mean_or_zero(terms, pred)


def criteria_dvh_l1(
    pred: Tensor, ref: Tensor, rois: Tensor, is_target: Sequence[bool], voxel_cc: Tensor | Sequence[float]
) -> Tensor:
    """Mean absolute difference of OpenKBP's DVH criteria: D1, D95, D99 of targets; D0.1cc and mean of other organs.

    Args:
        pred, ref, rois: see the module.
        is_target: for each of the R structures.
        voxel_cc: volume of one voxel in cm^3, a value a patient.

    Source: Babier et al., Med Phys 48 (2021) 5549, and the challenge's reference evaluation: ``numpy.percentile``, and
    for D0.1cc the percentile above which 0.1 cm^3 lie, rounded to whole voxels (at least one).
    """
    if len(is_target) != rois.shape[1]:
        raise CaseError(f"DVH loss: is_target has {len(is_target)} entries, rois {rois.shape[1]} channels")
    terms = []
    for (b, r), sorted_pred, sorted_ref in _sorted_rois(pred, ref, rois):
        if is_target[r]:
            terms += [(percentile(sorted_pred, q) - percentile(sorted_ref, q)).abs() for q in (1.0, 5.0, 99.0)]
            continue
        n = sorted_pred.numel()
        q = 100.0 - max(1.0, round(0.1 / float(voxel_cc[b]))) / n * 100.0
        q = max(q, 0.0)
        terms.append((percentile(sorted_pred, q) - percentile(sorted_ref, q)).abs())
        terms.append((sorted_pred.mean() - sorted_ref.mean()).abs())
    return _mean_or_zero(terms, pred)


def percentile(ascending: Tensor, q: float) -> Tensor:
    """``numpy.percentile(x, q)`` of values sorted in ascending order ``(N,)``, by linear interpolation."""
    position = (ascending.numel() - 1) * q / 100.0
    low = int(position)
    high = min(low + 1, ascending.numel() - 1)
    return torch.lerp(ascending[low], ascending[high], position - low)


def _sorted_rois(pred: Tensor, ref: Tensor, rois: Tensor) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """``(patient, structure)`` and the ascending doses in it, for every structure that is not empty."""
    _same_size(pred, ref, rois)
    for b in range(rois.shape[0]):
        flat_pred, flat_ref = pred[b].reshape(-1), ref[b].reshape(-1)
        for r in range(rois.shape[1]):
            index = (rois[b, r] > 0).reshape(-1).nonzero().squeeze(1)
            if index.numel():
                yield (b, r), flat_pred[index].sort().values, flat_ref[index].sort().values


def _mean_or_zero(terms: list[Tensor], pred: Tensor) -> Tensor:
    return torch.stack(terms).mean() if terms else (pred * 0).sum()


def _same_size(*tensors: Tensor) -> None:
    sizes = [(t.shape[0], *t.shape[2:]) for t in tensors]
    if any(t.ndim != 5 for t in tensors) or len(set(sizes)) > 1:
        found = [tuple(t.shape) for t in tensors]
        raise CaseError(f"loss: expected (B, C, X, Y, Z) tensors of one size, found {found}")
