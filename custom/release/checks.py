"""What the Model Zoo's verifier and its reviewers look at, check by check; each raises a CaseError or says what it saw.

After ``ci/verify_bundle.py`` (17e7879), ``ci/get_bundle_requirements.py`` and ``.pre-commit-config.yaml`` of
Project-MONAI/model-zoo; written anew, so that it runs without a checkout of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.bundle import verify_metadata

from custom.case import CaseError
from custom.release.assemble import BLACK, ISORT, described_channels, files_of, read_json, run_tool

__all__ = ["CHECKS", "check_installable", "check_schema", "requirements"]

NECESSARY = ("configs/metadata.json", "LICENSE")
PREFERRED = ("models/model.pt", "configs/inference.json")
LARGEST_BYTES = 25 * 2**20  # larger files are to be named in large_files.yml and hosted elsewhere
ZOO_PYTHON = "3.10"  # of the zoo's premerge jobs
# Substrings by which MONAI Label takes a bundle for another kind of model.
MISLEADING = ("detection", "classification", "deepedit", "deepgrow", "segmentation")
REQUIRED = ("schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version",
            "required_packages_version", "name", "task", "description", "authors", "copyright", "intended_use",
            "network_data_format")
TENSOR = {"type": str, "format": str, "num_channels": int, "spatial_shape": list, "dtype": str, "value_range": list}
# B905, B907: opinions that are newer than the zoo's settings; B950: black cannot break every text.
FLAKE8 = ("flake8", "--isolated", "--max-line-length", "120", "--select", "B,C,E,F,N,P,T4,W,B9", "--ignore",
          "E203,E501,E741,W503,W504,C408,N812,B023,B905,B907,B950", "--per-file-ignores", "__init__.py:F401")
PERSONAL = re.compile(r"(?<![\w.])(/(?:home|root|Users|work|mnt)/|[A-Z]:\\\\)\S*")


def metadata_of(bundle: Path) -> dict[str, Any]:
    return read_json(bundle / "configs" / "metadata.json")


def check_files(bundle: Path) -> str:
    """The files that a bundle must and should have."""
    missing = [name for name in (*NECESSARY, *PREFERRED, "docs/README.md") if not (bundle / name).is_file()]
    if missing:
        raise CaseError(f"files: {missing} are missing in {bundle}; the zoo wants {[*NECESSARY, *PREFERRED]} and a "
                        "model card")
    links = [str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_symlink()]
    if links:
        raise CaseError(f"files: {links} are symbolic links, which a zip cannot hold; copy what they point to")
    return f"{len(files_of(bundle))} files"


def check_sizes(bundle: Path) -> str:
    """No file larger than the zoo's repository takes."""
    large = {p.name: p.stat().st_size for p in files_of(bundle) if p.stat().st_size > LARGEST_BYTES}
    if large and not any((bundle / f"large_files.{end}").is_file() for end in ("yml", "yaml", "json")):
        raise CaseError(f"sizes: {large} bytes; the zoo takes 25 MB a file, larger ones by URL in large_files.yml")
    return f"largest {max(p.stat().st_size for p in files_of(bundle)) / 2**20:.1f} MB"


def check_name(bundle: Path) -> str:
    """``<name>_v<version>``, the name in lower snake case and not one that MONAI Label reads something into."""
    match = re.fullmatch(r"([a-z][a-z0-9]*(?:_[a-z0-9]+)*)_v(\d+\.\d+\.\d+)", bundle.name)
    if not match:
        raise CaseError(f"name: found {bundle.name!r}; expected <lower_snake_case>_v<version>")
    wrong = [word for word in MISLEADING if word in match[1]]
    if wrong:
        raise CaseError(f"name: {match[1]!r} holds {wrong}, by which MONAI Label takes it for another kind of model")
    if match[2] != metadata_of(bundle)["version"]:
        raise CaseError(f"name: the folder says version {match[2]}, metadata.json {metadata_of(bundle)['version']}")
    return match[1]


