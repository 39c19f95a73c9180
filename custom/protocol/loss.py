"""The constraint rows as a loss on the predicted clean dose (ADDiff-Dose section 2.3, L_cond)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from custom.case import Case, CaseError
from custom.dosimetry.constraints import ANY_SITE, Constraint, load_constraints
from custom.dosimetry.regions import regions
from custom.protocol.conditions import case_from_conditions
from custom.protocol.soft import Softness, soft_value

__all__ = ["ActiveRow", "ConstraintLoss", "active_rows", "protocol_loss"]


@dataclass(frozen=True)
class ActiveRow:
    """One row on one structure of one patient.

    Args:
        constraint: the row.
        structure: the structure's name.
        voxels: ``(N,)`` positions in the flattened volume.
        voxel_cc: volume of one voxel.
        prescription_gy: the structure's own, or the highest.
        limit: in the metric's unit.
    """

    constraint: Constraint
    structure: str
    voxels: Tensor
    voxel_cc: float
    prescription_gy: float
    limit: float


def active_rows(constraints: Sequence[Constraint], case: Case, device: torch.device | str = "cpu") -> list[ActiveRow]:
    """The rows that apply: of the case's site (or any), and with a structure that is there."""
    known: dict[str, list[tuple[str, Tensor, float]]] = {}
    flat = np.arange(int(np.prod(case.grid.shape))).reshape(case.grid.shape)
    rows = []
    for row in constraints:
        if row.site not in (ANY_SITE, case.site) or row.weight == 0:
            continue
        if row.structure not in known:
            known[row.structure] = [
                (region.name, torch.from_numpy(region.values(flat)).to(device), region.prescription_gy)
                for region in regions(row.structure, case)
            ]
        for name, voxels, gy in known[row.structure]:
            rows.append(ActiveRow(row, name, voxels, case.grid.voxel_cc, gy, row.limit_for(gy)))
    return rows


def protocol_loss(
    dose_gy: Tensor,
    rows: Sequence[ActiveRow],
    reference_gy: Tensor | None = None,
    softness: Softness | None = None,
) -> Tensor:
    """Weighted sum of the rows' squared excesses for one patient.

    A dose counts by its excess relative to the limit, ``max(0, D / limit - 1)^2`` or ``max(0, 1 - D / limit)^2``, a
    volume in percent by its excess as a share of the structure, ``max(0, V - limit)^2``, as in ADDiff-Dose
    (section 2.3). A volume in cm^3 counts by ``((V - limit) / (V + limit))^2``. Of the rows of one ``any_of`` group
    the least exceeded one counts.

    Args:
        dose_gy: ``(X, Y, Z)``.
        rows: :func:`active_rows` of the same volume.
        reference_gy: ``(X, Y, Z)``; what the reference plan exceeds itself is not penalised, only what goes beyond it:
            the limit is the reference's own value where that is worse. None takes the limits as they are.
        softness: widths of the soft metrics.

    Returns:
        A scalar; zero, with a gradient of zero, where no row applies.
    """
    softness = softness or Softness()
    flat = dose_gy.reshape(-1)
    reference = None if reference_gy is None else reference_gy.detach().reshape(-1)
    total = (flat[:1] * 0).sum()
    groups: dict[str, list[Tensor]] = {}
    for row in rows:
        value = _value(row, flat, softness)
        with torch.no_grad():
            known = None if reference is None else _value(row, reference, softness)
        term = row.constraint.weight * _excess(row, value, known).square()
        if row.constraint.any_of:
            groups.setdefault(row.constraint.any_of, []).append(term)
        else:
            total = total + term
    return total + sum(torch.stack(terms).min() for terms in groups.values())


def _value(row: ActiveRow, flat_gy: Tensor, softness: Softness) -> Tensor:
    return soft_value(row.constraint.metric, flat_gy[row.voxels], row.voxel_cc, row.prescription_gy, softness)


def _excess(row: ActiveRow, value: Tensor, reference: Tensor | None) -> Tensor:
    """How far the value lies beyond the limit, or beyond the reference where that is worse; no unit."""
    sign = 1.0 if row.constraint.at_most else -1.0
    limit = value.new_tensor(row.limit)
    if reference is not None:
        limit = torch.maximum(limit, reference) if row.constraint.at_most else torch.minimum(limit, reference)
    beyond = torch.relu(sign * (value - limit))
    metric = row.constraint.metric
    if metric.is_dose:
        return beyond / max(row.limit, 1.0)
    return beyond / 100 if metric.unit == "%" else beyond / (value + limit).clamp_min(row.voxel_cc)


class ConstraintLoss:
    """L_cond of a batch, from the predicted and the reference dose and the network's input.

    The structures come from the image's own channels (:func:`case_from_conditions`), so that crops, mirrored patients
    and dropped structures need no bookkeeping. In a crop a row is judged by the part of the structure that lies in it,
    of the prediction and of the reference alike.

    Args:
        condition_channels: name of every channel of ``image``.
        constraints: file with the rows; None for the bundle's ``constraints.json``.
        structures: only rows on these structures; None for all.
        beyond_reference: penalise only what exceeds the reference plan too; see :func:`protocol_loss`.
        dose_width_gy, volume_share: see :class:`Softness`.

    Raises:
        CaseError: constraints that cannot be read, or structures no row names.
    """

    def __init__(
        self,
        condition_channels: Sequence[str],
        constraints: str | Path | None = None,
        structures: Sequence[str] | None = None,
        beyond_reference: bool = True,
        dose_width_gy: float = 0.5,
        volume_share: float = 0.02,
    ) -> None:
        self.names = list(condition_channels)
        self.constraints = select_rows(load_constraints(constraints), structures)
        self.beyond_reference = beyond_reference
        self.softness = Softness(dose_width_gy, volume_share)

    def __call__(self, pred: Tensor, ref: Tensor, image: Tensor) -> Tensor:
        """Mean over the patients.

        Args:
            pred: predicted clean dose ``(B, 1, X, Y, Z)``, fraction of the highest prescription.
            ref: reference dose, same shape and unit.
            image: ``(B, C, X, Y, Z)``, the network's input.
        """
        if pred.shape != ref.shape or image.shape[0] != pred.shape[0] or image.shape[2:] != pred.shape[2:]:
            found = [tuple(t.shape) for t in (pred, ref, image)]
            raise CaseError(f"constraint loss: expected (B, 1, X, Y, Z) twice and (B, C, X, Y, Z), found {found}")
        losses = [self._one(p, r, i) for p, r, i in zip(pred[:, 0].float(), ref[:, 0].float(), image)]
        return torch.stack(losses).mean()

    def _one(self, pred: Tensor, ref: Tensor, image: Tensor) -> Tensor:
        case = case_from_conditions(image.detach().float().cpu().numpy(), self.names)
        rows = active_rows(self.constraints, case, pred.device)
        gy = case.highest_prescription_gy
        return protocol_loss(pred * gy, rows, ref * gy if self.beyond_reference else None, self.softness)


def select_rows(constraints: Sequence[Constraint], structures: Sequence[str] | None) -> tuple[Constraint, ...]:
    """The rows on the structures named; all of them for None."""
    if structures is None:
        return tuple(constraints)
    known = {row.structure for row in constraints}
    if unknown := sorted(set(structures) - known):
        raise CaseError(f"constraints: no row on {unknown}; the rows are on {sorted(known)}")
    return tuple(row for row in constraints if row.structure in structures)

