"""The other two terms of ADDiff-Dose's loss, L = l1 L_mse + l2 L_cond + l3 L_kl (section 2.3, algorithm 1)."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from custom.networks.blocks import NoiseSchedule
from custom.objectives import AutoencoderObjective, DiffusionObjective

CONFIGS = Path(__file__).parents[2] / "bundle" / "configs"


class Autoencoder(torch.nn.Module):
    """A known latent: two means and log variances."""

    mean, log_variance = torch.tensor([0.5, -1.0]), torch.tensor([0.0, 0.7])

    def scale_ct(self, ct):
        return ct

    def forward(self, ct):
        return ct + 0.25, self.mean, self.log_variance


def test_kl_is_the_papers():
    """L_kl = 1/2 E[sigma^2 + mu^2 - 1 - log sigma^2], weighted by 0.001, beside the reconstruction's error."""
    network = SimpleNamespace(ct_encoder=Autoencoder(), training=False)
    weight = json.loads((CONFIGS / "train_autoencoder.json").read_text())["objective"]["kl_weight"]
    terms = AutoencoderObjective(kl_weight=weight)(network, {"image": torch.zeros(1, 1, 4, 4, 4)})
    expected = 0.5 * np.mean([1 + 0.25 - 1 - 0, np.exp(0.7) + 1 - 1 - 0.7])
    assert weight == 0.001 and float(terms["kl"]) == pytest.approx(0.001 * expected, rel=1e-6)
    assert float(terms["reconstruction"]) == pytest.approx(0.25)


class Denoiser(torch.nn.Module):
    """Predicts a constant noise, whatever it sees."""

    def __init__(self):
        super().__init__()
        self.schedule = NoiseSchedule(parameterization="epsilon")

    def encode(self, image):
        return image

    def from_dose(self, dose, conditions):
        return 2 * dose - 1

    def denoise_output(self, x_t, t, conditions):
        return torch.full_like(x_t, 0.3)


def test_mse_is_the_papers():
    """L_mse = E |eps_theta - eps|^2 with weight 1, in the objective of the paper's system."""
    options = json.loads((CONFIGS / "systems" / "addiff_dose_paper.json").read_text())["objective"]
    objective = DiffusionObjective(**{k: v for k, v in options.items() if k != "_target_"})
    objective.generator = torch.Generator().manual_seed(0)
    shape = (1, 1, 8, 8, 8)
    batch = {"image": torch.zeros(shape), "label": torch.rand(shape), "body": torch.ones(shape)}
    terms = objective(Denoiser(), batch)
    again = torch.Generator().manual_seed(0)
    torch.randint(0, 1000, (1,), generator=again)
    noise = torch.randn(shape, generator=again)
    assert list(terms) == ["diffusion"]
    assert float(terms["diffusion"]) == pytest.approx(float((0.3 - noise).square().mean()), rel=1e-5)


def test_the_overlay_adds_the_papers_constraint_loss_and_changes_nothing_else():
    """lambda_2 = 0.5; the objective itself is train.json's, or that of another system laid between."""
    overlay, base = (json.loads((CONFIGS / f"{name}.json").read_text()) for name in ("constraint_loss", "train"))
    new = {"description", "beyond_reference", "compliance_patience", "compliance_metric", "reference_compliance_metric"}
    assert overlay.keys() - new == {"+loss_weights", "constrained", "val_additional_metrics", "keeper"}
    assert overlay["+loss_weights"] == {"constraints": 0.5}
    assert overlay["constrained"]["objective"] == base["constrained"] == "@objective"
    assert overlay["keeper"]["export"] == base["keeper"] == "@export"
    assert set(overlay["val_additional_metrics"]) == {"constraints_met_percent", "reference_constraints_met_percent"}
    assert overlay["compliance_patience"] == 20
