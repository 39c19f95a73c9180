"""Samples for the training of the network's broad branch."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from monai.transforms import Randomizable, Transform
from monai.utils import convert_to_tensor
from torch import Tensor

from custom.case import Keys
from custom.networks.broad import BroadBranch, BroadVoxels, mean_of_blocks
from custom.rois import mirror_order
from custom.transforms.augment import RandDropConditionsd
from custom.transforms.condition import CONTEXT

__all__ = ["BroadSamplesd", "RandBroadVoxelsd"]

VARIANTS = "variants"


class BroadSamplesd(Transform):
    """What the broad branch sees of a prepared training case, once as it is and once without some of its input.

    Each of the two also left-right mirrored, as inference mirrors them. Blocks come first, then single voxels.

    Args:
        branch: whose features these are.
        spatial_channels, context_channels: see :class:`RandDropConditionsd`.
        swap_channels: see :func:`~custom.rois.mirror_order`.
        ct_prob, organ_prob: of the case with less input; see there.
        seed: of what is left out, and of the single voxels.
        single_voxels: so many for each block, drawn anew in each of the four; 0 for blocks alone.
        most_blocks: of a variant, drawn where there are more; None keeps all.
        folder: where samples are kept, named after all that they depend on, and mapped into memory; several trainings
            share them there. None makes them anew and holds them in memory.
    """

    def __init__(self, branch: BroadBranch, spatial_channels: Sequence[str], context_channels: Sequence[str],
                 swap_channels: Sequence[Sequence[str]] = (), ct_prob: float = 0.3, organ_prob: float = 0.1,
                 seed: int = 0, single_voxels: float = 0.0, most_blocks: int | None = None,
                 folder: str | Path | None = None) -> None:
        self.branch, self.single_voxels = branch, single_voxels
        self.most_blocks, self.folder = most_blocks, None if folder is None else Path(folder)
        self.options = (seed, single_voxels, most_blocks, ct_prob, organ_prob)
        self.mirrored = mirror_order(spatial_channels, swap_channels)
        self.drop = RandDropConditionsd(Keys.IMAGE, spatial_channels, context_channels, ct_prob, organ_prob)

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[str, list[dict[str, Tensor]]]:
        whole = {key: convert_to_tensor(data[key], track_meta=False)  # a new case has metadata, a kept one none
                 for key in (Keys.IMAGE, CONTEXT, Keys.LABEL, Keys.BODY)}  # fmt: skip
        case = hashlib.sha256(repr((self.options, self.mirrored)).encode() + _bytes(whole.values()))
        seed = int(case.hexdigest()[:8], 16)
        if self.folder is None:
            return {VARIANTS: self._variants(whole, seed)}
        case.update(_bytes(self._trial(whole)))
        path = self.folder / f"broad_{case.hexdigest()[:32]}.pt"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as made:  # its own, beside other trainings
                torch.save(self._variants(whole, seed), Path(made) / path.name)
                (Path(made) / path.name).replace(path)
        return {VARIANTS: torch.load(path, mmap=True, weights_only=True)}

    def _variants(self, whole: Mapping[str, Tensor], seed: int) -> list[dict]:
        self.drop.set_random_state(seed)
        cases = [(whole, False), (self.drop(dict(whole)), True)]
        generator = torch.Generator().manual_seed(seed)
        return [{**self._sample(case, axes, generator), "less": less} for case, less in cases for axes in ((), (1,))]

    def _trial(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        """What the branch makes of a small patient: tells its features from others, whatever they come from."""
        small = torch.rand(len(whole[Keys.IMAGE]), 6, 6, 6, generator=torch.Generator().manual_seed(0))
        seen = self.branch.features(small, torch.ones(whole[CONTEXT].shape))
        return [seen.voxels.half(), seen.patient.half()]

    def _sample(self, case: Mapping[Hashable, Tensor], axes: tuple[int, ...], generator: torch.Generator) -> dict:
        image, label, body = (torch.flip(case[key].float(), axes) for key in (Keys.IMAGE, Keys.LABEL, Keys.BODY))
        image = image[self.mirrored] if axes else image
        dose, seen = label * (body > 0), self.branch.features(image, case[CONTEXT])
        blocks = _rows(seen, mean_of_blocks(dose))
        count = min(len(seen.voxels), self.most_blocks or len(seen.voxels))
        parts = [_drawn(blocks, count, generator)] if count < len(seen.voxels) else [blocks]
        if self.single_voxels:
            voxels = _rows(self.branch.features(image, case[CONTEXT], edge_voxels=1), dose)
            parts.append(_drawn(voxels, round(self.single_voxels * count), generator))
        return {"patient": seen.patient, **{key: torch.cat([part[key] for part in parts]) for key in parts[0]}}


def _bytes(tensors: Iterable[Tensor]) -> bytes:
    return b"".join(f"{t.dtype}{tuple(t.shape)}".encode() + t.contiguous().numpy().tobytes() for t in tensors)


def _drawn(rows: Mapping[str, Tensor], count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """So many of the rows, or all of them in another order."""
    drawn = torch.randperm(len(rows["weight"]), generator=generator)[:count]
    return {key: value[drawn] for key, value in rows.items()}


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
