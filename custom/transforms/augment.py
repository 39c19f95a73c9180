"""Random changes of training samples that keep them physically right."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

from custom.case import Keys
from custom.geometry.distance import DISTANCE_FORMS
from custom.rois import mirror_order
from custom.transforms.condition import ABSENT_DISTANCE, CONTEXT

__all__ = ["RandDropConditionsd", "RandMirrord"]


class RandMirrord(RandomizableTransform, MapTransform):
    """Mirror the patient left to right: flip the first spatial axis and swap the channels that trade places.

    Equispaced coplanar beams that start at gantry 0 are their own mirror image: what was the beam at 40 degrees is
    the one at 320. Plans may treat the two organs of a pair differently (OpenKBP's spare the left parotid more than the
    right). Then a mirrored patient's left parotid must stay the left one, wherever it now lies, or the network learns
    the mean of both.

    Args:
        keys: tensors ``(C, X, Y, Z)`` to flip.
        spatial_channels, context_channels, roi_names: names of the channels of ``image``, ``context`` and ``rois``.
        swap_channels: pairs of channel names that change places, as inference has them.
        prob: probability.
    """

    def __init__(self, keys: KeysCollection, spatial_channels: Sequence[str], context_channels: Sequence[str],
                 roi_names: Sequence[str], swap_channels: Sequence[Sequence[str]] = (), prob: float = 0.5) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        names = {Keys.IMAGE: spatial_channels, CONTEXT: context_channels, Keys.ROIS: roi_names}
        self.orders = {key: mirror_order(of_key, swap_channels) for key, of_key in names.items()}

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        out = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return out
        for key in self.key_iterator(out):
            out[key] = torch.flip(out[key], dims=[1])
            if key in self.orders:
                out[key] = out[key][self.orders[key]]
        out[CONTEXT] = out[CONTEXT][self.orders[CONTEXT]]
        return out


class RandDropConditionsd(RandomizableTransform, MapTransform):
    """Take the CT, or single organs, away, as real input may come without them.

    Args:
        keys: the image.
        spatial_channels, context_channels: names of its channels and of the context's.
        ct_prob: probability that the CT goes.
        organ_prob: probability for each organ that its distance map (``sdm_``, or DoseDiff's forms) and mask go, and
            the context's figures of it.
    """

    FIGURES = ("has", "overlap", "plan_mean")

    def __init__(self, keys: KeysCollection, spatial_channels: Sequence[str], context_channels: Sequence[str],
                 ct_prob: float = 0.15, organ_prob: float = 0.03) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        self.ct_prob, self.organ_prob = ct_prob, organ_prob
        self.spatial, self.context = list(spatial_channels), list(context_channels)
        forms = {"sdm": ABSENT_DISTANCE, **{form: absent for form, (_, absent) in DISTANCE_FORMS.items()}}
        self.organs: dict[str, list[tuple[str, float]]] = {}  # organ -> its channels, and what they hold without it
        for name in self.spatial:
            form, _, organ = name.partition("_")
            if form in forms and not organ.startswith("target_"):
                self.organs.setdefault(organ, []).append((name, forms[form]))

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        out = dict(data)
        drop = [organ for organ in self.organs if self.R.random() < self.organ_prob]
        changes = [change for organ in drop for change in self.organs[organ]]
        gone = {f"{figure}_{organ}" for organ in drop for figure in self.FIGURES}
        if self.R.random() < self.ct_prob:
            changes.append(("ct", 0.0))
            gone.add("has_ct")
        if not changes:
            return out
        for key in self.key_iterator(out):
            image = out[key].clone()
            for channel, value in changes:
                if channel in self.spatial:
                    image[self.spatial.index(channel)] = value
            out[key] = image
        kept = torch.tensor([float(name not in gone) for name in self.context])
        out[CONTEXT] = out[CONTEXT] * kept
        return out
