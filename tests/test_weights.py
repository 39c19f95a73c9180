"""The shipped weights are those of the model card."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
WEIGHTS = BUNDLE / "models" / "model.pt"


@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no trained weights at {WEIGHTS}")
def test_the_model_card_names_the_weights():
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert digest in (BUNDLE / "docs" / "README.md").read_text()


@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no trained weights at {WEIGHTS}")
def test_weights_are_a_raw_half_precision_state_dict():
    state = torch.load(WEIGHTS, weights_only=True)
    assert all(v.dtype in (torch.float16, torch.int64) for v in state.values())
    assert all(torch.isfinite(v.float()).all() for v in state.values())
