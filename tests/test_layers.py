"""Holds the plan of the house: who may import whom, and what no module may contain."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path for path in (ROOT / "custom").rglob("*.py"))

# Rooms of the house, lowest first; a room imports only from lower ones. A module's room is the first part of its
# name below ``custom``; the rooms in ``EXTENDED`` also stand for "report_*" and so on.
LAYERS = (
    {"case", "places", "whole"},
    {"rois"},
    {"io", "geometry", "dosimetry", "physics", "networks"},
    {"losses", "metrics", "protocol", "report", "phantom", "precision"},
    {"transforms", "objectives", "inferers", "engines", "datalists", "batch", "runner", "studies", "benchmark",
     "ablations", "pictures", "comparison"},
    {"distributed", "demo"},
    {"release"},
)
EXTENDED = ("report", "phantom", "inferers", "objectives", "comparison")
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Third-party packages and their homes: file formats live in io, and in the phantom that writes studies.
HOMES = {"pydicom": {"io", "phantom"}, "rt_utils": {"io", "phantom"}, "nibabel": {"io"}}
TORCH_FREE = {"case", "places", "whole", "rois", "io", "geometry", "dosimetry", "physics", "phantom"}


def room_of(parts: tuple[str, ...]) -> str:
    """Room of a dotted name below ``custom``: ``("report_html",)`` -> ``"report"``; "" for the package itself."""
    if not parts:
        return ""
    return next((room for room in EXTENDED if parts[0].startswith(f"{room}_")), parts[0])


def module_parts(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT / "custom").with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> list[tuple[str, ...]]:
    """Absolute dotted names imported anywhere in a file, relative imports resolved."""
    package = ("custom", *module_parts(path))
    package = package if path.name == "__init__.py" else package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found += [(*base, alias.name) if base == ("custom",) else base for alias in node.names]
    return found


def parametrize_modules():
    return pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "custom")))


@parametrize_modules()
def test_imports_only_from_lower_rooms(path):
    room = room_of(module_parts(path))
    if not room:
        assert [name for name in imports(path) if name[0] == "custom"] == []
        return
    assert room in LEVEL, f"custom/{room} has no place in LAYERS: give it one here and in design's picture"
    for name in imports(path):
        other = room_of(name[1:]) if name[0] == "custom" else ""
        if not other or other == room or other == "__version__":
            continue
        assert other in LEVEL, f"{path.name} imports custom.{other}, which has no place in LAYERS"
        assert LEVEL[other] < LEVEL[room], f"custom.{room} may not import custom.{other}: it is no lower room"


@parametrize_modules()
def test_packages_stay_in_their_room(path):
    room = room_of(module_parts(path))
    packages = {name[0] for name in imports(path)}
    for package, homes in HOMES.items():
        assert package not in packages or room in homes, f"{package} belongs to {sorted(homes)}, not to custom.{room}"
    if room in TORCH_FREE:
        assert not packages & {"torch", "monai", "ignite"}, f"custom.{room} is numpy and scipy only"


def forbidden(tree: ast.AST) -> list[str]:
    """What the house style keeps out, as ``line: what``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"{node.lineno}: print")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            found.append(f"{node.lineno}: sys.path")
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"{node.lineno}: import *")
        elif isinstance(node, ast.ImportFrom) and node.module == "sys" and any(a.name == "path" for a in node.names):
            found.append(f"{node.lineno}: sys.path")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{node.lineno}: bare except")
    return found


@parametrize_modules()
def test_contains_nothing_forbidden(path):
    assert forbidden(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    ["print(1)", "import sys\nsys.path.insert(0, '.')", "from os import *", "try:\n    pass\nexcept:\n    pass"],
)
def test_the_check_itself_sees_each_offence(source):
    assert len(forbidden(ast.parse(source))) == 1
