"""metadata.json: the Model Zoo's schema, and agreement with the package and its pins."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import jsonschema
import pytest

import custom

ROOT = Path(__file__).resolve().parents[1]
METADATA = json.loads((ROOT / "bundle" / "configs" / "metadata.json").read_text(encoding="utf-8"))
# MONAI Label's own, and of the extra "gamma": imported where used, or done without.
OPTIONAL = {"starlette", "pymedphys"}
# Packages whose module has another name.
IMPORT_TO_PACKAGE = {"PIL": "pillow", "ignite": "pytorch-ignite", "rt_utils": "rt-utils", "skimage": "scikit-image"}


def pins() -> dict[str, set[str]]:
    """Package -> the versions that constraints.txt pins on one Python or another."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            found.setdefault(name.lower(), set()).add(version)
    return found


def test_meets_the_zoo_schema(shared_dir):
    schema = json.loads((shared_dir / "zoo" / "meta_schema_20240725.json").read_text(encoding="utf-8"))
    jsonschema.validate(METADATA, schema)
    for key in ("schema", "changelog", "name", "intended_use", "data_type"):
        assert key in METADATA
    assert METADATA["schema"].endswith("meta_schema_20240725.json")


def test_version_is_the_package_version():
    assert METADATA["version"] == custom.__version__
    assert custom.__version__ in METADATA["changelog"]


def test_packages_are_bare_pins_that_make_installs():
    stated = {
        "monai": METADATA["monai_version"],
        "torch": METADATA["pytorch_version"],
        "numpy": METADATA["numpy_version"],
        **METADATA["required_packages_version"],
    }
    for package, version in stated.items():
        assert re.fullmatch(r"\d+(\.\d+)+", version), f"{package}: {version!r} is not a bare version"
        assert version in pins()[package], f"{package}: constraints.txt pins {pins()[package]}, metadata says {version}"


def dependencies() -> set[str]:
    """Packages that pyproject.toml asks for (read as text: Python 3.10 has no TOML reader)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r'"([A-Za-z0-9-]+)>=', listed[1]))


def test_states_every_dependency_of_the_package():
    assert dependencies() == set(METADATA["required_packages_version"]) | {"monai", "torch", "numpy"}


def test_depends_on_every_package_that_the_code_imports():
    imported = set()
    for path in (ROOT / "custom").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    packages = {IMPORT_TO_PACKAGE.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"custom"}}
    assert packages - dependencies() == OPTIONAL


@pytest.mark.parametrize(("side", "entry"), [("inputs", "image"), ("outputs", "pred")])
def test_network_takes_one_tensor_and_returns_one(side, entry):
    tensors = METADATA["network_data_format"][side]
    assert list(tensors) == [entry]  # the names that the zoo's verifier and MONAI Label write out
    assert tensors[entry]["dtype"] == "float32"


def test_output_is_not_cast_to_integers():
    # MONAI Deploy casts an output of type "image" to uint8, which would destroy a dose.
    assert METADATA["network_data_format"]["outputs"]["pred"]["type"] == "series"
