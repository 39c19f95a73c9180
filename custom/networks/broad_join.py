"""Perceptrons of several broad branches side by side in one: bagging (Breiman, Machine Learning 24, 123, 1996).

Branches that each have not seen some of the patients are trained anyway, for the DVH estimate. They err otherwise than
those that have seen all, and the mean of all is nearer to the truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from custom.case import CaseError
from custom.networks.broad import BroadBranch

__all__ = ["join_branches"]

FIRST_LAYERS = {"voxel": "perceptrons.first", "patient": "perceptrons.patient"}  # which see these features
PERCEPTRONS = "perceptrons."


@torch.no_grad()
def join_branches(joined: BroadBranch, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Give ``joined`` the perceptrons of trained branches, each of which says there what it said in its own.

    The branches have scaled the features by the patients that each was trained with; the first layers take that up.
    (Only where a patient's figures are cut, some standard deviations from the mean, may it depart a little.)

    Args:
        joined: with as many members as the branches together; changed in place.
        states: state dicts of branches of the same width and depth, on the same channels. They may lack the last of a
            voxel's features (``beam_scales_mm``, ``slope_scales_mm``), which they then do not see.

    Raises:
        CaseError: no branches, branches that do not fit, another number of members, or shares that differ.
    """
    own = joined.state_dict()
    _check(own, states)
    for part in FIRST_LAYERS:
        spreads = _stacked([state[f"{part}_std"] for state in states], torch.inf)
        own[f"{part}_std"] = spreads.amin(0)  # the least: a feature that was the same in all patients of one branch ...
        own[f"{part}_mean"] = _stacked([state[f"{part}_mean"] for state in states], torch.nan).nanmean(0)
    parts = [_scaled_as(own, {name: value.float() for name, value in state.items()}) for state in states]
    members = {name: torch.cat([part[name] for part in parts]) for name in own if name.startswith(PERCEPTRONS)}
    joined.load_state_dict({**own, **members, "share": states[0]["share"]})


def _check(own: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]]) -> None:
    for number, state in enumerate(states):
        odd = sorted(set(own) ^ set(state)) or [name for name in own if not _fits(name, state[name], own[name])]
        if odd:
            raise CaseError(f"broad branch: the weights number {number + 1} to be joined are of another branch; the "
                            f"first tensor that does not fit is {odd[0]!r}. Give branches of one width and depth, on "
                            "the channels of this network")
    wanted, found = (sum(len(state["perceptrons.last.bias"]) for state in group) for group in ([own], states))
    if wanted != found:
        raise CaseError(f"broad branch: {len(states)} branches with {found} members to be joined; expected {wanted} "
                        "(network_def#broad#members)")
    shares = sorted({float(state["share"]) for state in states})
    if len(shares) > 1:
        raise CaseError(f"broad branch: branches to be joined have the shares {shares}; train them with one broad_share")


def _fits(name: str, value: Tensor, own: Tensor) -> bool:
    """Whether all but the members agree, and the voxels' features, of which there may be fewer."""
    shape, wanted = list(value.shape), list(own.shape)
    if name.startswith(PERCEPTRONS):
        shape, wanted = shape[1:], wanted[1:]
    if name.startswith(("voxel_", "perceptrons.first.weight")):
        return shape[1:] == wanted[1:] and shape[0] <= wanted[0]
    return shape == wanted


def _stacked(rows: Sequence[Tensor], missing: float) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.stack([F.pad(row.float(), (0, width - len(row)), value=missing) for row in rows])


def _scaled_as(own: Mapping[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A branch's weights for features that are scaled as ``own`` has it."""
    for part, layer in FIRST_LAYERS.items():
        weight, std = state[f"{layer}.weight"], state[f"{part}_std"]
        count = len(std)
        moved = (own[f"{part}_mean"][:count] - state[f"{part}_mean"]) / std
        state[f"{layer}.bias"] = state[f"{layer}.bias"] + torch.einsum("f,mfw->mw", moved, weight)[:, None]
        weight = weight * (own[f"{part}_std"][:count] / std)[:, None]
        state[f"{layer}.weight"] = F.pad(weight, (0, 0, 0, len(own[f"{part}_std"]) - count))
    return state
