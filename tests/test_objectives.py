"""Objectives on a network small enough to compute by hand, and on a small ADDiff-Dose."""

import pytest
import torch
from torch import nn

from custom.case import CaseError
from custom.networks.addiff_dose import ADDiffDose
from custom.networks.blocks import NoiseSchedule
from custom.networks.broad import BroadBranch
from custom.objectives import (
    AutoencoderObjective,
    BroadObjective,
    DiffusionObjective,
    RegressionObjective,
)
from custom.objectives_dvh import DvhFit, LeftOutDoses

CHANNELS = ["ct", "prescription", "body", "plan_prior", "has_ct"]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 5, 8, 8, 8, generator=generator)
    image[:, 2] = 1
    return {
        "image": image,
        "label": torch.rand(2, 1, 8, 8, 8, generator=generator),
        "body": torch.ones(2, 1, 8, 8, 8, dtype=torch.uint8),
        "rois": (torch.rand(2, 2, 8, 8, 8, generator=generator) > 0.5).to(torch.uint8),
        "voxel_cc": torch.tensor([0.1, 0.1]),
        "prescription_gy": torch.tensor([70.0, 70.0]),
    }


def make_network(**changes) -> ADDiffDose:
    torch.manual_seed(0)
    unet = {"channels": [8, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]}
    denoiser = {**unet, "attention_levels": [], "embedding_dim": 8, "conditional": {"dim": 12, "heads": 2}}
    arguments = {"prior": {**unet, "embedding_dim": 4}, "denoiser": denoiser, "structure_widths": [4, 8],
                 "token_dim": 12, "ct_encoder": {"channels": [4, 8], "latent_channels": 2}}  # fmt: skip
    return ADDiffDose(CHANNELS, CHANNELS[4:], **{**arguments, **changes})


class Ideal(nn.Module):
    """Knows the dose: its output is exact in every parameterization."""

    residual_scale = 0.5

    def __init__(self, label, kind):
        super().__init__()
        self.schedule, self.label = NoiseSchedule(parameterization=kind), label

    def encode(self, image):
        return type("Conditions", (), {"prior": None})()

    def from_dose(self, dose, conditions):
        return 2 * dose - 1

    def denoise(self, x_t, t, conditions):
        return 2 * self.label - 1

    def denoise_output(self, x_t, t, conditions):
        x0 = 2 * self.label - 1
        a, s = self.schedule.scales(t)
        return self.schedule.target(x0, (x_t - a * x0) / s, t)


@pytest.mark.parametrize("kind", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("one_step_share", [0.0, 1.0])
def test_ideal_denoiser_has_no_error(batch, kind, one_step_share):
    terms = DiffusionObjective(one_step_share=one_step_share)(Ideal(batch["label"], kind), batch)
    assert float(sum(terms.values())) == pytest.approx(0, abs=1e-4)


def test_weight_makes_parameterizations_agree():
    """The same error of x_0 costs the same, whatever the network's output means."""
    t, objective = torch.tensor([5, 400, 990]), DiffusionObjective(snr_limit=5.0)
    costs = []
    for kind in ("sample", "v", "epsilon"):
        schedule = NoiseSchedule(parameterization=kind)
        zero = torch.zeros(3, 1, 1, 1, 1)
        per_output = schedule.to_x0(zero + 1, zero, t) - schedule.to_x0(zero, zero, t)  # d x_0 / d output
        costs.append(objective._weight(schedule, t) / per_output.square())
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-3, atol=0)


def test_regression_terms(batch):
    objective = RegressionObjective(0.1, 0.2, 0.3, roi_names=["PTV", "Cord"], target_names=["PTV"])
    network = make_network(denoiser=None, ct_encoder=None)
    terms = objective(network, batch)
    assert set(terms) == {"l1", "dvh", "criteria", "gradient"}
    plan = batch["image"][:, 3:4]
    torch.testing.assert_close(terms["l1"], (plan - batch["label"]).abs().mean())
    sum(terms.values()).backward()
    assert network.gain.grad is not None


