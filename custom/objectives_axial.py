"""Objectives of the axial networks: slabs whose edge slices lack a neighbour, and MAGDiff-ADC's calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from custom.case import CaseError
from custom.networks.ddim import ddim_sample

__all__ = ["CalibrationObjective", "InnerSlicesObjective"]

Batch = Mapping[str, Any]


class InnerSlicesObjective:
    """Judge only slices that have all their neighbours in the crop: ``body`` and ``rois`` are emptied in the others.

    Args:
        objective: what is minimised on the rest.
        halo: slices at either end of a crop that lack neighbours, half of what a slice looks at.
    """

    def __init__(self, objective: Callable[[nn.Module, Batch], Mapping[str, Tensor]], halo: int = 1) -> None:
        if halo < 0:
            raise CaseError(f"objective: halo {halo}; expected 0 or more slices")
        self.objective, self.halo = objective, halo

    def __call__(self, network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        depth = batch["body"].shape[-1]
        if depth <= 2 * self.halo:
            raise CaseError(f"objective: crops of {depth} slices, of which {self.halo} at each end lack a neighbour; "
                            f"make patch_size deeper than {2 * self.halo}")
        inner = torch.zeros(depth, dtype=torch.bool, device=batch["body"].device)
        inner[self.halo : depth - self.halo] = True
        judged = {key: batch[key] * inner for key in ("body", "rois") if key in batch}
        return self.objective(network, {**batch, **judged})


class CalibrationObjective:
    """ROI-weighted L1 error of MAGDiff-ADC's calibrated dose; the diffusion is sampled and gets no gradient.

    *Inferred*: the abstract has the calibration refine doses within ROIs; that it is trained after the diffusion, on
    doses the diffusion samples, with an L1 error that weighs structures more, is taken from the usual practice.

    Args:
        num_steps: DDIM steps of the doses it learns from; as many as inference takes shows it the same errors.
        roi_weight: how much more a voxel of a structure counts than the rest of the body.
        generator: random numbers on the CPU; torch's own by default.
    """

    def __init__(self, num_steps: int = 4, roi_weight: float = 4.0, generator: torch.Generator | None = None) -> None:
        self.num_steps, self.roi_weight, self.generator = num_steps, roi_weight, generator

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        image, label = batch["image"], batch["label"].float()
        with torch.no_grad():
            conditions = network.encode(image)
            noise = torch.randn(label.shape, generator=self.generator).to(label)
            dose = network.diffused_dose(ddim_sample(network, noise, conditions, self.num_steps), conditions)
        refined = network.refine(dose, conditions).float()
        in_roi = (batch["rois"] > 0).any(dim=1, keepdim=True)
        weight = (batch["body"] > 0) * (1 + self.roi_weight * in_roi)
        total = ((refined - label).abs() * weight).sum((1, 2, 3, 4))
        return {"calibration": (total / weight.sum((1, 2, 3, 4)).clamp_min(1)).mean()}
