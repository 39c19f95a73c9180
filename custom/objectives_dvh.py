"""Fit of the network's DVH estimate to reference plans: no gradient descent over voxels, a minute for 200 patients."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from custom.case import CaseError, Keys
from custom.networks.dvh_estimate import DvhEstimator
from custom.whole import whole_file

__all__ = ["DvhFit"]

CONTEXT = "context"
METRIC_NAMES = {True: ("D99", "D95", "D1"), False: ("D0.1cc", "mean")}
FEW = 50

logger = logging.getLogger(__name__)


class DvhFit:
    """Fit ``network.dvh`` to prepared training cases and write the whole network.

    Args:
        network: with a :class:`~custom.networks.dvh_estimate.DvhEstimator`, its other weights loaded.
        data: prepared cases: ``image`` and ``context``, ``label`` (reference dose), ``prescription_gy``.
        output_dir: ``model.pt`` and ``dvh_estimate.csv`` go here: for each structure and metric how far the reference
            is from the plan prior and from the estimate when that patient is left out, mean over patients, Gy.
        share: of the estimate in the metrics.
        progress: show a bar over the cases.

    Raises:
        CaseError: a network without a DVH estimate; no structure that enough cases have.
    """

    def __init__(self, network: torch.nn.Module, data: Sequence[Mapping], output_dir: str | Path, share: float,
                 progress: bool = True) -> None:
        if not isinstance(getattr(network, "dvh", None), DvhEstimator):
            raise CaseError("DVH fit: the network has no DVH estimate; give network_def `dvh`, for example {}")
        self.network, self.data, self.share, self.progress = network, data, share, progress
        self.output_dir = Path(output_dir)

    def run(self) -> list[dict[str, str | int | float]]:
        """Fit and write; the rows of ``dvh_estimate.csv``."""
        estimator = self.network.dvh
        cases = (self.data[i] for i in range(len(self.data)))
        patients = [self._patient(case) for case in tqdm(cases, "DVHs", len(self.data), disable=not self.progress)]
        if len(patients) < FEW:
            logger.warning("DVH estimate: %d patients; below %d it can hardly tell them apart", len(patients), FEW)
        found = estimator.fit([(figures, reference) for figures, reference, _ in patients], self.share)
        prescription_gy = sum(gy for *_, gy in patients) / len(patients)
        rows = []
        for (name, k), (estimated, true) in found.items():
            is_target = estimator.targets[estimator.names.index(name)]
            rows.append({
                "structure": name, "metric": METRIC_NAMES[is_target][k], "patients": len(true),
                "plan_prior_error_gy": prescription_gy * float(true.abs().mean()),
                "left_out_error_gy": prescription_gy * float((estimated - true).abs().mean()),
            })  # fmt: skip
        if not rows:
            raise CaseError(f"DVH fit: none of {estimator.names} is in three or more of the {len(patients)} cases")
        state = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        with whole_file(self.output_dir / "model.pt") as part:
            torch.save(state, part)
        with whole_file(self.output_dir / "dvh_estimate.csv") as part, part.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        for row in rows:
            logger.info("%(structure)s %(metric)s, %(patients)d patients: plan prior %(plan_prior_error_gy).2f Gy, "
                        "estimate %(left_out_error_gy).2f Gy", row)
        return rows

    def _patient(self, case: Mapping) -> tuple:
        image, context, label = (torch.as_tensor(case[key]) for key in (Keys.IMAGE, CONTEXT, Keys.LABEL))
        figures = self.network.dvh.figures(image, context)
        reference: Tensor = self.network.dvh.metrics(label[0].float(), image.float(), context)
        return figures, reference, float(case["prescription_gy"])
