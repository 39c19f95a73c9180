"""Runs inside an assembled bundle, with the bundle's own code: what MONAI does with a bundle, as JSON.

Not imported: :mod:`custom.release.verify` hands it to a Python whose working folder is the bundle. One argument: the
file for the result, ``{check: {"ok": bool, "text": str}}``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import monai.bundle
import torch

import custom

INFERENCE, META, LOGGING = "configs/inference.json", "configs/metadata.json", "configs/logging.conf"
SIDE = 32  # voxels of the cube for which the network is traced


def own_code() -> str:
    """The code that is checked is the bundle's."""
    place = Path(custom.__file__).resolve().parents[1]
    assert place == Path.cwd().resolve(), f"imported custom from {place}"
    return str(place)


def net_in_out() -> str:
    """As the zoo calls it (one voxel where any size will do), and with a cube."""
    monai.bundle.verify_net_in_out("network_def", meta_file=META, config_file=INFERENCE, bundle_root=".", device="cpu")
    monai.bundle.verify_net_in_out("network_def", meta_file=META, config_file=INFERENCE, device="cpu", any=SIDE)
    return f"1 and {SIDE} voxels a side"


def properties(kind: str, files: list[str]) -> str:
    """MONAI finds what it asks of a workflow; the data set is one of names only, since nothing is run."""
    with tempfile.TemporaryDirectory() as folder:
        for case in ("train-pats/pt_1", "validation-pats/pt_2"):
            (Path(folder) / case).mkdir(parents=True)
            for name in ("possible_dose_mask.csv", "voxel_dimensions.csv"):
                (Path(folder) / case / name).touch()
        workflow = monai.bundle.create_workflow(
            config_file=files, workflow_type=kind, meta_file=META, logging_file=LOGGING, initialize="$[]",
            bundle_root=".", dataset_dir=folder, output_dir=f"{folder}/out")
        wrong = workflow.check_properties()
        assert wrong == [], f"missing, or not under the id that MONAI expects: {wrong}"
    return f"{len(workflow.properties)} properties"


def load() -> torch.nn.Module:
    """The network with its weights, by name."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:  # load() wants the folder to bear the bundle's name
        (Path(folder) / "bundle").symlink_to(here, target_is_directory=True)
        network = monai.bundle.load("bundle", bundle_dir=folder, workflow_type="inference", source="monaihosting")
    stored = torch.load("models/model.pt", weights_only=True)
    for name, value in network.state_dict().items():
        assert torch.equal(value, stored[name].to(value.dtype)), f"{name} is not the stored one"
    return network


def torchscript() -> str:
    """Exported by tracing, loaded again, and equal to the network; also at a size it was not traced with."""
    network = load().eval()
    channels = json.loads(Path(META).read_text())["network_data_format"]["inputs"]["image"]["num_channels"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.ts")
        monai.bundle.ckpt_export(
            "network_def", filepath=path, ckpt_file="models/model.pt", meta_file=META, config_file=INFERENCE,
            use_trace=True, input_shape=[1, channels, SIDE, SIDE, SIDE], converter_kwargs={"check_trace": False})
        traced = torch.jit.load(path)
    worst = 0.0
    with torch.no_grad():
        for size in ((SIDE, SIDE, SIDE), (SIDE, 2 * SIDE, SIDE)):
            image = torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(1))
            worst = max(worst, (network(image) - traced(image)).abs().max().item())
    assert worst < 1e-3, f"the traced network differs by {worst:.2g} of the prescription"
    return f"largest difference {worst:.1e} of the prescription"


CHECKS: dict[str, Callable[[], str]] = {
    "own code": own_code,
    "net in/out": net_in_out,
    "properties of inference": lambda: properties("inference", [INFERENCE]),
    "properties of evaluation": lambda: properties("inference", [INFERENCE, "configs/evaluate.json"]),
    "properties of training": lambda: properties("train", [INFERENCE, "configs/train.json"]),
    "monai.bundle.load": lambda: f"{sum(p.numel() for p in load().parameters()) / 1e6:.2f} million parameters",
    "ckpt_export, traced": torchscript,
}


def main(target: str) -> None:
    found = {}
    for name, check in CHECKS.items():
        try:
            found[name] = {"ok": True, "text": check()}
        except Exception as error:
            logging.getLogger("probe").exception(name)
            found[name] = {"ok": False, "text": f"{type(error).__name__}: {error}"}
    Path(target).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
