"""The constraint term beside other objectives: of the dose they predicted, without a second pass."""

import json

import numpy as np
import pytest
import torch

from custom.engines import PhasedObjective
from custom.networks.addiff_dose import ADDiffDose
from custom.objectives import AutoencoderObjective, DiffusionObjective, RegressionObjective
from custom.protocol.loss import ConstraintLoss
from custom.protocol.objective import ConstraintObjective

SHAPE = (16, 16, 8)
SPATIAL = ["ct", "body", "prescription", "sdm_target_high", "sdm_SpinalCord"]
CONTEXT = ["prescription_level", "spacing_x", "spacing_y", "spacing_z"]
NAMES = [*SPATIAL, *CONTEXT]


@pytest.fixture(scope="module")
def batch():
    target, cord = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    target[3:8, 3:8, 2:6], cord[11:13, 11:13] = True, True
    spatial = [np.zeros(SHAPE), np.ones(SHAPE), target, *(np.where(m, 0.1, -0.1) for m in (target, cord))]
    image = np.stack([*spatial, *(np.full(SHAPE, v) for v in (1.0, 1.0, 1.0, 1.25))]).astype(np.float32)
    label = torch.from_numpy(np.where(target, 1.0, 0.3).astype(np.float32))[None, None]
    return {"image": torch.from_numpy(image)[None], "label": label, "body": torch.ones_like(label)}


def make_network(with_prior=True):
    torch.manual_seed(0)
    small = {"channels": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]}
    return ADDiffDose(NAMES, CONTEXT, prior=small if with_prior else None, denoiser=small | {"attention_levels": [1]},
                      token_dim=8, detail_channels=["prescription", "body"], structure_widths=[4, 8],
                      ct_encoder={"channels": [4, 8], "latent_channels": 2})


@pytest.fixture
def network():
    return make_network()


@pytest.fixture
def loss(tmp_path):
    """A cord limit nothing meets, so that the term is never zero."""
    row = {"structure": "SpinalCord", "metric": "Mean[Gy]", "direction": "<=", "limit": 0, "weight": 1.0, "site": "any",
           "source": "test"}
    target = row | {"structure": "PTV", "metric": "Min[Gy]", "direction": ">=", "limit": 100}
    (tmp_path / "rows.json").write_text(json.dumps({"constraints": [row, target]}))
    return ConstraintLoss(NAMES, tmp_path / "rows.json", beyond_reference=False)


def count_passes(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_of_the_prior(network, batch, loss):
    calls = count_passes(network.prior)
    terms = ConstraintObjective(RegressionObjective(), loss)(network, batch)
    assert list(terms) == ["l1", "constraints"] and len(calls) == 1
    expected = loss(network.predict_prior(batch["image"]), batch["label"], batch["image"])
    assert float(terms["constraints"]) == pytest.approx(float(expected), rel=1e-5)
    terms["constraints"].backward()
    assert all(torch.isfinite(p.grad).all() for p in network.prior.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.prior.parameters())


@pytest.mark.parametrize(("share", "name"), [(1.0, "one_step"), (0.0, "diffusion")])
def test_of_the_denoiser(network, batch, loss, share, name):
    calls = count_passes(network.denoiser)
    objective = DiffusionObjective(one_step_share=share, generator=torch.Generator().manual_seed(0))
    terms = ConstraintObjective(objective, loss)(network, batch)
    assert list(terms) == [name, "constraints"] and len(calls) == 1 and float(terms["constraints"].detach()) > 0
    terms["constraints"].backward()
    grads = {part: [p.grad for p in getattr(network, part).parameters() if p.grad is not None] for part in
             ("prior", "denoiser")}
    assert grads["prior"] == [] and any(g.abs().max() > 0 for g in grads["denoiser"])


def test_one_step_is_judged_on_the_dose_that_inference_gives(network, batch, loss):
    terms = ConstraintObjective(DiffusionObjective(one_step_share=1.0), loss)(network.eval(), batch)
    expected = loss(network(batch["image"]), batch["label"], batch["image"])
    assert float(terms["constraints"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_objectives_without_a_dose_have_no_term_and_phases_change(network, batch, loss):
    assert set(ConstraintObjective(AutoencoderObjective(), loss)(network, batch)) == {"reconstruction", "kl"}
    phased = PhasedObjective(RegressionObjective(), DiffusionObjective(one_step_share=1.0), change_at=0.5)
    objective = ConstraintObjective(phased, loss)
    found = []
    for progress in (0.1, 0.9):
        objective.progress = progress
        found.append(list(objective(network, batch)))
    assert found == [["l1", "constraints"], ["one_step", "constraints"]] and objective.progress == 0.9


def test_training_on_it_spares_the_cord(network, batch, tmp_path):
    """A few steps on the term alone bring a cord that gets too much below its limit, as the reference is."""
    row = {"structure": "SpinalCord", "metric": "Max[Gy]", "direction": "<=", "limit": 25, "weight": 1.0, "site": "any",
           "source": "test"}
    (tmp_path / "cord.json").write_text(json.dumps({"constraints": [row]}))
    objective = ConstraintObjective(RegressionObjective(), ConstraintLoss(NAMES, tmp_path / "cord.json"))
    hot = {**batch, "label": 0.5 * batch["label"]}  # 10.5 Gy in the cord
    bias = torch.nn.Parameter(torch.tensor(0.6))
    network.predict_prior = lambda image: bias.expand(1, 1, *SHAPE)  # 42 Gy everywhere
    optimizer = torch.optim.SGD([bias], 0.03)
    for _ in range(30):
        optimizer.zero_grad()
        objective(network, hot)["constraints"].backward()
        optimizer.step()
    assert 70 * float(bias.detach()) == pytest.approx(25, abs=0.3)