def check_changelog(bundle: Path) -> str:
    """The version is in the changelog, and is that of the code."""
    metadata = metadata_of(bundle)
    version, log = metadata.get("version"), metadata.get("changelog") or {}
    if version not in log:
        raise CaseError(f"changelog: version {version!r} is not among {list(log)}; add a line on what is new")
    code = re.search(r'__version__ = "(.+)"', (bundle / "custom" / "__init__.py").read_text(encoding="utf-8"))
    if code is None or code[1] != version:
        raise CaseError(f"changelog: metadata.json says {version!r}, custom.__version__ {code and code[1]!r}")
    return f"{version}: {log[version]}"


def check_fields(bundle: Path) -> str:
    """The fields of ``metadata.json``, by name and type, without a copy of the zoo's schema."""
    metadata = metadata_of(bundle)
    missing = [key for key in REQUIRED if key not in metadata]
    if missing:
        raise CaseError(f"metadata.json: {missing} are missing")
    texts = ("authors", "copyright", "description", "task", "name", "intended_use")
    wrong = [key for key in texts if not isinstance(metadata[key], str)]
    if wrong:
        raise CaseError(f"metadata.json: {wrong} are to be texts, not lists or objects")
    count = 0
    for side in ("inputs", "outputs"):
        for name, entry in metadata["network_data_format"][side].items():
            odd = [key for key, kind in TENSOR.items() if not isinstance(entry.get(key), kind)]
            if odd:
                raise CaseError(f"metadata.json: network_data_format, {side}, {name}: {odd} are missing or of another "
                                f"type; expected {[f'{k}: {v.__name__}' for k, v in TENSOR.items()]}")
            if len(entry["channel_def"]) != entry["num_channels"]:
                raise CaseError(f"metadata.json: {name}: channel_def names {len(entry['channel_def'])} channels, "
                                f"num_channels is {entry['num_channels']}")
            count += 1
    return f"{len(metadata)} fields, {count} tensors"


def check_channels(bundle: Path) -> str:
    """The channels that ``metadata.json`` describes are those of the config."""
    described = metadata_of(bundle)["network_data_format"]["inputs"]["image"]["channel_def"]
    names = described_channels(bundle / "configs" / "inference.json")
    if list(described.values()) != names:
        differ = sorted(set(described.values()) ^ set(names)) or "their order"
        raise CaseError(f"channels: metadata.json and inference.json differ in {differ}; run `make metadata`")
    return f"{len(names)} channels"


def check_schema(bundle: Path, schema: Path | None = None) -> str:
    """``metadata.json`` meets the zoo's schema, by MONAI's own ``verify_metadata``.

    Args:
        bundle: assembled bundle.
        schema: a copy of the schema; by default it is fetched from where ``metadata.json`` says.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "schema.json"
        if schema is not None:
            copy.write_bytes(schema.read_bytes())
        try:
            verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=str(copy))
        except Exception as error:
            raise CaseError(f"schema: {error}") from error
    return "a local copy" if schema is not None else metadata_of(bundle)["schema"]


def requirements(metadata: dict[str, Any]) -> list[str]:
    """The packages a bundle names, as the zoo hands them to pip."""
    pins = {"monai": metadata["monai_version"], "torch": metadata["pytorch_version"],
            "numpy": metadata["numpy_version"], **metadata["required_packages_version"]}
    return [f"{name}=={version}" for name, version in pins.items()]


def check_pins(bundle: Path) -> str:
    """Bare versions: the zoo writes ``==`` before each."""
    pins = requirements(metadata_of(bundle))
    wrong = [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==\d+(\.\d+)+", pin)]
    if wrong:
        raise CaseError(f"pins: {wrong}; expected bare versions such as '1.2.3'")
    return ", ".join(pins)


def check_installable(bundle: Path) -> str:
    """pip finds every pinned package, and all they want, for the zoo's Python; asks the package index."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check",
                   "--target", folder, "--python-version", ZOO_PYTHON, "--only-binary", ":all:",
                   *requirements(metadata_of(bundle))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise CaseError(f"pins: pip cannot install them on Python {ZOO_PYTHON}: {' '.join(errors or [done.stderr])}")
    return f"pip resolves them on Python {ZOO_PYTHON}"


