"""Take conditions away for an ablation, after the cache: what is left out is zero everywhere, for training and test."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from custom.case import CaseError, Keys
from custom.transforms.condition import ABSENT_DISTANCE, CONTEXT

__all__ = ["ReduceConditionsd"]


class ReduceConditionsd(MapTransform):
    """Blank named channels of the image and entries of ``context``, or make masks of the distance maps.

    Args:
        keys: the image ``(C, X, Y, Z)``.
        spatial_channels: names of its first channels.
        context_channels: names of the entries of ``context``, not appended to the image yet.
        left_out: channels to blank; a name that ends in ``"_"`` stands for all channels that begin with it. Distance
            maps become those of an absent structure, everything else zero.
        distances_as_masks: signed distances (positive inside) become 1 inside and 0 outside.

    Raises:
        CaseError: a name that is no channel.
    """

    def __init__(self, keys: KeysCollection = Keys.IMAGE, spatial_channels: Sequence[str] = (),
                 left_out: Sequence[str] = (), distances_as_masks: bool = False,
                 context_channels: Sequence[str] = ()) -> None:
        super().__init__(keys)
        names, context = list(spatial_channels), list(context_channels)
        self.blanked: list[tuple[int, float]] = []
        self.forgotten: list[int] = []
        for asked in left_out:
            found = [n for n in names + context if n == asked or (asked.endswith("_") and n.startswith(asked))]
            if not found:
                raise CaseError(
                    f"ablation: no channel {asked!r} to leave out; the channels are {', '.join(names + context)}")
            self.blanked += [(names.index(n), ABSENT_DISTANCE if n.startswith("sdm_") else 0.0) for n in found
                             if n in names]
            self.forgotten += [context.index(n) for n in found if n in context]
        self.masked = [i for i, n in enumerate(names) if distances_as_masks and n.startswith("sdm_")]

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        out = dict(data)
        if self.forgotten:
            out[CONTEXT] = out[CONTEXT].clone()
            out[CONTEXT][self.forgotten] = 0.0
        if not self.blanked and not self.masked:
            return out
        for key in self.key_iterator(out):
            image = out[key].clone()
            for channel in self.masked:
                image[channel] = (image[channel] > 0).to(image.dtype)
            for channel, value in self.blanked:
                image[channel] = value
            out[key] = image
        return out
