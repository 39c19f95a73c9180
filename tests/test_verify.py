"""The Model Zoo's checks: each lets a good bundle pass and stops one with its fault."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from custom.case import CaseError
from custom.release import checks, verify
from custom.release.assemble import assemble, read_json, write_json

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """The repository's bundle, assembled, its code as it is."""
    return assemble(ROOT, tmp_path_factory.mktemp("dist"), formatted=False)


@pytest.fixture
def bundle(release, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(release, tmp_path / release.name))


def weights(bundle: Path, content) -> None:
    """Other weights, of which no hash was written."""
    path = bundle / "models" / "model.pt"
    path.with_name("model.pt.sha256").unlink(missing_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


def change_metadata(bundle: Path, **changes) -> None:
    path = bundle / "configs" / "metadata.json"
    metadata = read_json(path) | changes
    write_json(path, {key: value for key, value in metadata.items() if value is not None})


def change_image(bundle: Path, **changes) -> None:
    path = bundle / "configs" / "metadata.json"
    metadata = read_json(path)
    metadata["network_data_format"]["inputs"]["image"] |= changes
    write_json(path, metadata)


def pins(bundle: Path, **changes) -> None:
    change_metadata(bundle, required_packages_version=read_json(
        bundle / "configs" / "metadata.json")["required_packages_version"] | changes)


# name of the check -> (what is done to the bundle, what the check then says)
FAULTS: dict[str, list[tuple[Callable[[Path], object], str]]] = {
    "files": [
        (lambda b: (b / "LICENSE").unlink(), "LICENSE.* missing"),
        (lambda b: (b / "models" / "model.pt").unlink(), "model.pt.* missing"),
        (lambda b: (b / "configs" / "more.json").symlink_to(b / "configs" / "train.json"), "symbolic links"),
    ],
    "sizes": [(lambda b: (b / "docs" / "large.md").write_bytes(b"x" * (26 * 2**20)), "large.md.*25 MB")],
    "name": [
        (lambda b: change_metadata(b, version="9.9.9"), "metadata.json 9.9.9"),
    ],
    "changelog": [
        (lambda b: change_metadata(b, changelog={"0.0.1": "First"}), "is not among"),
        (lambda b: (b / "custom" / "__init__.py").write_text('__version__ = "7.0.0"\n'), "custom.__version__ '7.0.0'"),
    ],
    "fields": [
        (lambda b: change_metadata(b, copyright=None), "'copyright'.* missing"),
        (lambda b: change_metadata(b, authors=["A", "B"]), "'authors'.* texts"),
        (lambda b: change_image(b, value_range=None), "value_range"),
        (lambda b: change_image(b, num_channels=3), "num_channels is 3"),
    ],
    "channels": [(lambda b: change_image(b, channel_def={"0": "mr"}), "make metadata")],
    "pins": [(lambda b: pins(b, scipy=">=1.12"), "scipy==>=1.12.*bare")],
    "weights": [
        (lambda b: weights(b, {"model": {"a": torch.ones(1)}}), "not a raw state_dict"),
        (lambda b: weights(b, {"a": torch.tensor([float("nan")])}), "not finite"),
        (lambda b: weights(b, b"PK"), "cannot be loaded safely"),
        (lambda b: torch.save({}, b / "models" / "a.pt"), "shortest name"),
        (lambda b: (b / "models" / "model.pt.sha256").write_text("0" * 64 + "  model.pt\n"), "says otherwise"),
    ],
    "config format": [
        (lambda b: (b / "configs" / "train.json").write_text('{"a": 1}\n'), "train.json is not indented"),
        (lambda b: (b / "configs" / "train.json").write_text('{"a": 1, "a": 2}\n'), r"\['a'\] are given twice"),
        (lambda b: (b / "docs" / "README.md").write_text("no newline"), "exactly one newline"),
        (lambda b: (b / "docs" / "README.md").write_text("blank \n"), r"end of lines \[1\]"),
    ],
    "paths": [
        (lambda b: change_metadata(b, description="see /home/" + "me/notes"), "configs/metadata.json:.*/home/me/notes"),
    ],
    "model card": [
        (lambda b: (b / "docs" / "README.md").write_text("# A model\n"), "TorchScript.*TensorRT"),
        (lambda b: weights(b, b"others"), "SHA-256"),
        (lambda b: change_metadata(b, eval_metrics={"a_score_gy": 77.77}), "a_score_gy 77.77"),
        (lambda b: change_image(b, num_channels=39), "39 channels"),
    ],
}
# Checks of the code's text need the formatters; the slow test runs them.
CHECKED_HERE = [name for name in checks.CHECKS if name != "formatters"]


def test_every_check_has_its_fault():
    assert set(FAULTS) == set(CHECKED_HERE)


@pytest.mark.parametrize("name", CHECKED_HERE)
def test_the_bundle_passes(release, name):
    assert checks.CHECKS[name](release)


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, rows in FAULTS.items() for n in range(len(rows))])
def test_a_fault_is_found(bundle, name, number):
    break_it, message = FAULTS[name][number]
    break_it(bundle)
    with pytest.raises(CaseError, match=message):
        checks.CHECKS[name](bundle)