def test_what_the_broad_branch_replaces_does_not_count():
    """A shift of all blocks beside the targets costs what is left of it; in the targets, and within blocks, all."""
    rois = torch.zeros(1, 2, 8, 8, 8)
    rois[:, 0, :2] = 1
    batch = {"label": torch.zeros(1, 1, 8, 8, 8), "body": torch.ones(1, 1, 8, 8, 8), "rois": rois}
    objective = RegressionObjective(roi_names=["PTV", "Cord"], target_names=["PTV"], broad_share=0.75)
    shift = torch.ones(1, 1, 8, 8, 8)
    kept = shift - 0.75 * objective._broad(shift, batch)
    assert (kept[:, :, :2] == 1).all() and torch.allclose(kept[:, :, 4:], torch.tensor(0.25))
    stripes = (-1.0) ** torch.arange(8).expand(1, 1, 8, 8, 8)
    assert float(objective.terms(stripes, batch)["l1"]) == 1
    assert float(objective.terms(shift, batch)["l1"]) == pytest.approx(float(kept.mean()))


def test_regression_calls_networks_without_a_prior(batch):
    network = nn.Conv3d(5, 1, 1)
    expected = (network(batch["image"]) - batch["label"]).abs().mean()
    torch.testing.assert_close(RegressionObjective()(network, batch)["l1"], expected)


def test_diffusion_trains_the_denoiser_alone(batch):
    network = make_network().train()
    for share in (0.0, 1.0):
        sum(DiffusionObjective(one_step_share=share)(network, batch).values()).backward()
    assert float(network.denoiser.unet.out.weight.grad.abs().sum()) > 0
    assert all(p.grad is None for p in network.prior.parameters())


def test_diffusion_repeats_under_a_seed(batch):
    network = make_network()
    values = []
    for _ in range(2):
        objective = DiffusionObjective(generator=torch.Generator().manual_seed(3))
        values.append([float(sum(objective(network, batch).values())) for _ in range(3)])
    assert values[0] == values[1]


def test_one_step_term_is_the_dose_error_in_residual_units(batch):
    network = make_network()
    terms = DiffusionObjective(one_step_share=1.0)(network, batch)
    prior = network.eval().predict_prior(batch["image"])
    torch.testing.assert_close(0.05 * terms["one_step"], (prior - batch["label"]).abs().mean())


def test_autoencoder_anneals_the_kl_term(batch):
    network = make_network(frozen=()).train()
    objective, whole = AutoencoderObjective(kl_weight=1.0, anneal=0.5), AutoencoderObjective(kl_weight=1.0)
    kl = []
    for objective.progress in (0.0, 0.25, 0.5, 1.0):
        torch.manual_seed(0)
        kl.append(float(objective(network, batch)["kl"]))
    torch.manual_seed(0)
    full = float(whole(network, batch)["kl"])
    assert kl == pytest.approx([0.0, full / 2, full, full], rel=1e-5) and full > 0


def test_autoencoder_learns(batch):
    network, objective = make_network(frozen=()).train(), AutoencoderObjective()
    optimizer = torch.optim.Adam(network.ct_encoder.parameters(), lr=1e-2)
    batch["image"][:, 0] = torch.linspace(-1, 1, 8).reshape(8, 1, 1)
    errors = []
    for _ in range(60):
        terms = objective(network, batch)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        errors.append(terms["reconstruction"].item())
    assert errors[-1] < 0.5 * errors[0]


def test_wrong_arguments_are_named():
    with pytest.raises(CaseError, match="Lens"):
        RegressionObjective(roi_names=["PTV"], target_names=["Lens"])
    with pytest.raises(CaseError, match="'huber'"):
        DiffusionObjective(kind="huber")


def dvh_case(seed: int, structures: bool) -> dict:
    """A prepared case of a network of seven channels: a plan in a box, its reference a tenth lower."""
    random = torch.Generator().manual_seed(seed)
    image = torch.zeros(len(DVH_SPATIAL), 8, 8, 6)
    image[DVH_SPATIAL.index("body"), 1:-1, 1:-1] = 1
    image[DVH_SPATIAL.index("plan_prior")] = image[DVH_SPATIAL.index("body")] * torch.rand(8, 8, 6, generator=random)
    image[DVH_SPATIAL.index("sdm_target_high")] = -1
    if structures:
        image[DVH_SPATIAL.index("sdm_target_high"), 3:6, 3:6, 2:5] = 1
    label = 0.9 * image[[DVH_SPATIAL.index("plan_prior")]]
    return {"image": image, "context": torch.ones(3), "label": label, "prescription_gy": 60.0}


