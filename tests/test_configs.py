"""Configs: no misspelt key, no dead value, no target that is not there; MONAI accepts all three silently."""

from __future__ import annotations

import inspect
import json
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

CONFIGS = Path(__file__).resolve().parents[1] / "bundle" / "configs"
BASE = "inference.json"
STAGES = ("train.json", "evaluate.json", "studies.json")  # each is laid over the base
# each is laid over the base and a stage
OVERLAYS = ("train_autoencoder.json", "train_broad.json", "train_dvh.json", "ablations.json", "ablations_broad.json",
            "claims.json", "smoke.json", "multi_gpu.json", "shards.json", "deploy.json", "systems/*.json",
            "constraint_loss.json", "guidance.json", "protocol_studies.json", "comparison.json", "axial_studies.json")
UNDER = {  # overlays that lie over other overlays
    "claims.json": ["ablations.json"],
    "ablations_broad.json": ["train_broad.json", "ablations.json"],
}
FILES = sorted(
    path.relative_to(CONFIGS).as_posix() for name in (BASE, *STAGES, *OVERLAYS) for path in CONFIGS.glob(name)
)

# Top-level keys that nothing in a config refers to, and who reads them.
ENTRY_KEYS = {
    "description": "the reader",
    "imports": "MONAI: modules for the expressions",
    "bundle_root": "MONAI, MONAI Label, users",
    "dataset_dir": "users",
    "output_dir": "users, MONAI's tracking",
    "network_def": "MONAI, the zoo's verifier, MONAI Label and Deploy",
    "preprocessing": "MONAI Label and Deploy",
    "postprocessing": "MONAI Label and Deploy",
    "inferer": "MONAI, MONAI Label and Deploy",
    "displayable_configs": "MONAI Label: options shown in the viewer",
    "initialize": "MONAI's runner",
    "finalize": "MONAI's runner",
    "run": "MONAI's runner",
    "inference": "MONAI's runner: run id",
    "evaluate": "MONAI's runner: run id",
    "steps": "MONAI's runner: run id",
    "robustness": "MONAI's runner: run id",
    "calibration": "MONAI's runner: run id",
    "limits": "MONAI's runner: run id",
    "guidance": "MONAI's runner: run id",
    "benchmark": "MONAI's runner: run id",
    "ablate": "MONAI's runner: run id, by custom.ablations",
    "ablations": "MONAI's runner: run id",
    "comparison": "MONAI's runner: run id",
    "tabulate": "MONAI's runner: run id",
    "step_curve": "MONAI's runner: run id",
    "seed_study": "MONAI's runner: run id",
    "train": "MONAI's runner: run id and the zoo's group of training objects",
    "train_autoencoder": "MONAI's runner: run id",
    "train_broad": "MONAI's runner: run id",
    "train_dvh": "MONAI's runner: run id",
    "validate": "the zoo's group of validation objects",
}
REFERENCE = re.compile(r"@([A-Za-z_]\w*)")  # "@key", "@key#nested"; not the relative "@##key"
MACRO = re.compile(r"%([A-Za-z_]\w*)(#.*|::.*)?")  # "%key", a copy of that key; not "%file.json#key"


def load(name: str) -> dict[str, Any]:
    """A config; an absent one is empty, so that overlays can be checked against those that exist."""
    path = CONFIGS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def key_name(key: str) -> str:
    """Top-level key without MONAI's merge sign: ``"+imports"`` -> ``"imports"``."""
    return key.removeprefix("+")


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every node of a config with its path, depth first."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from walk(child, f"{path}#{key}".lstrip("#"))


def references(config: dict[str, Any]) -> set[str]:
    """Top-level keys that the strings of a config refer to."""
    texts = [value for _, value in walk(config) if isinstance(value, str)]
    copied = {match[1] for match in map(MACRO.fullmatch, texts) if match}
    return copied.union(*(REFERENCE.findall(text) for text in texts if text.startswith(("@", "$"))))


