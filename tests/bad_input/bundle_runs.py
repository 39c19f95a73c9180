"""The bundle's runner in a process of its own, with a small untrained network: what is tested is everything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "bundle" / "configs"


def small_network(folder: Path) -> Path:
    """Overlay of ``inference.json`` with the network of ``smoke.json`` and weights for it."""
    folder.mkdir(parents=True, exist_ok=True)
    network = json.loads((CONFIGS / "smoke.json").read_text())["network_def"]
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser["network_def"] = network
    torch.manual_seed(0)
    torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "small.pt")
    overlay = folder / "small.json"
    overlay.write_text(json.dumps({"network_def": network, "weights": str(folder / "small.pt"), "flips": []}))
    return overlay


def command(overlay: Path, run_id: str = "inference", **options: object) -> list[str]:
    """Command line of a run; ``options`` are the config's keys."""
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    files = str([str(CONFIGS / "inference.json"), str(overlay)])
    return [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", files, *flags]


def run(overlay: Path, before: Callable[[], None] | None = None, **options: object) -> subprocess.CompletedProcess:
    """Run to the end; ``before`` is called in the new process, to set its limits."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command(overlay, **options), cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=600, preexec_fn=before)
