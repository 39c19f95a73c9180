"""Samples for the training of the network's broad branch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.transforms import Randomizable, Transform
from torch import Tensor

from custom.case import Keys
from custom.networks.broad import BroadBranch, BroadVoxels, mean_of_blocks
from custom.transforms.augment import RandDropConditionsd, mirror_order
from custom.transforms.condition import CONTEXT

__all__ = ["BroadSamplesd", "RandBroadVoxelsd"]

VARIANTS = "variants"


class BroadSamplesd(Transform):
    """What the broad branch sees of a prepared training case, once as it is and once without some of its input.

    Each of the two also left-right mirrored, as inference mirrors them. Blocks come first, then single voxels.

    Args:
        branch: whose features these are.
        spatial_channels, context_channels: see :class:`RandDropConditionsd`.
        swap_channels: see :func:`~custom.transforms.augment.mirror_order`.
        ct_prob, organ_prob: of the case with less input; see there.
        seed: of what is left out, and of the single voxels.
        single_voxels: so many for each block, drawn anew in each of the four; 0 for blocks alone.
    """

    def __init__(self, branch: BroadBranch, spatial_channels: Sequence[str], context_channels: Sequence[str],
                 swap_channels: Sequence[Sequence[str]] = (), ct_prob: float = 0.3, organ_prob: float = 0.1,
                 seed: int = 0, single_voxels: float = 0.0) -> None:
        self.branch, self.single_voxels, self.seed = branch, single_voxels, seed
        self.mirrored = mirror_order(spatial_channels, swap_channels)
        self.drop = RandDropConditionsd(Keys.IMAGE, spatial_channels, context_channels, ct_prob, organ_prob)
        self.drop.set_random_state(seed)

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[str, list[dict[str, Tensor]]]:
        whole = {key: torch.as_tensor(data[key]) for key in (Keys.IMAGE, CONTEXT, Keys.LABEL, Keys.BODY)}
        cases = [(whole, False), (self.drop(whole), True)]
        generator = torch.Generator().manual_seed(self.seed)
        return {VARIANTS: [{**self._sample(case, axes, generator), "less": less}
                           for case, less in cases for axes in ((), (1,))]}

    def _sample(self, case: Mapping[Hashable, Tensor], axes: tuple[int, ...], generator: torch.Generator) -> dict:
        image, label, body = (torch.flip(case[key].float(), axes) for key in (Keys.IMAGE, Keys.LABEL, Keys.BODY))
        image = image[self.mirrored] if axes else image
        dose, seen = label * (body > 0), self.branch.features(image, case[CONTEXT])
        parts = [_rows(seen, mean_of_blocks(dose))]
        if self.single_voxels:
            voxels = _rows(self.branch.features(image, case[CONTEXT], edge_voxels=1), dose)
            count = round(self.single_voxels * len(seen.voxels))
            drawn = torch.randperm(len(voxels["weight"]), generator=generator)[:count]
            parts.append({key: value[drawn] for key, value in voxels.items()})
        return {"patient": seen.patient, **{key: torch.cat([part[key] for part in parts]) for key in parts[0]}}


def _rows(seen: BroadVoxels, dose: Tensor) -> dict[str, Tensor]:
    """Features, what is to be learnt and its weight in each block or voxel, of ``dose`` (1, X, Y, Z) of that size."""
    return {"voxels": seen.voxels.half(), "weight": seen.body[seen.inside].half(),
            "residual": (dose[0] - seen.plan)[seen.inside].half()}


class RandBroadVoxelsd(Randomizable, Transform):
    """Draw voxels of one variant of a case.

    Args:
        count: voxels a case; drawn with replacement.
    """

    def __init__(self, count: int = 512) -> None:
        self.count = count

    def __call__(self, data: Mapping[str, list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        variant = data[VARIANTS][self.R.randint(len(data[VARIANTS]))]
        drawn = torch.from_numpy(self.R.randint(len(variant["weight"]), size=self.count))
        drawn_ones = {key: variant[key][drawn].float() for key in ("voxels", "residual", "weight")}
        return {**drawn_ones, "patient": variant["patient"]}