def check_weights(bundle: Path) -> str:
    """``models/model.pt`` is a raw state dict, finite, loadable without running code, and the only one of its kind.

    Where its SHA-256 is shipped beside it, it is that.
    """
    found = sorted(p.name for p in (bundle / "models").glob("*.pt"))
    if found != ["model.pt"]:
        raise CaseError(f"weights: found {found}; MONAI Label takes the .pt with the shortest name: keep only model.pt")
    listed = bundle / "models" / "model.pt.sha256"
    digest = hashlib.sha256((bundle / "models" / "model.pt").read_bytes()).hexdigest()
    if listed.is_file() and listed.read_text(encoding="ascii").split()[:1] != [digest]:
        raise CaseError(f"weights: SHA-256 of model.pt is {digest}, model.pt.sha256 says otherwise; write it anew")
    try:
        state = torch.load(bundle / "models" / "model.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise CaseError(f"weights: models/model.pt cannot be loaded safely: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CaseError("weights: models/model.pt is not a raw state_dict (name -> tensor), which the zoo, MONAI Label "
                        "and MONAI Deploy load; save network.state_dict()")
    broken = [name for name, value in state.items() if not torch.isfinite(value.float()).all()]
    if broken:
        raise CaseError(f"weights: {broken[:3]} hold values that are not finite")
    return f"{len(state)} tensors, {sum(v.numel() for v in state.values()) / 1e6:.2f} million values"


def check_format(bundle: Path) -> str:
    """JSON indented as the zoo's formatter does; texts end with one newline and no line with a blank."""
    for path in sorted((bundle / "configs").rglob("*.json")):
        expected = json.dumps(read_json(path), indent=4) + "\n"
        if path.read_text(encoding="utf-8") != expected:
            raise CaseError(f"format: {path.relative_to(bundle)} is not indented by 4 with a newline at its end")
    texts = [path for path in files_of(bundle) if path.suffix in (".py", ".md", ".conf")]
    for path in texts:
        text = path.read_text(encoding="utf-8")
        if text and (not text.endswith("\n") or text.endswith("\n\n")):
            raise CaseError(f"format: {path.relative_to(bundle)} does not end with exactly one newline")
        blanks = [number for number, line in enumerate(text.splitlines(), 1) if line != line.rstrip()]
        if blanks:
            raise CaseError(f"format: {path.relative_to(bundle)} has blanks at the end of lines {blanks[:5]}")
    return f"{len(texts)} texts"


def check_paths(bundle: Path) -> str:
    """No path of the author's machine."""
    for path in files_of(bundle):
        if path.suffix in (".json", ".conf", ".md", ".py"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if PERSONAL.search(line):
                    raise CaseError(f"paths: {path.relative_to(bundle)}:{number} names {PERSONAL.search(line)[0]!r}, "
                                    "which is on one machine only")
    return "none"


def check_card(bundle: Path) -> str:
    """The model card says what the zoo wants said of bundles it cannot script or accelerate, and of these weights."""
    text = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    metadata = metadata_of(bundle)
    unsaid = [word for word in ("TorchScript", "TensorRT", "Research", "Limits", "Data") if word not in text]
    unsaid += [f"{key} {value:.2f} (of metadata.json)" for key, value in metadata.get("eval_metrics", {}).items()
               if f"{value:.2f}" not in text]
    digest = hashlib.sha256((bundle / "models" / "model.pt").read_bytes()).hexdigest()
    unsaid += [] if digest in text else [f"the weights' SHA-256, {digest}"]
    channels = f"{metadata['network_data_format']['inputs']['image']['num_channels']} channels"
    unsaid += [] if f"`image`: {channels}" in text else [f"`image`: {channels}"]
    if unsaid:
        raise CaseError(f"model card: docs/README.md says nothing about {unsaid}; bring it up to date")
    return f"{len(text.splitlines())} lines"


def check_formatters(bundle: Path) -> str:
    """black, isort and flake8 with the zoo's settings."""
    run_tool((*ISORT, "--check-only"), bundle / "custom")
    run_tool((*BLACK, "--check"), bundle / "custom")
    run_tool(FLAKE8, bundle / "custom")
    return f"{len(list((bundle / 'custom').rglob('*.py')))} modules"


CHECKS: dict[str, Callable[[Path], str]] = {
    "files": check_files,
    "sizes": check_sizes,
    "name": check_name,
    "changelog": check_changelog,
    "fields": check_fields,
    "channels": check_channels,
    "pins": check_pins,
    "weights": check_weights,
    "config format": check_format,
    "paths": check_paths,
    "model card": check_card,
    "formatters": check_formatters,
}
