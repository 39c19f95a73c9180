"""The shipped weights are those of the model card."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from custom.case import CaseError
from custom.engines import WeightsLoader

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
WEIGHTS = BUNDLE / "models" / "model.pt"


@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no trained weights at {WEIGHTS}")
def test_the_model_card_names_the_weights():
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert digest in (BUNDLE / "docs" / "README.md").read_text()


@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no trained weights at {WEIGHTS}")
def test_the_hash_beside_the_weights_is_theirs():
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    listed = WEIGHTS.with_name("model.pt.sha256").read_text()
    assert listed == f"{digest}  model.pt\n", "after new weights: sha256sum model.pt > model.pt.sha256"


def test_weights_that_do_not_have_their_hash_are_refused(tmp_path):
    network = torch.nn.Linear(2, 2)
    path = tmp_path / "w.pt"
    torch.save(network.state_dict(), path)
    (tmp_path / "w.pt.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  w.pt\n")
    WeightsLoader(path, network).load()
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CaseError, match="w.pt: its SHA-256 is .* not the file that was shipped"):
        WeightsLoader(path, network).load()


@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no trained weights at {WEIGHTS}")
def test_weights_are_a_raw_half_precision_state_dict():
    state = torch.load(WEIGHTS, weights_only=True)
    assert all(v.dtype in (torch.float16, torch.int64) for v in state.values())
    assert all(torch.isfinite(v.float()).all() for v in state.values())


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"no trained weights at {WEIGHTS}")
def test_prediction_is_closer_to_clinical_doses_than_the_plan_prior(shared_dir, tmp_path):
    """On the first two validation patients: the network adds to the dose that is planned without any learning."""
    openkbp = shared_dir / "openkbp"
    if not (openkbp / "unpack.py").is_file():
        pytest.skip(f"no OpenKBP patients at {openkbp}")
    names = json.loads((openkbp / "splits.json").read_text())["validation"][:2]
    subprocess.run([sys.executable, openkbp / "unpack.py", tmp_path, "--patients", *names], check=True)
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "inference.json")
    parser.update({"dataset_dir": str(tmp_path), "device": torch.device("cpu")})
    network, inferer = (parser.get_parsed_content(key) for key in ("network", "inferer"))
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    prior_channel = parser.get_parsed_content("spatial_channels").index("plan_prior")
    errors = {"prior": [], "network": []}
    for item in parser.get_parsed_content("dataset"):
        image, label, body = (torch.as_tensor(item[key]) for key in ("image", "label", "body"))
        with torch.no_grad():
            predicted = inferer(image[None], network.eval())[0]
        for key, dose in (("prior", image[prior_channel : prior_channel + 1]), ("network", predicted)):
            errors[key].append(float((dose - label)[body > 0].abs().mean()))
    assert len(errors["network"]) == 2
    assert sum(errors["network"]) < sum(errors["prior"]), errors
