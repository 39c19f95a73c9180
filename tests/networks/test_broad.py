"""The broad branch: what it sees of a patient, and what its share does to a dose."""

import math

import pytest
import torch

from custom.case import CaseError
from custom.networks.addiff_dose import ADDiffDose
from custom.networks.broad import BroadBranch, PerceptronEnsemble, mean_of_blocks

SPATIAL = ["ct", "prescription", "body", "plan_prior"]
CONTEXT = ["has_ct", "spacing_x", "spacing_y", "spacing_z"]
SLOPED_NAMES = ["plan_prior_coverage", "plan_prior_sparing", "beam_low"]
SPACING_MM = (4.0, 4.0, 2.0)
SIZE = (24, 20, 16)
BODY, PLAN = SPATIAL.index("body"), SPATIAL.index("plan_prior")


def branch(**options) -> BroadBranch:
    torch.manual_seed(0)
    return BroadBranch(SPATIAL, CONTEXT, **{"width": 8, "depth": 2, "members": 3, "patient_width": 4, **options})


def patient() -> tuple[torch.Tensor, torch.Tensor]:
    """A box of tissue with a target block in its middle, under a plan of half the prescription."""
    spatial = torch.zeros(len(SPATIAL), *SIZE)
    spatial[BODY, 2:-2, 2:-2] = 1
    spatial[SPATIAL.index("prescription"), 8:16, 8:12, 6:10] = 1
    spatial[PLAN] = 0.5 * spatial[BODY]
    return spatial, torch.tensor([1.0, *(edge / 4.0 for edge in SPACING_MM)])


def begun(share: float, **options) -> BroadBranch:
    made = branch(**options)
    seen = made.features(*patient())
    made.begin([(seen.voxels, seen.patient)] * 2, share)
    return made.eval()


