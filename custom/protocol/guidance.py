"""Steer a prediction toward the protocol while it is sampled, without retraining.

Every row but a mean says: this share of the structure may lie above (or must reach) that dose. As in plan optimisation
(Wu and Mohan, Med Phys 27, 2000), the voxels that break it are those beyond the share that lie on the wrong side of the
dose, and what is missing in each is its excess ``E``. The dose changes by ``-E`` smoothed with a Gaussian of about a
penumbra's width, scaled so that ``sum E^2`` would fall to zero to first order: in patches that beams could deliver,
not in single voxels. In sampling of several steps the denoiser sees the moved dose and fits the rest to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.networks.layers import GaussianFilter
from torch import Tensor

from custom.case import BODY, CaseError
from custom.dosimetry.constraints import load_constraints
from custom.protocol.conditions import case_from_conditions
from custom.protocol.loss import ActiveRow, active_rows, select_rows

__all__ = ["Guidance", "Protocol", "excess_gy", "guide_dose"]

TRUNCATED = 3.0  # widths at which the smoothing ends
AIM_INSIDE = 0.003  # share of a limit by which the dose aims inside it, so that it ends on the right side


@dataclass(frozen=True)
class Protocol:
    """What guiding one patient needs, made once a volume.

    Args:
        rows: active rows, the least important first, so that the important ones have the last word.
        boxes: for each row the box its change stays in.
        body: ``(X, Y, Z)`` boolean.
        smooth: Gaussian on ``(1, 1, X, Y, Z)``.
        gy: dose of 1.0 in the network's unit.
    """

    rows: list[ActiveRow]
    boxes: list[tuple[slice, slice, slice]]
    body: Tensor
    smooth: torch.nn.Module
    gy: float


class Guidance:
    """Moves doses toward the limits they miss.

    Args:
        condition_channels: name of every channel of the image.
        strength: share of each miss that is taken away at every sweep, times the row's weight; 0 is off, 1 the most.
        constraints: file with the rows; None for the bundle's ``constraints.json``.
        structures: only rows on these structures, as ``["SpinalCord"]``; None for all.
        sweeps: rounds over the rows at every step of the sampling.
        smooth_mm: width (sigma) of the smoothing.
        most_gy: largest change of a voxel by one row in one sweep.

    Raises:
        CaseError: for a strength outside 0 to 1, or constraints that cannot be read.
    """

    def __init__(
        self,
        condition_channels: Sequence[str],
        strength: float = 0.0,
        constraints: str | Path | None = None,
        structures: Sequence[str] | None = None,
        sweeps: int = 4,
        smooth_mm: float = 6.0,
        most_gy: float = 5.0,
    ) -> None:
        if not 0 <= strength <= 1:
            raise CaseError(f"guidance: strength {strength}; expected 0 (off) to 1")
        self.names, self.strength = list(condition_channels), float(strength)
        self.constraints = select_rows(load_constraints(constraints), structures)
        self.sweeps, self.smooth_mm, self.most_gy = sweeps, smooth_mm, most_gy

    def protocols(self, image: Tensor) -> list[Protocol]:
        """One a patient, from the whole volume's image ``(B, C, X, Y, Z)``."""
        return [self._protocol(one) for one in image]

    def __call__(self, dose: Tensor, protocols: Sequence[Protocol]) -> Tensor:
        """The moved dose ``(B, 1, X, Y, Z)``, in the network's unit like the one that comes in."""
        with torch.autocast(dose.device.type, enabled=False):
            moved = [self._one(d, p) for d, p in zip(dose[:, 0].float(), protocols, strict=True)]
        return torch.stack(moved)[:, None].to(dose.dtype)

    def _one(self, dose: Tensor, protocol: Protocol) -> Tensor:
        start_gy = dose_gy = dose * protocol.gy
        for _ in range(self.sweeps):
            dose_gy = guide_dose(dose_gy, protocol, self.strength, self.most_gy)
        return dose + (dose_gy - start_gy) / protocol.gy  # what is not moved keeps its bits

    def _protocol(self, image: Tensor) -> Protocol:
        case = case_from_conditions(image.detach().float().cpu().numpy(), self.names)
        rows = active_rows(self.constraints, case, image.device)
        rows.sort(key=lambda row: row.constraint.weight)
        sigma = self.smooth_mm / case.grid.spacing_mm
        reach = np.ceil(TRUNCATED * sigma).astype(int)
        boxes = [_box(row.voxels.cpu().numpy(), case.grid.shape, reach) for row in rows]
        smooth = GaussianFilter(3, sigma.tolist(), truncated=TRUNCATED, approx="sampled").to(image.device)
        body = torch.from_numpy(case.masks[BODY]).to(image.device)
        return Protocol(rows, boxes, body, smooth, case.highest_prescription_gy)


