"""ADDiff-Dose: what goes in, what comes out, what it starts from, and that all of it can learn."""

import pytest
import torch

from custom.case import CaseError
from custom.networks.addiff_dose import ADDiffDose, ConditionalLayer, LightweightVAE3D, StructureEncoder

SPATIAL = ["ct", "prescription", "sdm_target_high", "sdm_Brainstem", "body", "beam_high", "plan_prior"]
CONTEXT = ["has_ct", "is_vmat", "spacing_x"]
PLAN, BODY = SPATIAL.index("plan_prior"), SPATIAL.index("body")
SMALL_PRIOR = {"channels": [4, 6, 8], "encoder_blocks": [1, 1, 1], "decoder_blocks": [1, 1], "embedding_dim": 8}
SMALL_DENOISER = {
    "channels": [8, 8, 16], "encoder_blocks": [1, 1, 1], "decoder_blocks": [1, 1], "attention_levels": [2],
    "embedding_dim": 16, "conditional": {"dim": 12, "heads": 2},
}  # fmt: skip


def make_network(**changes) -> ADDiffDose:
    torch.manual_seed(0)
    arguments = {
        "condition_channels": SPATIAL + CONTEXT,
        "context_channels": CONTEXT,
        "prior": SMALL_PRIOR,
        "denoiser": SMALL_DENOISER,
        "ct_encoder": {"channels": [4, 8], "latent_channels": 2},
        "structure_widths": [4, 6, 8],
        "token_dim": 12,
    }
    return ADDiffDose(**{**arguments, **changes})


def make_image(size=(13, 16, 9), batch=1) -> torch.Tensor:
    """A body that fills part of the volume, and context channels that are constant."""
    image = torch.rand(batch, len(SPATIAL + CONTEXT), *size, generator=torch.Generator().manual_seed(1))
    image[:, BODY] = 0
    image[:, BODY, 2:-2, 2:-2] = 1
    image[:, len(SPATIAL) :] = torch.tensor([1.0, 0.0, 3.0]).reshape(1, -1, 1, 1, 1)
    return image