@pytest.mark.parametrize("name", ["Dose_v1.0.0", "dose", "rt_dose_detection_v0.1.0"])
def test_names_that_the_zoo_or_label_misread(name):
    with pytest.raises(CaseError, match="name: "):
        checks.check_name(Path(name))


def test_schema_is_met_and_its_breach_found(bundle, shared_dir):
    schema = shared_dir / "zoo" / "meta_schema_20240725.json"
    assert checks.check_schema(bundle, schema) == "a local copy"
    change_metadata(bundle, supported_apps=["monai-label"])
    with pytest.raises(CaseError, match="schema: .*monai-label"):
        checks.check_schema(bundle, schema)


def test_flake8_finds_what_the_zoo_would(bundle):
    pytest.importorskip("flake8", reason="the release's tools are not installed (make verify installs them)")
    (bundle / "custom" / "wrong.py").write_text("import os\n")
    with pytest.raises(CaseError, match="wrong.py.*F401"):
        checks.run_tool(checks.FLAKE8, bundle / "custom" / "wrong.py")


def test_what_is_not_run_is_said_and_a_failed_check_stops_nothing(bundle, monkeypatch, caplog):
    monkeypatch.setattr(verify, "run_probe", lambda bundle: [verify.Result("probe", verify.PASSED, "")])
    monkeypatch.setattr(verify, "CHECKS", {"weights": checks.check_weights, "files": checks.check_files})
    weights(bundle, b"PK")
    found = {result.name: result.status for result in verify.verify(bundle)}
    assert found == {"weights": "FAILED", "files": "passed", "schema": "not run", "pins installable": "not run",
                     "probe": "passed", "the zoo's own verifier": "not run"}


CHECKOUT = """
import argparse, json, os, sys
from bundle_custom_data import exclude_verify_torchscript_list
parser = argparse.ArgumentParser()
parser.add_argument("-b")
parser.add_argument("-m")
args = parser.parse_args()
bundle = os.path.join("models", args.b)
assert args.m == "full" and args.b in exclude_verify_torchscript_list and os.path.isfile("models/model_info.json")
assert os.path.isfile(os.path.join(bundle, "eval", "schema.json")) and not os.path.islink(bundle)
version = json.load(open(os.path.join(bundle, "configs", "metadata.json")))["version"]
if version == "6.6.6":
    sys.exit("ValueError: version number: 6.6.6 is already used")
print("directory is verified correctly.")
"""


def test_a_checkout_of_the_zoo_is_used_and_left_as_it_was(bundle, tmp_path):
    """A stand-in with the zoo's file names and command line; the real one needs the network to be had."""
    zoo, schema = tmp_path / "zoo", tmp_path / "schema.json"
    (zoo / "ci").mkdir(parents=True)
    schema.write_text("{}")
    with pytest.raises(CaseError, match="verify_bundle.py is missing"):
        verify.run_checkout(bundle, zoo, schema)
    (zoo / "ci" / "verify_bundle.py").write_text(CHECKOUT)
    lists = "exclude_verify_torchscript_list = [\n]\n"
    (zoo / "ci" / "bundle_custom_data.py").write_text(lists)
    assert verify.run_checkout(bundle, zoo, schema) == "directory is verified correctly."
    assert (zoo / "ci" / "bundle_custom_data.py").read_text() == lists and not (zoo / "models").exists()
    change_metadata(bundle, version="6.6.6")
    with pytest.raises(CaseError, match="6.6.6 is already used"):
        verify.run_checkout(bundle, zoo, schema)


@pytest.mark.parametrize("group", ["train", "validate"])
def test_handlers_are_objects_since_monai_looks_into_them(release, group):
    """A reference among them crashes MONAI's check_properties; custom.engines.Attached stands for one."""
    handlers = read_json(release / "configs" / "train.json")[group]["handlers"]
    assert [handler for handler in handlers if not isinstance(handler, dict) or "_target_" not in handler] == []


@pytest.mark.slow
def test_monai_loads_traces_and_accepts_the_bundle(release):
    """In the bundle's own folder and code: verify_net_in_out, check_properties, load, create_workflow, ckpt_export."""
    results = list(verify.run_probe(release))
    assert [f"{r.name}: {r.text}" for r in results if r.status != verify.PASSED] == []
    assert {"net in/out", "properties of training", "monai.bundle.load", "ckpt_export, traced"} <= {
        r.name for r in results}


@pytest.mark.slow
def test_make_verify_passes(shared_dir, monkeypatch):
    """What `make verify` runs, with the formatters."""
    pytest.importorskip("black", reason="the release's tools are not installed (make verify installs them)")
    from custom.release.__main__ import main

    monkeypatch.chdir(ROOT)
    assert main(["verify", "--schema", str(shared_dir / "zoo" / "meta_schema_20240725.json")]) == 0
