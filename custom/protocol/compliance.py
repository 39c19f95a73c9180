"""How much of the protocol a validated prediction meets, and when training should stop because it no longer rises."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.metrics import CumulativeIterationMetric

from custom.dosimetry.constraints import check, compliance, load_constraints
from custom.protocol.conditions import case_from_conditions
from custom.protocol.loss import select_rows

__all__ = ["CompliancePlateau", "ComplianceScore"]

logger = logging.getLogger(__name__)


class ComplianceScore(CumulativeIterationMetric):
    """Share of the applicable limits that a dose meets, in percent, averaged over cases: the exact form of the rows.

    Call it with ``y_pred`` ``(B, 1 or more, X, Y, Z)``, whose first channel is the dose as a fraction of the highest
    prescription, and ``y``, the network's ``image`` ``(B, C, X, Y, Z)``, from which the structures are read. With the
    label in place of the prediction it is the compliance of the reference plans. MONAI's ignite handler passes just
    these two: ``from_engine(['pred', 'image'])``.

    Args:
        condition_channels: name of every channel of ``image``.
        constraints: file with the rows; None for the bundle's ``constraints.json``.
        structures: only rows on these structures; None for all.
    """

    def __init__(
        self,
        condition_channels: Sequence[str],
        constraints: str | Path | None = None,
        structures: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.names = list(condition_channels)
        self.constraints = select_rows(load_constraints(constraints), structures)

    def _compute_list(self, y_pred, y=None, **kwargs):
        return torch.cat([self._compute_tensor(p[None], t[None]) for p, t in zip(y_pred, y)])

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """``(B, 1)`` percentages; nan for a case to which no row applies.

        Raises:
            ValueError: shapes that do not fit.
        """
        if y is None or y_pred.ndim != 5 or y.shape[2:] != y_pred.shape[2:] or y.shape[0] != y_pred.shape[0]:
            found = None if y is None else tuple(y.shape)
            raise ValueError(f"ComplianceScore: expected (B, 1, ...), (B, C, ...), got {tuple(y_pred.shape)}, {found}")
        values = []
        for dose, image in zip(y_pred, y):
            case = case_from_conditions(image.detach().float().cpu().numpy(), self.names)
            dose_gy = dose[0].detach().double().cpu().numpy() * case.highest_prescription_gy
            values.append([compliance(check(self.constraints, case, dose_gy))])
        return torch.tensor(values, dtype=torch.float32)

    def aggregate(self) -> torch.Tensor:
        """Mean over the cases to which a row applies, since the last reset (nan when there was none)."""
        data = self.get_buffer()
        return torch.tensor(math.nan) if data is None else data.nanmean()


class CompliancePlateau:
    """Ends a training whose compliance has not improved for a number of epochs (ADDiff-Dose, algorithm 1, step 14).

    Attach it to the validator, and give it to ``WallClockSchedule(early_stop=...)``, which asks :attr:`exhausted`. It
    takes the place of the export of the best weights, and does that too. A new phase trains another part, so both begin
    anew with it.

    Args:
        patience: epochs of training, not validations; None for never.
        metric: name in the validator's ``state.metrics``; higher is better.
        least: by how much a value must exceed the best one to count as better.
        export: an ``EmaExport``, attached and checkpointed along; its own patience counts as well.
    """

    def __init__(
        self,
        patience: int | None = 20,
        metric: str = "constraints_met_percent",
        least: float = 0.0,
        export: Any = None,
    ) -> None:
        self.patience, self.metric, self.least, self.export = patience, metric, least, export
        self.best, self.best_epoch, self.epoch, self.phase = -math.inf, 0, 0, 0

    @property
    def exhausted(self) -> bool:
        """True when the patience is over."""
        export_is = self.export is not None and self.export.exhausted
        return export_is or (self.patience is not None and self.epoch - self.best_epoch >= self.patience)

    def enter_phase(self, phase: int) -> None:
        """Begin anew when ``phase`` is another one."""
        if phase != self.phase:
            self.best, self.best_epoch, self.phase = -math.inf, self.epoch, phase
        if self.export is not None:
            self.export.enter_phase(phase)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._check)
        if self.export is not None:
            self.export.attach(engine)

    def state_dict(self) -> dict:
        own = {"best": self.best, "best_epoch": self.best_epoch, "epoch": self.epoch, "phase": self.phase}
        return own if self.export is None else own | {"export": self.export.state_dict()}

    def load_state_dict(self, state: Mapping) -> None:
        self.best, self.best_epoch = float(state["best"]), int(state["best_epoch"])
        self.epoch, self.phase = int(state["epoch"]), int(state.get("phase", 0))
        if self.export is not None:
            self.export.load_state_dict(state["export"])

    def _check(self, engine: Engine) -> None:
        # MONAI's validators count the trainer's epochs.
        value, self.epoch = float(engine.state.metrics[self.metric]), engine.state.epoch
        if value > self.best + self.least:
            self.best, self.best_epoch = value, self.epoch
        logger.info("%s %.2f, best %.2f at epoch %d", self.metric, value, self.best, self.best_epoch)