def wake(network: ADDiffDose) -> ADDiffDose:
    """Move the zero-initialised layers off zero."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("size", [(13, 16, 9), (8, 8, 8), (5, 7, 3)])
@pytest.mark.parametrize("parts", [{}, {"denoiser": None}, {"prior": None}, {"ct_encoder": None}])
def test_any_size_and_part_gives_a_dose_inside_the_body(size, parts):
    image = make_image(size, batch=2)
    with torch.no_grad():
        dose = wake(make_network(**parts)).eval()(image)
    assert dose.shape == (2, 1, *size) and dose.dtype == torch.float32
    assert float(dose.min()) >= 0
    assert float(dose[image[:, BODY : BODY + 1] == 0].abs().sum()) == 0


@pytest.mark.parametrize("denoiser", [None, SMALL_DENOISER])
def test_untrained_network_answers_the_plan_prior(denoiser):
    image = make_image()
    with torch.no_grad():
        dose = make_network(denoiser=denoiser).eval()(image)
    torch.testing.assert_close(dose[:, 0], image[:, PLAN] * image[:, BODY])


@torch.no_grad()
def test_each_beam_of_the_plan_is_corrected_by_an_output_of_its_own():
    spatial = [*SPATIAL, "plan_beam_0", "plan_beam_40"]
    network = make_network(condition_channels=spatial + CONTEXT, denoiser=None).eval()
    image = make_image()
    beams = 0.1 * torch.rand(1, 2, *image.shape[2:], generator=torch.Generator().manual_seed(2))
    image = torch.cat([image[:, : len(SPATIAL)], beams, image[:, len(SPATIAL) :]], dim=1)
    body = image[:, BODY : BODY + 1]
    assert torch.allclose(network(image), image[:, PLAN : PLAN + 1] * body)  # untrained: the plan as it is
    network.prior.unet.out.bias[16:24] = 0.1  # of the second beam
    expected = (image[:, PLAN : PLAN + 1] + 0.3 * beams[:, 1:]) * body
    assert torch.allclose(network(image), expected, atol=1e-6)


@pytest.mark.parametrize("channel", ["is_vmat", "spacing_x"])
def test_context_changes_the_dose(channel):
    image, network = make_image(), wake(make_network()).eval()
    other = image.clone()
    other[:, len(SPATIAL) + CONTEXT.index(channel)] += 1
    with torch.no_grad():
        assert not torch.allclose(network(image), network(other))


def test_context_survives_zero_padding():
    image = make_image()
    padded = torch.nn.functional.pad(image, (0, 4, 0, 4, 0, 4))
    network = make_network()
    torch.testing.assert_close(network.split(padded)[1], network.split(image)[1])


def test_absent_ct_leaves_the_latent_out():
    image, network = make_image(), make_network()
    image[:, len(SPATIAL)] = 0
    other = image.clone()
    other[:, 0] = 0.5
    with torch.no_grad():
        first, second = network.encode(image).tokens, network.encode(other).tokens
    torch.testing.assert_close(first, second)


def test_gradients_reach_every_trainable_parameter():
    network = wake(make_network(frozen=())).train()
    image = make_image()
    conditions = network.encode(image)
    x0 = network.denoise(torch.randn(1, 1, 13, 16, 9), torch.tensor([500]), conditions)
    reconstruction, mean, log_variance = network.ct_encoder(network.ct_encoder.scale_ct(image[:, :1]))
    loss = (network.predict_prior(image) ** 2).sum() + (x0**2).sum()
    (loss + (reconstruction**2).sum() + (mean**2).sum() + (log_variance**2).sum()).backward()
    # the query and key of a self-attention over one voxel have no say, so the size above gives several voxels
    silent = [n for n, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().sum()) > 0]
    assert silent == []


def test_denoiser_sends_no_gradient_into_the_prior():
    network, image = wake(make_network()).train(), make_image()
    x0 = network.denoise(torch.randn(1, 1, 13, 16, 9), torch.tensor([500]), network.encode(image))
    x0.sum().backward()
    assert all(p.grad is None for p in network.prior.parameters())


def test_frozen_part_stays_in_eval_mode():
    network = make_network(frozen=["ct_encoder", "prior"]).train()
    assert network.training and not network.ct_encoder.training and not network.prior.training
    assert not any(p.requires_grad for p in network.ct_encoder.parameters())


def test_diffused_variable_is_inverted_inside_the_body():
    network, image = wake(make_network()).eval(), make_image()
    with torch.no_grad():
        conditions = network.encode(image)
        dose = torch.rand(1, 1, 13, 16, 9) * image[:, BODY : BODY + 1]
        torch.testing.assert_close(network.to_dose(network.from_dose(dose, conditions), conditions), dose)


def test_traced_network_answers_alike():
    network, image = wake(make_network()).eval(), make_image()
    with torch.no_grad():
        traced = torch.jit.trace(network, image)
        torch.testing.assert_close(traced(image), network(image))


def test_noise_schedule_and_tables_stay_out_of_the_weights():
    assert not [key for key in make_network().state_dict() if "alpha_bar" in key]


def test_prior_overfits_one_case():
    network, image = make_network(denoiser=None, ct_encoder=None).train(), make_image()
    target = 0.5 * image[:, 1:2] * image[:, BODY : BODY + 1]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    errors = []
    for _ in range(60):
        loss = (network.predict_prior(image) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.35 * errors[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_channels": ["spacing_x", "has_ct"]}, "are not the last"),
        ({"condition_channels": ["ct", *CONTEXT]}, "no 'body'"),
        ({"structure_channels": ["sdm_Lens"]}, "sdm_Lens"),
        ({"prior": None, "denoiser": None}, "at least one"),
    ],
)
def test_wrong_wiring_is_named(changes, message):
    with pytest.raises(CaseError, match=message):
        make_network(**changes)


def test_image_with_wrong_channels_is_named():
    with pytest.raises(CaseError, match=r"expected \(B, 10, X, Y, Z\)"):
        make_network()(torch.zeros(1, 4, 8, 8, 8))


def test_autoencoder_has_the_papers_compression():
    autoencoder = LightweightVAE3D((4, 8, 8, 16), latent_channels=3).eval()
    with torch.no_grad():
        reconstruction, mean, log_variance = autoencoder(torch.rand(1, 1, 96, 64, 48))
    assert mean.shape == log_variance.shape == (1, 3, 6, 4, 3)
    assert reconstruction.shape == (1, 1, 96, 64, 48)
    assert 0 <= float(reconstruction.min()) and float(reconstruction.max()) <= 1


def test_autoencoder_scales_hu():
    ct = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    torch.testing.assert_close(LightweightVAE3D.scale_ct(ct), torch.tensor([0.0, 0.5, 1.0, 1.0]))


def test_structure_features_halve_at_every_level():
    features = StructureEncoder(3, (4, 8))(torch.rand(2, 3, 8, 16, 12))
    assert [tuple(f.shape) for f in features] == [(2, 4, 4, 8, 6), (2, 8, 2, 4, 3)]


def test_conditional_layer_starts_as_identity():
    x = torch.rand(1, 6, 2, 3, 2)
    layer = ConditionalLayer(6, token_dim=5, embedding_dim=4, dim=12, heads=3)
    torch.testing.assert_close(layer(x, torch.rand(1, 7, 5), torch.rand(1, 4)), x)


def test_without_a_structure_encoder_only_the_ct_is_left_to_attend_to():
    names = ["ct", "body", "plan_prior", "sdm_Heart"]
    options = dict(prior={"channels": (8, 8), "encoder_blocks": (1, 1), "decoder_blocks": (1,)},
                   denoiser={"channels": (8, 8), "encoder_blocks": (1, 1), "decoder_blocks": (1,),
                             "attention_levels": (1,), "embedding_dim": 16}, structure_widths=None, token_dim=16)
    image = torch.rand(1, 4, 8, 8, 8)
    for ct_encoder, tokens in (({"channels": (4, 4), "latent_channels": 2}, 8), (None, 0)):
        network = ADDiffDose(names, ct_encoder=ct_encoder, **options).eval()
        assert not [name for name, _ in network.named_parameters() if name.startswith("structure")]
        assert network.encode(image).tokens.shape == (1, tokens, 16)
        assert network(image).shape == (1, 1, 8, 8, 8)