def bases_of(name: str) -> list[str]:
    """Files that a file is laid over."""
    return [] if name == BASE else [BASE] if name in STAGES else [BASE, *STAGES, *UNDER.get(name, ())]


def unknown_keys(name: str) -> list[str]:
    """Top-level keys of a file that no base defines, nobody refers to and no tool reads."""
    config = load(name)
    bases = [load(other) for other in bases_of(name)]
    defined = {key_name(key) for base in bases for key in base}
    used = references(config).union(*map(references, bases))
    return [key for key in config if key_name(key) not in defined | used | set(ENTRY_KEYS)]


@pytest.mark.parametrize("name", FILES)
def test_has_no_unknown_top_level_key(name):
    assert unknown_keys(name) == [], "misspelt, or a value that nothing reads (else document it in ENTRY_KEYS)"


@pytest.mark.parametrize("name", FILES)
def test_sets_top_level_keys_only(name):
    assert [key for key in load(name) if "#" in key or "::" in key or key.startswith("~")] == []


@pytest.mark.parametrize("name", FILES)
def test_refers_only_to_keys_that_exist(name):
    config = load(name)
    defined = {key_name(key) for source in (config, *map(load, bases_of(name))) for key in source}
    missing = {name for name in references(config) if name not in defined}
    assert missing == set()


@pytest.mark.parametrize("name", FILES)
def test_avoids_the_expressions_that_monai_misreads(name):
    for path, value in walk(load(name)):
        # MONAI 1.6.1 takes any expression that contains "import" for an import statement.
        assert "importan" not in path, f"{path}: MONAI cannot refer to an id of this name"
        if isinstance(value, str) and value.startswith("$") and "@" in value:
            assert "import" not in value, f"{path}: {value!r} mixes 'import' with a reference"


def custom_components() -> list[tuple[str, str, dict]]:
    return [
        (name, path, node)
        for name in FILES
        for path, node in walk(load(name))
        if isinstance(node, dict) and str(node.get("_target_", "")).startswith("custom.")
    ]


@pytest.mark.parametrize(
    ("name", "path", "node"), [pytest.param(*row, id=f"{row[0]}:{row[1]}") for row in custom_components()]
)
def test_custom_target_exists_and_takes_these_arguments(name, path, node):
    target = pydoc.locate(node["_target_"])
    assert callable(target), f"{name}: {path}: there is no {node['_target_']}"
    arguments = {key: value for key, value in node.items() if not (key.startswith("_") and key.endswith("_"))}
    inspect.signature(target).bind_partial(**arguments)  # raises TypeError for an argument that it does not take


def test_a_misspelt_key_is_seen(tmp_path, monkeypatch):
    (tmp_path / "systems").mkdir()
    (tmp_path / BASE).write_text('{"num_steps": 4, "inferer": {"steps": "@num_steps"}}')
    (tmp_path / "systems" / "good.json").write_text('{"description": "x", "num_steps": 8}')
    (tmp_path / "systems" / "bad.json").write_text('{"num_step": 8}')
    monkeypatch.setitem(globals(), "CONFIGS", tmp_path)
    assert unknown_keys("systems/good.json") == []
    assert unknown_keys("systems/bad.json") == ["num_step"]


def test_channels_are_left_out_of_the_broad_samples_too():
    """As of the U-Net's crops: an ablation must reach both."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in (BASE, "train.json", "train_broad.json")])
    names, context = parser["spatial_channels"], parser["context_channels"]
    parser["train"]["cached"] = [{"image": torch.ones(len(names), 2, 2, 2), "context": torch.ones(len(context))}]
    parser["left_out"] = ["ct", "plan_mean_"]
    (item,) = parser.get_parsed_content("broad_samples#data")
    assert {name for name, channel in zip(names, item["image"]) if not channel.any()} == {"ct"}
    forgotten = {name for name, value in zip(context, item["context"]) if value == 0}
    assert forgotten == {name for name in context if name.startswith("plan_mean_")} != set()
