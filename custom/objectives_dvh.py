"""Fit of the network's DVH estimate to reference plans: no gradient descent over voxels, minutes for 200 patients."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from custom.case import CaseError, Keys
from custom.networks.broad import BroadBranch
from custom.networks.dvh_estimate import DvhEstimator
from custom.rois import mirror_order
from custom.whole import whole_file

__all__ = ["DvhFit", "LeftOutDoses"]

CONTEXT = "context"
BROAD = "broad."  # of a network's weights
METRIC_NAMES = {True: ("D99", "D95", "D1"), False: ("D0.1cc", "mean")}
FEW = 50

logger = logging.getLogger(__name__)


class LeftOutDoses:
    """Doses of training cases by broad branches that have not seen them: what a dose of a new patient is like.

    Fold k of n branches has been trained without the cases k, k + n, ... (:func:`custom.datalists.split_cases`).

    Args:
        weights: ``model.pt`` of each fold, in their order.
        folds: how many there are.
        branch_def: arguments of :class:`~custom.networks.broad.BroadBranch` that they were trained with.
        spatial_channels, context_channels: names of what the branch sees.
        swap_channels: see :func:`~custom.rois.mirror_order`; the dose is the mean of the patient's and of
            his mirror image's, as in inference.
        extra_dirs: must be empty; these cases are in all folds.

    Raises:
        CaseError: fewer or more files than folds, one that is missing, damaged or of another branch, or extra cases.
    """

    def __init__(self, weights: Sequence[str | Path], folds: int, branch_def: Mapping[str, Any],
                 spatial_channels: Sequence[str], context_channels: Sequence[str],
                 swap_channels: Sequence[Sequence[str]] = (), extra_dirs: Sequence[str | Path] = ()) -> None:
        if len(weights) != folds:
            raise CaseError(f"DVH fit: fold_weights names {len(weights)} models; expected one of each of the {folds} "
                            "folds, fold 0 first, or cases would be told by branches that have seen them")
        if extra_dirs:
            raise CaseError(f"DVH fit: extra_dirs {list(extra_dirs)}; every fold was trained with these cases, so none "
                            "can tell their doses as if they were new. Leave extra_dirs out here")
        self.branch = BroadBranch(spatial_channels, context_channels, **branch_def).eval()
        self.mirrored = mirror_order(spatial_channels, swap_channels)
        self.structures = [i for i, name in enumerate(spatial_channels) if name.startswith("sdm_")]
        self.folds = [self._read(Path(path)) for path in weights]
        self.loaded = -1

    def _read(self, path: Path) -> dict[str, Tensor]:
        if not path.is_file():
            raise CaseError(f"DVH fit: no fold's weights at {path}; train_broad with --fold 0, 1, ... makes them")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CaseError(f"DVH fit: {path} is no weights file that can be read safely ({error}); train that fold "
                            "anew") from error
        state = {key.removeprefix(BROAD): value for key, value in state.items() if key.startswith(BROAD)}
        own = self.branch.state_dict()
        odd = sorted(set(own) ^ set(state)) or [k for k, v in state.items() if v.shape != own[k].shape]
        if odd:
            raise CaseError(f"DVH fit: {path} is of another broad branch than fold_def; the first tensor that does not "
                            f"fit is {odd[0]!r}. Give the fold_def that it was trained with")
        return state

    @torch.no_grad()
    def __call__(self, number: int, image: Tensor, context: Tensor) -> Tensor:
        """Dose ``(X, Y, Z)`` in the structures of training case ``number``, a fraction of the highest prescription.

        Args:
            image: ``(n, X, Y, Z)``.
            context: ``(m,)``.
        """
        fold = number % len(self.folds)
        if fold != self.loaded:
            self.branch.load_state_dict(self.folds[fold])
            self.loaded = fold
        where = (image[self.structures] > 0).any(0)
        there = self.branch.told(image, context, where)
        mirror = self.branch.told(torch.flip(image, [1])[self.mirrored], context, torch.flip(where, [0]))
        return (there + torch.flip(mirror, [0])) / 2


class DvhFit:
    """Fit ``network.dvh`` to prepared training cases and write the whole network.

    Args:
        network: with a :class:`~custom.networks.dvh_estimate.DvhEstimator`, its other weights loaded.
        data: prepared cases: ``image`` and ``context``, ``label`` (reference dose), ``prescription_gy``.
        output_dir: ``model.pt`` and ``dvh_estimate.csv`` go here: for each structure and metric how far the reference
            is from the first guess and from the estimate when that patient is left out, mean over patients, Gy.
        share: of the estimate in the metrics.
        left_out: the first guess of an estimate that departs from a predicted dose.
        progress: show a bar over the cases.

    Raises:
        CaseError: a network without a DVH estimate; one that wants doses, without them; no structure that enough cases
            have.
    """

    def __init__(self, network: torch.nn.Module, data: Sequence[Mapping], output_dir: str | Path, share: float,
                 left_out: LeftOutDoses | None = None, progress: bool = True) -> None:
        if not isinstance(getattr(network, "dvh", None), DvhEstimator):
            raise CaseError("DVH fit: the network has no DVH estimate; give network_def `dvh`, for example {}")
        if network.dvh.figures.sees_dose and left_out is None:
            raise CaseError("DVH fit: the estimate departs from a predicted dose (network_def#dvh#sees_dose) and there "
                            "is none of cases that were left out; give fold_weights, the models that train_broad "
                            "makes with --fold 0, 1, ..., or switch sees_dose off")
        self.left_out = left_out
        self.network, self.data, self.share, self.progress = network, data, share, progress
        self.output_dir = Path(output_dir)

    def run(self) -> list[dict[str, str | int | float]]:
        """Fit and write; the rows of ``dvh_estimate.csv``."""
        estimator = self.network.dvh
        cases = (self.data[i] for i in range(len(self.data)))
        cases = tqdm(cases, "DVHs", len(self.data), disable=not self.progress)
        patients = [self._patient(number, case) for number, case in enumerate(cases)]
        if len(patients) < FEW:
            logger.warning("DVH estimate: %d patients; below %d it can hardly tell them apart", len(patients), FEW)
        found = estimator.fit([(figures, reference) for figures, reference, _ in patients], self.share)
        prescription_gy = sum(gy for *_, gy in patients) / len(patients)
        rows = []
        for (name, k), (estimated, true) in found.items():
            is_target = estimator.targets[estimator.names.index(name)]
            rows.append({
                "structure": name, "metric": METRIC_NAMES[is_target][k], "patients": len(true),
                "first_error_gy": prescription_gy * float(true.abs().mean()),
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
            logger.info("%(structure)s %(metric)s, %(patients)d patients: first guess %(first_error_gy).2f Gy, "
                        "estimate %(left_out_error_gy).2f Gy", row)
        return rows

    def _patient(self, number: int, case: Mapping) -> tuple:
        image, context, label = (torch.as_tensor(case[key]).float() for key in (Keys.IMAGE, CONTEXT, Keys.LABEL))
        figures = self.network.dvh.figures
        dose = self.left_out(number, image, context) if figures.sees_dose else None
        return figures(image, context, dose), figures.metrics(label[0], image, context), float(case["prescription_gy"])
