"""Broad branches joined: each member says what it said in its own branch."""

import pytest
import torch

from custom.case import CaseError
from custom.networks.broad import BroadBranch
from custom.networks.broad_join import join_branches

SPATIAL = ["ct", "prescription", "body", "plan_prior", "plan_prior_coverage", "plan_prior_sparing", "beam_low"]
CONTEXT = ["has_ct", "spacing_x", "spacing_y", "spacing_z"]
NEAR = {"scales_mm": [5.0], "slope_scales_mm": [5.0]}


def trained(members: int, seed: int, share: float = 0.7, **options) -> BroadBranch:
    """A branch with weights everywhere, its features scaled by patients of its own."""
    torch.manual_seed(seed)
    options = {"scales_mm": [5.0], "width": 8, "patient_width": 4, **options}
    made = BroadBranch(SPATIAL, CONTEXT, members=members, **options)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    voxels, patients = len(made.voxel_mean), len(made.patient_mean)
    made.begin([(seed + (1 + seed) * torch.randn(50, voxels), torch.randn(patients)) for _ in range(6)], share)
    return made.eval()


def test_members_say_what_they_said_apart():
    first, second = trained(2, seed=1), trained(3, seed=2, **NEAR)
    first.voxel_std[3] = first.patient_std[3] = 1e4  # the same in all of its patients
    joined = trained(5, seed=3, share=0.0, **NEAR)
    join_branches(joined, [first.state_dict(), second.state_dict()])
    voxels, patient = torch.randn(2, 7, len(joined.voxel_mean)), 0.1 * torch.randn(2, len(joined.patient_mean))
    apart = torch.cat([first(voxels[..., : len(first.voxel_mean)], patient), second(voxels, patient)])
    assert joined.share == pytest.approx(0.7)
    assert len(first.voxel_mean) < len(joined.voxel_mean) and apart.std() > 0.5
    torch.testing.assert_close(joined(voxels, patient), apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("members", "options", "told"), [
    (4, {}, "5 members .*expected 4"),
    (5, {"width": 6}, "number 1 .*of another branch"),
])  # fmt: skip
def test_branches_that_do_not_fit_are_told(members, options, told):
    joined = trained(members, seed=3, **NEAR, **options)
    before = {name: value.clone() for name, value in joined.state_dict().items()}
    with pytest.raises(CaseError, match=told):
        join_branches(joined, [trained(2, seed=1).state_dict(), trained(3, seed=2, **NEAR).state_dict()])
    assert all(torch.equal(value, before[name]) for name, value in joined.state_dict().items())


def test_branches_without_the_last_features_cannot_hold_those_with_them():
    with pytest.raises(CaseError, match="number 1 .*of another branch"):
        join_branches(trained(3, seed=3), [trained(3, seed=2, **NEAR).state_dict()])


def test_shares_must_agree():
    with pytest.raises(CaseError, match=r"shares \[0.2"):
        join_branches(trained(4, seed=3), [trained(2, seed=1, share=0.2).state_dict(), trained(2, seed=2).state_dict()])
