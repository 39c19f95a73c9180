"""Random changes of training samples that keep them physically right."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

from custom.case import Keys
from custom.geometry.distance import DISTANCE_FORMS
from custom.transforms.condition import ABSENT_DISTANCE, CONTEXT

__all__ = ["RandDropConditionsd", "RandMirrord", "mirror_order"]


def mirror_order(names: Sequence[str]) -> list[int]:
    """Index of each name's counterpart on the other side of the body (``..._L`` and ``..._R``), or its own."""
    other = {"_L": "_R", "_R": "_L"}
    partner = [name[:-2] + other[name[-2:]] if name[-2:] in other else name for name in names]
    return [list(names).index(p) if p in names else i for i, p in enumerate(partner)]


class RandMirrord(RandomizableTransform, MapTransform):
    """Mirror the patient left to right: flip the first spatial axis and, where asked, swap paired structures.

    Equispaced coplanar beams that start at gantry 0 are their own mirror image, so beam channels only flip. Plans may
    treat the two organs of a pair differently (OpenKBP's spare the left parotid more than the right). Then a mirrored
    patient's left parotid must stay the left one, wherever it now lies, or the network learns the mean of both.

    Args:
        keys: tensors ``(C, X, Y, Z)`` to flip.
        spatial_channels, context_channels, roi_names: names of the channels of ``image``, ``context`` and ``rois``.
        prob: probability.
        swap_pairs: whether ``..._L`` and ``..._R`` change places, as anatomy has it.
    """

    def __init__(self, keys: KeysCollection, spatial_channels: Sequence[str], context_channels: Sequence[str],
                 roi_names: Sequence[str], prob: float = 0.5, swap_pairs: bool = True) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.orders = {}
        if swap_pairs:
            self.orders = {Keys.IMAGE: mirror_order(spatial_channels), CONTEXT: mirror_order(context_channels),
                           Keys.ROIS: mirror_order(roi_names)}

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        out = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return out
        for key in self.key_iterator(out):
            out[key] = torch.flip(out[key], dims=[1])
            if key in self.orders:
                out[key] = out[key][self.orders[key]]
        if CONTEXT in self.orders:
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