DVH_SPATIAL = ["prescription", "sdm_target_high", "body", "plan_prior"]
DVH_CONTEXT = ["spacing_x", "spacing_y", "spacing_z"]


def dvh_network(**dvh) -> ADDiffDose:
    return ADDiffDose(DVH_SPATIAL + DVH_CONTEXT, DVH_CONTEXT, dvh={"patients": 6, **dvh},
                      prior={"channels": [8], "encoder_blocks": [1], "decoder_blocks": []})


def test_dvh_fit_writes_the_network_and_what_it_is_worth(tmp_path):
    network = dvh_network()
    rows = DvhFit(network, [dvh_case(i, True) for i in range(6)], tmp_path, 0.5, progress=False).run()
    assert {(row["structure"], row["metric"]) for row in rows} == {("target_high", m) for m in ("D99", "D95", "D1")}
    d1 = next(row for row in rows if row["metric"] == "D1")
    assert d1["first_error_gy"] == pytest.approx(6.0, abs=0.4)  # a tenth of about 60 Gy
    assert d1["left_out_error_gy"] < 1.0
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert state["dvh.share"] == 0.5 and state.keys() == network.state_dict().keys()
    assert len((tmp_path / "dvh_estimate.csv").read_text().splitlines()) == 4


class Says(BroadBranch):
    """A branch whose dose is its share, and that of a mirrored patient twice as much."""

    def told(self, spatial, context, where):
        mirrored = spatial[DVH_SPATIAL.index("prescription"), 0].any()
        return (2 if mirrored else 1) * self.share * where.float()


def fold_weights(folder, shares) -> list:
    paths = [folder / f"fold{k}.pt" for k in range(len(shares))]
    for path, share in zip(paths, shares):
        branch = BroadBranch(DVH_SPATIAL, DVH_CONTEXT, members=1)
        branch.share.fill_(share)
        torch.save({f"broad.{k}": v for k, v in branch.state_dict().items()} | {"gain": torch.ones(())}, path)
    return paths


def test_left_out_doses_are_those_of_the_branch_that_has_not_seen_the_case(tmp_path, monkeypatch):
    monkeypatch.setattr("custom.objectives_dvh.BroadBranch", Says)
    left_out = LeftOutDoses(fold_weights(tmp_path, (0.2, 0.4)), 2, {"members": 1}, DVH_SPATIAL, DVH_CONTEXT)
    for number, expected in ((0, 0.2), (1, 0.4), (2, 0.2), (5, 0.4)):
        case = dvh_case(number, True)
        case["image"][DVH_SPATIAL.index("prescription"), -1] = 1  # tells the mirror image
        dose = left_out(number, case["image"], case["context"])
        inside = case["image"][DVH_SPATIAL.index("sdm_target_high")] > 0
        assert torch.allclose(dose[inside], torch.tensor(1.5 * expected)) and not dose[~inside].any()


def test_dvh_fit_learns_from_doses_of_cases_that_were_left_out(tmp_path):
    class Tenth:
        def __call__(self, number, image, context):
            return 0.8 * image[DVH_SPATIAL.index("plan_prior")]

    network = dvh_network(sees_dose=True)
    rows = DvhFit(network, [dvh_case(i, True) for i in range(6)], tmp_path, 0.5, Tenth(), progress=False).run()
    d1 = next(row for row in rows if row["metric"] == "D1")
    assert d1["first_error_gy"] == pytest.approx(6.0, abs=0.4)  # 0.9 and 0.8 of about 60 Gy
    assert d1["left_out_error_gy"] < 1.0


def test_doses_that_are_not_left_out_are_refused(tmp_path):
    with pytest.raises(CaseError, match="give fold_weights"):
        DvhFit(dvh_network(sees_dose=True), [], tmp_path, 0.5)
    paths, channels = fold_weights(tmp_path, (0.2,)), (DVH_SPATIAL, DVH_CONTEXT)
    with pytest.raises(CaseError, match="extra_dirs"):
        LeftOutDoses(paths, 1, {"members": 1}, *channels, extra_dirs=["synthetic"])
    with pytest.raises(CaseError, match="no fold's weights at .*fold7"):
        LeftOutDoses([tmp_path / "fold7.pt"], 1, {"members": 1}, *channels)
    with pytest.raises(CaseError, match="of another broad branch than fold_def"):
        LeftOutDoses(paths, 1, {"members": 2}, *channels)
    with pytest.raises(CaseError, match="names 1 models; expected one of each of the 2 folds"):
        LeftOutDoses(paths, 2, {"members": 1}, *channels)
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    with pytest.raises(CaseError, match="fold0.pt is no weights file"):
        LeftOutDoses(paths, 1, {"members": 1}, *channels)


