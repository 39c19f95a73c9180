"""A CT of 512 x 512 x 400 voxels with 40 structures, written slice by slice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from custom.rois import RoiTable
from tests.bad_input.bundle_runs import CONFIGS
from tests.io.dicom_builder import Study, oriented_grid

SHAPE, SPACING_MM = (512, 512, 400), (0.98, 0.98, 1.5)
STRUCTURES = 40


def write_large_study(folder: Path) -> Path:
    """Body, two targets and 37 organs as ellipses on half of the slices; a uniform body of water."""
    study = Study(folder, oriented_grid(shape=SHAPE, spacing_mm=SPACING_MM, origin_mm=(-250.0, -250.0, 0.0)))
    i, j = np.meshgrid(*(np.arange(n) - n / 2 for n in SHAPE[:2]), indexing="ij")
    plane = np.where((i / 230) ** 2 + (j / 150) ** 2 < 1, 0.0, -1000.0)

    class Uniform:
        """Every slice of the volume."""

        def __getitem__(self, key) -> np.ndarray:
            return plane

    for k in range(SHAPE[2]):
        study.save(study.ct_slice(Uniform(), k), f"CT/{k:03d}.dcm")
    rows = json.loads((CONFIGS / "roi_aliases.json").read_text())["rows"]
    targets = ("Body", "PTV", "CTV", "GTV", "ITV")
    names = [row["name"] for row in rows if not row.get("name", "PTV").startswith(targets) and "{" not in row["name"]]
    organs = [name for name in dict.fromkeys(names) if RoiTable().match(name).name == name]
    rng = np.random.default_rng(0)
    rois = {"Body": ellipses(256, 256, 231, 151, range(SHAPE[2])), "PTV70": ellipses(256, 256, 40, 30, range(180, 220)),
            "PTV56": ellipses(256, 256, 60, 50, range(160, 240))}
    for name in organs[:STRUCTURES - len(rois)]:
        x, y = rng.uniform(180, 330), rng.uniform(200, 310)
        rois[name] = ellipses(x, y, rng.uniform(10, 60), rng.uniform(10, 60), range(100, 300))
    assert len(rois) == STRUCTURES
    study.write_structures(rois)
    return folder


def ellipses(x: float, y: float, a: float, b: float, slices) -> list[np.ndarray]:
    """Outlines of 100 points in voxel indices."""
    angle = 2 * np.pi * np.arange(100) / 100
    return [np.column_stack([x + a * np.cos(angle), y + b * np.sin(angle), np.full(100, float(k))]) for k in slices]