def test_every_block_of_the_body_is_seen_and_nothing_else():
    spatial, context = patient()
    seen = branch().features(spatial, context)
    assert seen.inside.shape == tuple(n // 2 for n in SIZE)
    assert seen.inside.sum() == (24 - 4) // 2 * (20 - 4) // 2 * 16 // 2 == len(seen.voxels)
    assert torch.equal(seen.patient[: len(CONTEXT)], context)
    assert torch.allclose(seen.patient[len(CONTEXT) :], seen.voxels.mean(0))  # without beams nothing more
    assert torch.allclose(seen.voxels[:, PLAN], torch.tensor(0.5))


def test_blocks_lie_two_voxels_apart():
    made, (spatial, context) = branch(), patient()
    seen = made.features(spatial, context)
    found = made.places_voxels(seen.voxels[None], seen.patient[None])[0]
    expected = 2.0 * seen.inside.nonzero()
    torch.testing.assert_close(found - found[0], expected - expected[0])


def test_neighbourhoods_are_as_wide_as_they_say():
    """The blur of a single plane has the standard deviation asked for, in mm, along its axis alone."""
    for axis, edge in enumerate(SPACING_MM, 1):
        spatial = torch.zeros(len(SPATIAL), *(120 if a == axis else 4 for a in (1, 2, 3)))
        spatial[BODY] = 1
        spatial[PLAN].select(axis - 1, 60).fill_(1.0)
        spatial[PLAN].select(axis - 1, 61).fill_(1.0)
        seen = branch(blurred=["plan_prior"], scales_mm=[16.0]).features(spatial, patient()[1])
        column = torch.zeros(seen.inside.shape)
        column[seen.inside] = seen.voxels[:, len(SPATIAL)]
        profile = column.mean([a for a in range(3) if a != axis - 1])
        place = (torch.arange(60) - 30) * 2 * edge
        assert torch.allclose(profile.sum(), torch.tensor(1.0), atol=0.01)
        assert math.isclose(float((profile * place**2).sum()) ** 0.5, 16.0, rel_tol=0.02)


def test_places_are_told_from_the_middle_of_the_targets():
    spatial, context = patient()
    seen = branch(blurred=[]).features(spatial, context)
    x, y, z = torch.zeros(3, *seen.inside.shape)
    for number, place in enumerate((x, y, z), len(SPATIAL)):
        place[seen.inside] = seen.voxels[:, number]
    assert x[6, 4, 4] - x[5, 4, 4] == pytest.approx(2 * 4.0 / 50.0)
    assert z[6, 4, 5] - z[6, 4, 4] == pytest.approx(2 * 2.0 / 50.0)
    assert x[5, 4, 4] == pytest.approx(-x[6, 4, 4])  # the targets reach over blocks 4 to 7
    mirrored = branch(blurred=[]).features(torch.flip(spatial, [1]), context)
    assert torch.allclose(mirrored.voxels[:, len(SPATIAL)].sort().values, (-seen.voxels[:, len(SPATIAL)]).sort().values)


def test_a_patient_without_targets_or_body_gives_no_nan():
    spatial, context = patient()
    spatial[SPATIAL.index("prescription")] = 0
    assert torch.isfinite(branch().features(spatial, context).voxels).all()
    spatial[BODY] = 0
    dose = torch.zeros(1, 1, *SIZE)
    assert torch.equal(begun(0.5).blend(dose, spatial[None], context[None]), dose)


@torch.no_grad()
def test_its_share_is_that_of_the_mean_over_a_block():
    spatial, context = patient()
    body = spatial[BODY]
    dose = (0.9 * body)[None, None]
    assert torch.equal(branch().eval().blend(dose, spatial[None], context[None]), dose)  # not begun
    for share, expected in ((0.0, 0.9), (0.25, 0.8), (1.0, 0.5)):
        made = begun(share)
        made.perceptrons.last.bias.zero_()  # with the weights, which start at zero: the plan as it is
        blended = made.blend(dose, spatial[None], context[None])[0, 0]
        for side in (blended[4:7, 4:-4], blended[17:-4, 4:-4]):  # beside the targets
            assert torch.allclose(side, torch.tensor(expected), atol=1e-5)
        assert (blended[body == 0] == 0).all()
    fine = dose + 0.05 * torch.tensor([1.0, -1.0]).repeat(SIZE[2] // 2) * body  # its mean over every block is the same
    assert torch.equal(blended[8:16, 8:12, 6:10], dose[0, 0, 8:16, 8:12, 6:10])  # in the targets it has none
    change = made.blend(fine, spatial[None], context[None]) - made.blend(dose, spatial[None], context[None])
    assert torch.allclose(change[0, 0, 4:-4, 4:-4], (fine - dose)[0, 0, 4:-4, 4:-4], atol=1e-5)


@torch.no_grad()
def test_fine_members_tell_single_voxels():
    """A share of what is finer than a block; in the targets, where blocks say nothing, of all of the dose."""
    spatial, context = patient()
    stripes = torch.tensor([1.0, -1.0]).repeat(SIZE[2] // 2) * spatial[BODY]  # the mean over every block is nought
    spatial[PLAN] += 0.05 * stripes
    dose = (0.9 * spatial[BODY])[None, None]
    made = begun(1.0, fine_members=2, fine_share=0.6, target_share=0.25)
    made.perceptrons.last.bias.zero_()  # with the weights, which start at zero: the plan as it is
    blended = made.blend(dose, spatial[None], context[None])[0, 0]
    beside = (0.5 + 0.6 * 0.05 * stripes)[4:7, 4:-4]
    assert torch.allclose(blended[4:7, 4:-4], beside, atol=1e-5)
    within = (0.75 * dose[0, 0] + 0.25 * spatial[PLAN])[8:16, 8:12, 6:10]
    assert torch.allclose(blended[8:16, 8:12, 6:10], within, atol=1e-5)
    assert (blended[spatial[BODY] == 0] == 0).all()


@torch.no_grad()
def test_fine_members_are_chosen_evenly():
    made = begun(1.0, members=5, fine_members=2)
    torch.nn.init.normal_(made.perceptrons.last.weight)
    seen = made.features(*patient(), edge_voxels=1)
    assert seen.inside.shape == SIZE and torch.equal(seen.plan, patient()[0][PLAN])
    one, three = (made(seen.voxels[None], seen.patient[None])[i, 0] for i in (0, 2))
    told = made._dose(seen, seen.patient, made.fine_members)[seen.inside]
    assert torch.allclose(told, seen.plan[seen.inside] + (one + three) / 2, atol=1e-5)
    with pytest.raises(CaseError, match="fine_members 5"):
        branch(members=4, fine_members=5)


@torch.no_grad()
def test_what_is_told_of_single_voxels_is_where_it_was_asked():
    """The mean of all members there, by the features of the whole patient: asking about less changes no answer."""
    made = begun(0.5, members=3)
    torch.nn.init.normal_(made.perceptrons.last.weight, std=0.1)
    spatial, context = patient()
    where = torch.rand(spatial.shape[1:], generator=torch.Generator().manual_seed(5)) > 0.7
    told = made.told(spatial, context, where)
    everywhere = made.told(spatial, context, torch.ones_like(where))
    assert torch.allclose(told, everywhere * where, atol=1e-6)
    seen = made.features(spatial, context, edge_voxels=1)
    rows = made(seen.voxels[None], made.features(spatial, context).patient[None])[:, 0].mean(0)
    assert torch.allclose(everywhere[seen.inside], (seen.plan[seen.inside] + rows).clamp_min(0), atol=1e-5)
    assert told.any() and not everywhere[~seen.inside].any()


@torch.no_grad()
def test_what_was_always_the_same_in_training_says_nothing_later():
    """A prescription or an organ that training never saw otherwise must not move the dose by untrained weights."""
    made = begun(1.0)
    torch.nn.init.normal_(made.perceptrons.last.weight)
    seen = made.features(*patient())
    other = seen.patient.clone()
    other[0] += 1.0  # has_ct
    before, after = (made(seen.voxels[None], figures[None]) for figures in (seen.patient, other))
    assert torch.allclose(before, after, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("fine_members, options", [(0, {}), (2, {}), (2, {"slope_scales_mm": [5.0]})])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_it_answers_alike_for_another_patient(monkeypatch, fine_members, options):
    """Also where another number of voxels passes the perceptrons at once."""
    monkeypatch.setattr("custom.networks.broad.AT_ONCE", 100)
    names = [*SPATIAL, *SLOPED_NAMES] if options else SPATIAL
    spatial, context = patient()
    spatial = torch.cat([spatial, spatial[[PLAN] * (len(names) - len(SPATIAL))] ** 2])
    options = {"members": 3, "width": 8, "depth": 2, "patient_width": 4, "fine_members": fine_members, **options}
    made = BroadBranch(names, CONTEXT, **options)
    seen = made.features(spatial, context)
    made.begin([(seen.voxels, seen.patient)] * 2, 0.5)
    made.eval()
    torch.nn.init.normal_(made.perceptrons.last.weight, std=0.01)
    dose = (0.4 * spatial[BODY])[None, None]

    class Blending(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = made

        def forward(self, dose, spatial, context):
            return self.branch.blend(dose, spatial, context)

    traced = torch.jit.trace(Blending(), (dose, spatial[None], context[None]), check_trace=False)
    short = dose[..., :10], spatial[None, ..., :10], context[None] * 1.2
    assert torch.allclose(traced(*short), made.blend(*short), atol=1e-4)


def test_members_are_apart():
    torch.manual_seed(0)
    ensemble = PerceptronEnsemble(5, 4, outputs=1, width=8, depth=2, members=3, patient_width=4, patient_dropout=0.0)
    torch.nn.init.normal_(ensemble.last.weight)
    voxels, people = torch.rand(2, 7, 5), torch.rand(2, 4)
    out = ensemble(voxels, people)
    assert out.shape == (3, 2, 7, 1)
    assert torch.allclose(ensemble(voxels[1:, 3:4], people[1:])[:, 0, 0], out[:, 1, 3], atol=1e-6)
    out[1].sum().backward()
    for parameter in ensemble.parameters():
        assert parameter.grad[1].abs().sum() > 0 and parameter.grad[[0, 2]].abs().sum() == 0


def test_a_dose_that_depends_on_the_place_is_learnt():
    spatial, context = patient()
    made = branch(blurred=[], patient_dropout=0.0)
    seen = made.features(spatial, context)
    made.begin([(seen.voxels, seen.patient)] * 2, 1.0)
    wanted = 0.1 * seen.voxels[:, len(SPATIAL)]  # along x from the middle of the targets
    optimizer = torch.optim.Adam(made.parameters(), 0.01)
    for _ in range(150):
        loss = (made(seen.voxels[None], seen.patient[None]) - wanted).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * wanted.abs().mean()


BEAMS = ["plan_beam_0", "plan_beam_40", "sdm_Brainstem"]


def with_beams() -> tuple[BroadBranch, torch.Tensor, torch.Tensor]:
    """Two beams over the halves of the body, and an organ in a part of the second's."""
    spatial, context = patient()
    further = torch.zeros(3, *SIZE)
    further[0, :12], further[1, 12:], further[2] = 0.2, 0.4, -1
    further[2, 16:20, 4:8] = 0.1
    further[:2] *= spatial[BODY]
    torch.manual_seed(0)
    made = BroadBranch([*SPATIAL, *BEAMS], CONTEXT, blurred=[], width=8, depth=1, members=2, patient_width=4)
    return made, torch.cat([spatial, further]), context


def test_a_patient_has_each_beams_dose_in_each_structure():
    made, spatial, context = with_beams()
    seen = made.features(spatial, context)
    assert torch.allclose(seen.patient[-2:], torch.tensor([0.0, 0.4]))  # of the first, and of the second beam
    assert torch.equal(seen.patient[: len(CONTEXT)], context)


def test_a_beam_that_carries_more_is_learnt():
    """The outputs of the beams act on the beams' doses as they are, not on the normalised features."""
    made, spatial, context = with_beams()
    seen = made.features(spatial, context)
    made.begin([(seen.voxels, seen.patient)] * 2, 1.0)
    with torch.no_grad():
        made.perceptrons.last.bias.zero_()
        made.perceptrons.last.bias[..., 2] = 0.1  # 30 % more of the second beam
        change = made(seen.voxels[None], seen.patient[None])[0, 0]
    assert torch.allclose(change, 0.3 * seen.voxels[:, len(SPATIAL) + 1], atol=1e-6)


def test_what_it_cannot_do_is_said():
    with pytest.raises(CaseError, match="spacing_z.*missing"):
        BroadBranch(SPATIAL, CONTEXT[:-1])
    seen = branch().features(*patient())
    with pytest.raises(CaseError, match="1 patients"):
        branch().begin([(seen.voxels, seen.patient)], 0.5)
    with pytest.raises(CaseError, match="share 1.5"):
        branch().begin([(seen.voxels, seen.patient)] * 2, 1.5)
    with pytest.raises(CaseError, match="broad branch or a DVH estimate without a prior"):
        ADDiffDose(SPATIAL + CONTEXT, CONTEXT, prior=None, broad={},
                   denoiser={"channels": [8], "encoder_blocks": [1], "decoder_blocks": [], "attention_levels": []})


def test_odd_sizes_are_filled_up():
    assert mean_of_blocks(torch.ones(1, 3, 2, 2))[0, :, 0, 0].tolist() == [1.0, 0.5]


def test_slopes_are_differences_a_centimetre():
    """Of ramps: the plan along x, the prescription along y, the trade-offs' difference along z, no beam path."""
    names = [*SPATIAL, *SLOPED_NAMES]
    spatial, context = torch.zeros(len(names), *SIZE), patient()[1]
    spatial[BODY] = 1
    x, y, z = torch.meshgrid(*[torch.arange(n) * mm / 10 for n, mm in zip(SIZE, SPACING_MM)], indexing="ij")
    spatial[PLAN], spatial[names.index("prescription")] = 0.01 * x, -0.02 * y
    spatial[names.index("plan_prior_coverage")], spatial[names.index("plan_prior_sparing")] = 0.03 * z, -0.01 * z
    wanted = {(0, 0): 0.01, (1, 1): -0.02, (2, 2): 0.04}  # (axis, which of the four)
    made = BroadBranch(names, CONTEXT, scales_mm=[1.0, 12.0], slope_scales_mm=[1.0], width=8, members=1)
    for edge_voxels in (1, 2):
        seen = made.features(spatial, context, edge_voxels)
        slopes = seen.voxels[:, -12:].T.reshape(12, *seen.inside.shape).reshape(3, 4, *seen.inside.shape)
        middle = slopes[:, :, 3:-3, 3:-3, 2:-2]
        for axis in range(3):
            for which in range(4):
                assert torch.allclose(middle[axis, which], torch.tensor(wanted.get((axis, which), 0.0)), atol=1e-4)
    assert seen.patient.shape == (len(CONTEXT) + seen.voxels.shape[1] - 12,)  # slopes do not count as the patient's
    assert made.perceptrons.first.weight.shape[1] == seen.voxels.shape[1] == len(made.voxel_mean)


def test_each_beam_is_blurred_by_itself():
    _, spatial, context = with_beams()
    made = BroadBranch([*SPATIAL, *BEAMS], CONTEXT, blurred=[], beam_scales_mm=[4.0, 12.0], width=8, members=1)
    seen = made.features(spatial, context)
    plain, (near, far) = seen.voxels[:, len(SPATIAL) : len(SPATIAL) + 2], seen.voxels[:, -4:].split(2, dim=1)
    assert torch.allclose(near.sum(1).mean(), plain.sum(1).mean(), rtol=0.15)
    at_the_border = (seen.inside.nonzero()[:, 0] - 5.5).abs() < 1  # the last block of one beam, the first of the other
    spread = [(of[at_the_border] - plain[at_the_border]).abs().mean() for of in (near, far)]
    assert 0.01 < spread[0] < spread[1]
    assert (near[seen.inside.nonzero()[:, 0] < 3, 1].abs() < 1e-4).all(), "the second beam stays in its half"


def test_slopes_want_their_channels():
    with pytest.raises(CaseError, match=r"slope_scales_mm \[7.0\] are not among scales_mm"):
        branch(slope_scales_mm=[7.0])
    with pytest.raises(CaseError, match="slopes want the channels.*beam_low"):
        branch(slope_scales_mm=[12.0])
