"""The release: one folder in the Model Zoo's layout, and its zip."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from custom.case import CaseError

__all__ = ["NAME", "assemble", "described_channels", "pack", "read_json", "synchronise_metadata", "write_json"]

NAME = "rt_ct_dose_prediction"  # the zoo's style: anatomy, modality, task
PARTS = ("configs", "docs", "models")
LEFT_OUT = ("release", "__pycache__")  # of custom/
SHIPPED = {".conf", ".json", ".md", ".pt", ".py", ".txt", ".typed", ".png", ".svg", ".css", ".js", ".sha256"}
TEXTS = (".conf", ".md", ".py")
ZIP_TIME = (2026, 1, 1, 0, 0, 0)  # one for all files, so that the same release has the same checksum
BLACK = ("black", "--quiet", "--line-length", "120", "--skip-magic-trailing-comma", "--target-version", "py310")
ISORT = ("isort", "--quiet", "--profile", "black", "--line-length", "120", "--project", "custom")


def assemble(root: str | Path, dist: str | Path, formatted: bool = True) -> Path:
    """Make ``dist/<name>_v<version>/`` from the repository.

    Symbolic links become files, ``bundle/configs`` in texts becomes ``configs``, JSON has the zoo's indentation, the
    channels of ``metadata.json`` are those of ``inference.json``, and code has the zoo's formatting.

    Args:
        root: the repository.
        dist: folder of the releases; an earlier one of the same version is replaced.
        formatted: False leaves the code as it is, so that neither black nor isort is needed.

    Raises:
        CaseError: a part is missing, or the formatters are.
    """
    root = Path(root)
    source = root / "bundle"
    for path in (source / "configs" / "metadata.json", source / "models" / "model.pt", root / "LICENSE"):
        if not path.is_file():
            raise CaseError(f"release: {path} is missing; a release holds configs, weights and a license")
    version = read_json(source / "configs" / "metadata.json")["version"]
    bundle = Path(dist) / f"{NAME}_v{version}"
    shutil.rmtree(bundle, ignore_errors=True)
    for part in PARTS:
        _copy(source / part, bundle / part)
    _copy(root / "custom", bundle / "custom")
    shutil.copyfile(root / "LICENSE", bundle / "LICENSE")
    for path in (bundle / "configs").rglob("*.json"):
        write_json(path, _relocated(read_json(path)))
    for path in (bundle / "docs").rglob("*.md"):
        path.write_text(_relocated(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in bundle.rglob("*"):
        if path.suffix in TEXTS and (text := path.read_text(encoding="utf-8")):
            path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    synchronise_metadata(bundle / "configs")
    if formatted:
        for tool in (ISORT, BLACK):
            run_tool(tool, bundle / "custom")
    return bundle


def pack(bundle: Path) -> Path:
    """Zip an assembled bundle beside itself, with the bundle's name as the one folder inside, as the zoo does.

    Returns:
        ``<name>_v<version>.zip``; equal bundles give equal bytes.
    """
    archive = bundle.parent / f"{bundle.name}.zip"
    inside = bundle.name.partition("_v")[0]
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as out:
        for path in files_of(bundle):
            entry = zipfile.ZipInfo(f"{inside}/{path.relative_to(bundle).as_posix()}", ZIP_TIME)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            out.writestr(entry, path.read_bytes())
    return archive


def files_of(bundle: Path) -> list[Path]:
    """Files that a release holds; what checks and runs left behind (``eval/``, bytecode) is not among them."""
    roots = [bundle / part for part in (*PARTS, "custom")]
    found = [path for folder in roots for path in folder.rglob("*") if path.is_file() and path.suffix in SHIPPED]
    return sorted([bundle / "LICENSE", *found])


def synchronise_metadata(configs: Path) -> None:
    """Write the channels of ``inference.json`` into ``metadata.json``, which MONAI reads as plain numbers."""
    path = configs / "metadata.json"
    metadata = read_json(path)
    image = metadata["network_data_format"]["inputs"]["image"]
    names = described_channels(configs / "inference.json")
    image["num_channels"] = len(names)
    image["channel_def"] = {str(index): name for index, name in enumerate(names)}
    write_json(path, metadata)


def described_channels(config: Path) -> list[str]:
    """Names of the network's input channels, from the config alone."""
    parser = ConfigParser()
    parser.read_config(str(config))
    return list(parser.get_parsed_content("condition_channels"))


def read_json(path: Path) -> Any:
    """Parse a JSON file, refusing keys that are given twice, of which Python would keep the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        doubled = sorted({key for key in keys if keys.count(key) > 1})
        if doubled:
            raise CaseError(f"{path}: the keys {doubled} are given twice in one object; keep one of each")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except ValueError as error:
        raise error if isinstance(error, CaseError) else CaseError(f"{path}: not JSON: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON as the zoo's formatter wants it."""
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def run_tool(command: tuple[str, ...], *paths: Path) -> str:
    """Run a formatter or linter of this environment on files, or on all Python files below folders; its output.

    Raises:
        CaseError: it is not installed, or it complains.
    """
    # File by file: black and isort pass over folders called "dist".
    files = [str(file) for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    done = subprocess.run([sys.executable, "-m", *command, *files], capture_output=True, text=True)
    text = (done.stdout + done.stderr).strip()
    if "No module named" in text:
        raise CaseError(f"{command[0]} is not installed; pip install -c constraints.txt -e '.[release]'")
    if done.returncode:
        raise CaseError(f"{command[0]}: {text[-2000:]}")
    return text


def _copy(source: Path, target: Path) -> None:
    for path in _walk(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _walk(folder: Path) -> Iterator[Path]:
    """Files to ship below a folder, links followed."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in LEFT_OUT and not path.name.startswith("."):
            yield from _walk(path)
        elif path.is_file() and path.suffix in SHIPPED and not path.name.startswith("."):
            yield path


def _relocated(value: Any) -> Any:
    """Texts that name files of ``bundle/`` name them from inside the bundle."""
    if isinstance(value, str):
        return re.sub(r"(?<![\w/.-])bundle/(?=configs|models|docs)", "", value)
    if isinstance(value, dict):
        return {key: _relocated(child) for key, child in value.items()}
    return [_relocated(child) for child in value] if isinstance(value, list) else value