def test_dvh_fit_without_anything_to_fit_is_an_error(tmp_path):
    with pytest.raises(CaseError, match="no DVH estimate"):
        DvhFit(nn.Linear(1, 1), [], tmp_path, 0.5)
    with pytest.raises(CaseError, match="three or more of the 4 cases"):
        DvhFit(dvh_network(), [dvh_case(i, False) for i in range(4)], tmp_path, 0.5, progress=False).run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_voxels_count_by_the_dose_of_their_error(kind):
    """A voxel whose unit is three times as much dose counts nine times in squares, three times in absolute values."""

    class Halves(nn.Module):
        schedule = NoiseSchedule(parameterization="sample")

        def encode(self, image):
            return None

        def from_dose(self, dose, conditions):
            return torch.zeros_like(dose)

        def denoise_output(self, x_t, t, conditions):
            return torch.cat([torch.ones(1, 1, 2, 4, 4), torch.full((1, 1, 2, 4, 4), 2.0)], dim=2)

        def dose_unit(self, conditions):
            return torch.cat([torch.full((1, 1, 2, 4, 4), 0.03), torch.full((1, 1, 2, 4, 4), 0.01)], dim=2)

    zeros = torch.zeros(1, 1, 4, 4, 4)
    batch = {"image": zeros, "label": zeros, "body": zeros + 1}
    found = float(DiffusionObjective(snr_limit=None, one_step_share=0.0, kind=kind)(Halves(), batch)["diffusion"])
    expected = (9 * 1 + 1 * 4) / 10 if kind == "mse" else (3 * 1 + 1 * 2) / 4
    assert found == pytest.approx(expected)


def test_broad_errors_are_made_independent_before_they_count():
    """Errors mixed as the model says, from known independent ones: those are what is counted, in dose."""
    spatial = ["body", "prescription", "plan_prior", "plan_beam_0", "plan_beam_40"]
    context = ["spacing_x", "spacing_y", "spacing_z"]
    small = {"channels": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]}
    network = ADDiffDose(
        [*spatial, *context], context, prior=small, residual_scale=[[0.0, 0.02], [1.0, 0.06]],
        noise={"scales_voxels": [2, 6], "shares": [1, 1]}, broad={"members": 2, "width": 4, "patient_width": 2},
    )  # fmt: skip
    nn.init.zeros_(network.broad.perceptrons.last.bias)  # so that nothing is predicted yet
    image = torch.rand(len(spatial), 12, 10, 8, generator=torch.Generator().manual_seed(0))
    image[0], image[1, 4:6, 4:6, 4:6] = 1.0, 1.0
    seen = network.broad.features(image, torch.ones(3))
    voxels, patient = seen.voxels[None, ::3], seen.patient[None]
    alike = network.noise.correlation(network.broad.places_voxels(voxels, patient), voxels[..., network.broad.beams])
    size = network.residual_scale(voxels[..., 2])
    alone = torch.randn(1, voxels.shape[1], generator=torch.Generator().manual_seed(1))
    mixed = torch.linalg.cholesky(alike + 0.3 * torch.eye(voxels.shape[1])) @ alone[..., None]
    batch = {"voxels": voxels, "patient": patient, "residual": -size * mixed[..., 0], "weight": torch.ones_like(size)}
    counted = float(BroadObjective(0.3)(network, batch)["l1"])
    assert counted == pytest.approx(float((alone * size).abs().mean()), rel=1e-3)
    counted = float(BroadObjective()(network, batch)["l1"])
    assert counted == pytest.approx(float(batch["residual"].abs().mean()), rel=1e-5)
    BroadObjective(0.3)(network, batch)["l1"].backward()
    assert float(network.broad.perceptrons.last.weight.grad.abs().sum()) > 0
    network.noise = None
    with pytest.raises(CaseError, match="wants the network's noise"):
        BroadObjective(0.3)(network, batch)
    with pytest.raises(CaseError, match="independent 0"):
        BroadObjective(0)