def guide_dose(dose_gy: Tensor, protocol: Protocol, strength: float, most_gy: float = 5.0) -> Tensor:
    """One sweep over the rows that are missed.

    With the excess ``E`` of a row and the smoothing ``K`` the change is ``-(E' E / E' K E) K E``, the step to the
    minimum of ``E' E`` along the direction that is steepest in the norm of ``K^-1``.

    Args:
        dose_gy: ``(X, Y, Z)``.
        protocol: the patient's.
        strength: share of the excess that is taken away, times the row's weight.
        most_gy: largest change of a voxel by one row.

    Returns:
        ``(X, Y, Z)``, not negative, unchanged outside the body.
    """
    dose_gy = dose_gy.detach().clone()
    nearest = _nearest_of_groups(dose_gy, protocol.rows)
    for row, box in zip(protocol.rows, protocol.boxes, strict=True):
        if nearest.get(row.constraint.any_of, row) is not row:
            continue
        excess = excess_gy(row, dose_gy.reshape(-1)[row.voxels])
        if not excess.any():
            continue
        volume = torch.zeros_like(dose_gy)
        volume.view(-1)[row.voxels] = excess
        direction = protocol.smooth(volume[box][None, None])[0, 0] * protocol.body[box]
        gain = float((volume[box] * direction).sum())
        if not gain > 0:  # a structure outside the body
            continue
        change = strength * row.constraint.weight * float(excess.square().sum()) / gain * direction
        change *= min(1.0, most_gy / max(float(change.max()), 1e-9))
        dose_gy[box] += -change if row.constraint.at_most else change
        dose_gy.clamp_(min=0)
    return dose_gy


def excess_gy(row: ActiveRow, dose_gy: Tensor) -> Tensor:
    """How far each voxel ``(N,)`` of the structure lies on the wrong side, where it may not; zero for the others."""
    metric, sign = row.constraint.metric, 1.0 if row.constraint.at_most else -1.0
    if metric.kind == "V":
        at_gy = metric.at if metric.at_unit == "Gy" else metric.at / 100 * row.prescription_gy
        share = row.limit / 100 if metric.unit == "%" else row.limit / (dose_gy.numel() * row.voxel_cc)
    else:
        at_gy = row.limit if metric.unit == "Gy" else row.limit / 100 * row.prescription_gy
        share = {"Max": 0.0, "Min": 1.0}.get(metric.kind)
        if metric.kind == "D":
            share = metric.at / 100 if metric.at_unit == "%" else metric.at / (dose_gy.numel() * row.voxel_cc)
    at_gy *= 1 - sign * AIM_INSIDE
    if metric.kind == "Mean":
        return torch.relu(sign * (dose_gy.mean() - at_gy)).expand(dose_gy.numel())
    beyond = torch.relu(sign * (dose_gy - at_gy))
    # The hottest share may be as hot as it likes; of a lower limit it is the rest that may be cold.
    free = share if row.constraint.at_most else 1 - share
    count = min(int(free * dose_gy.numel() + 1e-6), dose_gy.numel())
    if count > 0:
        beyond[beyond.topk(count).indices] = 0
    return beyond


def _nearest_of_groups(dose_gy: Tensor, rows: Sequence[ActiveRow]) -> dict[str, ActiveRow]:
    """Of each ``any_of`` group the row that is met or nearest to it: one is enough."""
    nearest: dict[str, tuple[float, ActiveRow]] = {}
    for row in rows:
        group = row.constraint.any_of
        if group:
            missing = float(excess_gy(row, dose_gy.reshape(-1)[row.voxels]).mean())
            if group not in nearest or missing < nearest[group][0]:
                nearest[group] = missing, row
    return {group: row for group, (_, row) in nearest.items()}


def _box(voxels: np.ndarray, shape: Sequence[int], reach: np.ndarray) -> tuple[slice, slice, slice]:
    index = np.stack(np.unravel_index(voxels, tuple(shape)))
    low, high = index.min(1) - reach, index.max(1) + reach + 1
    return tuple(slice(max(a, 0), min(b, n)) for a, b, n in zip(low, high, shape))
