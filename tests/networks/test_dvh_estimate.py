"""The DVH estimate: its figures by hand, its metrics as OpenKBP counts them, and where it moves a dose."""

import numpy as np
import pytest
import torch

from custom.case import CaseError
from custom.inferers import DoseDiffusionInferer
from custom.metrics import openkbp_dvh
from custom.networks.addiff_dose import ADDiffDose
from custom.networks.dvh_estimate import DvhEstimator
from custom.networks.dvh_figures import StructureFigures
from custom.networks.growth import grow

SPATIAL = ["ct", "prescription", "sdm_target_high", "sdm_target_low", "sdm_SpinalCord", "sdm_Larynx", "body",
           "plan_prior", "plan_prior_coverage", "plan_beam_0", "plan_beam_180"]
CONTEXT = ["is_vmat", "is_lung", "prescription_level", "spacing_x", "spacing_y", "spacing_z"]
SPACING_MM = (4.0, 4.0, 3.0)
SIZE = (20, 18, 14)
NAMES = ["target_high", "target_low", "SpinalCord", "Larynx"]


def estimator(**options) -> DvhEstimator:
    return DvhEstimator(SPATIAL, CONTEXT, **{"patients": 30, **options})


def patient(seed: int = 0, larynx: bool = True, vmat: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes in a box of tissue, under a plan that falls off from the middle."""
    random = torch.Generator().manual_seed(seed)
    size = torch.randint(2, 4, (3,), generator=random).tolist()
    spatial = torch.zeros(len(SPATIAL), *SIZE)

    def box(name: str, centre: tuple[int, int, int], half: list[int]) -> None:
        spatial[SPATIAL.index(name)] = -1.0
        spatial[SPATIAL.index(name)][tuple(slice(c - h, c + h) for c, h in zip(centre, half))] = 1.0

    box("body", (10, 9, 7), [9, 8, 7])
    spatial[SPATIAL.index("body")].clamp_(min=0)
    box("sdm_target_high", (10, 8, 7), size)
    box("sdm_target_low", (6, 8, 7), [2, 3, 3])
    box("sdm_SpinalCord", (10, 14, 7), [1, 2, 6])
    spatial[SPATIAL.index("sdm_Larynx")] = -1.0
    if larynx:
        box("sdm_Larynx", (10, 3, 7), [2, 2, 2])
    place = torch.stack(torch.meshgrid(*[torch.arange(n) - n / 2 for n in SIZE], indexing="ij")).square().sum(0)
    body = spatial[SPATIAL.index("body")]
    plan = torch.exp(-place / (60.0 + 20 * torch.rand((), generator=random))) * body
    spatial[SPATIAL.index("plan_prior")] = plan
    spatial[SPATIAL.index("plan_prior_coverage")] = 1.05 * plan
    spatial[SPATIAL.index("plan_beam_0")] = 0.75 * plan
    spatial[SPATIAL.index("plan_beam_180")] = 0.25 * plan
    return spatial, torch.tensor([vmat, 0.0, 1.0, *(edge / 4.0 for edge in SPACING_MM)])


def predicted(plan: torch.Tensor, seed: int) -> torch.Tensor:
    """A dose that is 0.8 to 1 of the plan."""
    return plan * (0.8 + 0.2 * torch.rand((), generator=torch.Generator().manual_seed(seed)))


def fitted(share: float = 1.0, count: int = 24, **options) -> DvhEstimator:
    """Fitted to references that are nine tenths of the plan prior, or of the predicted dose."""
    made = estimator(**options)
    patients = []
    for seed in range(count):
        spatial, context = patient(seed, larynx=seed % 3 > 0)
        plan = spatial[SPATIAL.index("plan_prior")]
        guess = predicted(plan, seed) if made.figures.sees_dose else plan
        reference = made.figures.metrics(0.9 * guess, spatial, context)
        patients.append((made.figures(spatial, context, guess), reference))
    made.fit(patients, share)
    return made


@pytest.fixture(scope="module")
def taught() -> DvhEstimator:
    return fitted()


def told(made: DvhEstimator, goal: torch.Tensor, trust: float = 1.0) -> DvhEstimator:
    """An estimator that says this, whoever comes."""
    made.share.fill_(1.0)
    made.estimate = lambda figures: (goal, torch.full((len(goal),), trust))
    return made


def test_metrics_are_those_of_the_challenge():
    spatial, context = patient()
    dose = torch.rand(SIZE, generator=torch.Generator().manual_seed(9))
    found = estimator().figures.metrics(dose, spatial, context)
    for row, name in zip(found, NAMES):
        inside = dose[spatial[SPATIAL.index(f"sdm_{name}")] > 0].numpy()
        expected = openkbp_dvh(inside, float(np.prod(SPACING_MM)), name.startswith("target"))
        assert np.allclose(row[: len(expected)].numpy(), list(expected.values()), atol=1e-5)


def test_figures_say_what_the_plan_gives_and_where_a_structure_lies():
    spatial, context = patient()
    made = estimator()
    figures = made.figures(spatial, context)
    cord = figures.values[NAMES.index("SpinalCord")]
    mask = spatial[SPATIAL.index("sdm_SpinalCord")] > 0
    plan = spatial[SPATIAL.index("plan_prior")][mask]
    assert cord[3] == pytest.approx(float(plan.median()), abs=1e-3) and cord[7] == pytest.approx(float(plan.mean()))
    assert cord[15] == pytest.approx(0.05 * float(plan.mean()), abs=1e-5)  # the other trade-off's mean is 5 % higher
    assert cord[16] == pytest.approx(float(np.log(mask.sum() * np.prod(SPACING_MM) / 1e3)), abs=1e-5)
    beams = made.groups.index("beams")
    members = made.membership[beams] > 0
    assert torch.allclose(cord[members][:2], torch.tensor([0.75, 0.25]), atol=1e-5)
    place = made.membership[made.groups.index("place")] > 0
    target = spatial[SPATIAL.index("sdm_target_high")] > 0
    treated = (target | (spatial[SPATIAL.index("sdm_target_low")] > 0)).nonzero().float().mean(0)
    offset = (mask.nonzero().float().mean(0) - treated) * torch.tensor(SPACING_MM) / 50
    assert torch.allclose(cord[place][:3], offset, atol=1e-4)


def group(made: DvhEstimator, row: torch.Tensor, name: str) -> torch.Tensor:
    return row[made.membership[made.groups.index(name)] > 0]


def test_figures_say_what_the_plan_gives_nearby_and_around_the_targets():
    """A plan of 1 in the targets and half of it elsewhere: over 5 mm it is a step that a Gaussian has blurred."""
    spatial, context = patient()
    made = estimator()
    low = spatial[SPATIAL.index("sdm_target_low")]
    low.fill_(-1.0)
    high = spatial[SPATIAL.index("sdm_target_high")]
    high[:10], high[10:] = 1.0, -0.3  # 15 mm and more away, all of it
    body = spatial[SPATIAL.index("body")]
    plan = spatial[SPATIAL.index("plan_prior")]
    plan.copy_((0.5 + 0.5 * (high > 0)) * body)
    spatial[SPATIAL.index("plan_prior_coverage")] = 1.1 * plan
    figures = made.figures(spatial, context)
    shells = group(made, figures.values[0], "shells")
    assert torch.allclose(shells[:5], torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0]), atol=1e-5)  # 10 to 20 mm
    assert torch.allclose(shells[5:], 0.1 * shells[:5], atol=1e-5)
    cord = figures.values[NAMES.index("SpinalCord")]
    nearby = group(made, cord, "nearby")
    edges = (np.arange(20) - 9.5) * 4.0
    weight = np.exp(-0.5 * ((edges[9] - edges) / 5.0) ** 2)
    step = float((weight * np.where(np.arange(20) < 10, 1.0, 0.5))[1:19].sum() / weight.sum())  # air at both ends
    assert float(nearby[0]) == pytest.approx(step - 1.0, abs=0.02)  # the hottest voxels lie beside the step
    hot, cold = group(made, cord, "hot"), group(made, cord, "cold")
    assert hot[0] == pytest.approx(1.0) and hot[1] == pytest.approx(1.1, abs=1e-5) and hot[2] < hot[0]
    assert cold[0] == pytest.approx(0.5)  # of an organ, what lies outside the targets


def test_departs_from_the_predicted_dose_where_it_sees_one():
    made = fitted(sees_dose=True)
    spatial, context = patient(100)
    plan = spatial[SPATIAL.index("plan_prior")]
    dose = predicted(plan, 100)
    figures = made.figures(spatial, context, dose)
    first = made.figures.metrics(dose, spatial, context)
    assert torch.allclose(figures.first, first, atol=1e-6)
    apart = group(made, figures.values[0], "dose")
    assert torch.allclose(apart, first[0] - made.figures.metrics(plan, spatial, context)[0], atol=1e-6)
    estimate, _ = made.estimate(figures)
    assert (estimate - 0.9 * first).abs().mean() < 0.3 * (0.1 * first).abs().mean()
    moved = dose + made.shift(dose[None, None], spatial[None], context[None])[0, 0]
    now = made.figures.metrics(moved, spatial, context)
    assert (now - estimate)[:2].abs().max() < 0.01
    assert (now - estimate).abs().mean() < 0.5 * (first - estimate).abs().mean()
    with pytest.raises(CaseError, match="was given none"):
        made.figures(spatial, context)


def test_absent_structures_are_unknown_and_the_others_are_not():
    spatial, context = patient(larynx=False)
    figures = estimator().figures(spatial, context)
    absent = torch.isnan(figures.values[:, 0])
    assert absent.tolist() == [False, False, False, True]
    assert torch.isfinite(figures.first).all()


def test_learns_how_references_depart_from_the_plan(taught):
    spatial, context = patient(100)
    plan = spatial[SPATIAL.index("plan_prior")]
    estimate, trust = taught.estimate(taught.figures(spatial, context))
    truth, first = (taught.figures.metrics(f * plan, spatial, context) for f in (0.9, 1.0))
    assert torch.equal(trust, torch.ones(4))
    assert (estimate - truth).abs().mean() < 0.3 * (first - truth).abs().mean()


def test_a_dose_is_moved_to_the_metrics_and_nowhere_else():
    spatial, context = patient()
    made = estimator()
    dose = spatial[SPATIAL.index("plan_prior")]
    goal = made.figures.metrics(dose, spatial, context)
    goal += torch.tensor([[0.03, 0.02, -0.02], [-0.02, 0.01, 0.03], [-0.04, 0.02, 0.0], [0.05, 0.04, 0.0]])
    moved = dose + told(made, goal).shift(dose[None, None], spatial[None], context[None])[0, 0]
    assert torch.allclose(made.figures.metrics(moved, spatial, context), goal, atol=2e-3)
    anywhere = torch.stack(made.figures.masks(spatial)).any(0)
    assert torch.equal(moved[~anywhere], dose[~anywhere]) and moved.min() >= 0
    hot = spatial[SPATIAL.index("sdm_SpinalCord")] > 0
    assert (moved - dose)[hot][dose[hot].argmax()] < 0 < (moved - dose)[hot].mean()


def test_no_voxel_of_a_small_target_runs_away():
    """D99 of 75 voxels is little of the coldest one's dose: whatever is asked, no voxel moves much more than that."""
    spatial, context = patient()
    low = spatial[SPATIAL.index("sdm_target_low")]
    low.fill_(-1.0)
    low[2:7, 6:11, 6:9] = 1.0
    dose = spatial[SPATIAL.index("plan_prior")]
    made = estimator()
    goal = made.figures.metrics(dose, spatial, context)
    goal[NAMES.index("target_low"), 0] -= 1.0
    moved = dose + told(made, goal).shift(dose[None, None], spatial[None], context[None])[0, 0]
    assert (moved - dose).abs().max() <= 0.1 + 1e-6


def test_half_a_share_goes_half_of_the_way_and_none_nowhere():
    spatial, context = patient()
    dose = spatial[SPATIAL.index("plan_prior")]
    before = estimator().figures.metrics(dose, spatial, context)
    goal = before + 0.04 * torch.tensor([1.0, 1.0, 1.0])
    goal[2:, 2] = 0
    for trust, expected in ((0.5, 0.02), (0.0, 0.0)):
        made = told(estimator(), goal, trust)
        moved = dose + made.shift(dose[None, None], spatial[None], context[None])[0, 0]
        change = made.figures.metrics(moved, spatial, context) - before
        assert torch.allclose(change[:2], torch.full((2, 3), expected), atol=1e-3)
    made.share.fill_(0.0)
    assert not made.shift(dose[None, None], spatial[None], context[None]).any()


def test_no_figure_is_changed_by_more_than_a_tenth_of_the_prescription():
    spatial, context = patient()
    dose = spatial[SPATIAL.index("plan_prior")]
    made = estimator()
    before = made.figures.metrics(dose, spatial, context)
    moved = dose + told(made, before + 5).shift(dose[None, None], spatial[None], context[None])[0, 0]
    assert (made.figures.metrics(moved, spatial, context) - before).max() < 0.1 + 1e-3


@pytest.mark.parametrize("stranger", ["vmat", "far", "prescription"])
def test_a_patient_of_another_kind_is_left_as_he_is(taught, stranger):
    spatial, context = patient(3, vmat=1.0 if stranger == "vmat" else 0.0)
    if stranger == "prescription":
        context[2] = 60 / 70
    if stranger == "far":
        spatial[SPATIAL.index("plan_prior")] = spatial[SPATIAL.index("plan_prior")].flip(1) * 3
        spatial[SPATIAL.index("plan_prior_coverage")] *= -4
        spatial[SPATIAL.index("plan_beam_0")] *= -4
    dose = spatial[SPATIAL.index("body")] * 0.5
    assert not taught.shift(dose[None, None], spatial[None], context[None]).any()
    assert not taught.estimate(taught.figures(spatial, context))[1].any()


def test_a_patient_without_targets_gives_no_nan(taught):
    spatial, context = patient(2)
    for name in ("sdm_target_high", "sdm_target_low", "prescription"):
        spatial[SPATIAL.index(name)] = 0
    dose = spatial[SPATIAL.index("plan_prior")]
    assert torch.isfinite(taught.shift(dose[None, None], spatial[None], context[None])).all()


def test_half_precision_keeps_the_estimate(taught):
    again = estimator()
    again.load_state_dict({k: v.half().float() for k, v in taught.state_dict().items()})
    figures = taught.figures(*patient(50))
    assert torch.allclose(again.estimate(figures)[0], taught.estimate(figures)[0], atol=2e-3)


def test_patients_of_another_fit_are_taken_whole_or_not_at_all(taught):
    other = network(taught, 40)
    grow(other, network(taught).state_dict())
    assert other.dvh.share == 0 and not other.dvh.seen.any()
    same = network(taught)
    grow(same, network(taught).state_dict())
    assert same.dvh.share == 1


@pytest.mark.parametrize("sees_dose", [False, True])
def test_a_trace_serves_patients_with_other_structures(taught, sees_dose):
    """No branch may depend on a patient: the trace of one without a larynx is asked about one with."""
    taught = fitted(sees_dose=True) if sees_dose else taught
    spatial, context = patient(4, larynx=False)
    dose = spatial[SPATIAL.index("plan_prior")]

    class Shift(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dvh = taught

        def forward(self, dose, spatial, context):
            return self.dvh.shift(dose, spatial, context)

    traced = torch.jit.trace(Shift(), (dose[None, None], spatial[None], context[None]), check_trace=False)
    spatial, context = patient(5)
    dose = spatial[SPATIAL.index("plan_prior")]
    asked = (dose[None, None], spatial[None], context[None])
    assert torch.allclose(traced(*asked), taught.shift(*asked), atol=1e-5) and traced(*asked).any()


def test_too_many_patients_or_too_few_are_an_error():
    made = estimator()
    spatial, context = patient()
    one = (made.figures(spatial, context), torch.zeros(4, 3))
    for patients, share in (([one] * 2, 0.5), ([one] * 31, 0.5), ([one] * 10, 1.5)):
        with pytest.raises(CaseError, match="expected 3 to 30"):
            made.fit(patients, share)
    assert isinstance(one[0], StructureFigures)
    with pytest.raises(CaseError, match="'body'. are missing"):
        DvhEstimator(["plan_prior", "sdm_target_high"], CONTEXT)
    with pytest.raises(CaseError, match="sdm_target_high.* are missing"):
        DvhEstimator(["plan_prior", "body", "sdm_SpinalCord"], CONTEXT)


def network(taught: DvhEstimator, patients: int = 30) -> ADDiffDose:
    torch.manual_seed(0)
    made = ADDiffDose(SPATIAL + CONTEXT, CONTEXT, prior={"channels": [8, 8], "encoder_blocks": [1, 1],
                                                         "decoder_blocks": [1]}, dvh={"patients": patients})
    if patients == taught.patients:
        made.dvh.load_state_dict(taught.state_dict())
    return made.eval()


def test_flips_are_averaged_before_the_estimate_is_asked(taught):
    spatial, context = patient(6)
    image = torch.cat([spatial, context[:, None, None, None].expand(-1, *SIZE)])[None]
    net = network(taught)
    options = {"condition_channels": SPATIAL + CONTEXT, "flips": [[0]]}
    bare = DoseDiffusionInferer(**options, dvh_estimate=False)(image, net)
    expected = bare + net.dvh_shift(bare, image)
    found = DoseDiffusionInferer(**options)(image, net)
    assert torch.allclose(found, expected.clamp_min(0), atol=1e-6)
    assert not torch.allclose(found, bare, atol=1e-3)
    assert torch.allclose(DoseDiffusionInferer()(image, net), net(image).clamp_min(0), atol=1e-6)
