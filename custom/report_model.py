"""Which model made a dose: name, version, weights and what they were trained on, for the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["model_facts"]

UNKNOWN_TRAINING = "not known: these are not the weights that come with the bundle"
UNITS = {"prescription_gy": "Gy", "target_cc": "cc"}


def model_facts(bundle_root: str | Path, weights: str | Path, trained_on: Mapping[str, Sequence],
                settings: Mapping[str, Any]) -> dict[str, Any]:
    """Facts for :func:`custom.report.make_report`.

    The training is that of the bundle's own weights, and told only where the file is the one that its list of sums
    (``models/model.pt.sha256``) names.

    Args:
        bundle_root: folder of ``configs/metadata.json`` and ``models``.
        weights: the file that is loaded.
        trained_on: range of the training cases, as ``inference.json`` has it.
        settings: how the dose is sampled; taken over as they are.

    Returns:
        JSON-able; ``weights_sha256`` is None where there is no such file.
    """
    root, weights = Path(bundle_root), Path(weights or "")
    metadata = json.loads((root / "configs" / "metadata.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
    listed = root / "models" / "model.pt.sha256"
    shipped = listed.read_text(encoding="utf-8").split()[0] if listed.is_file() else None
    is_shipped = digest is not None and digest == shipped
    return {
        "name": metadata["name"],
        "version": metadata["version"],
        "weights": weights.name,
        "weights_sha256": digest,
        "training": _training(metadata, trained_on) if is_shipped else UNKNOWN_TRAINING,
        "intended_use": metadata["intended_use"],
        **settings,
    }


def _training(metadata: Mapping[str, Any], trained_on: Mapping[str, Sequence]) -> str:
    """One sentence: the data, and the range of the cases."""
    parts = []
    for key, values in trained_on.items():
        unit = UNITS.get(key, "")
        what = key.removesuffix(f"_{unit.lower()}").replace("_", " ") if unit else key.replace("_", " ")
        if values and not isinstance(values[0], str):
            low, high = values
            text = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        else:
            text = ", ".join(values)
        parts.append(f"{what} {text} {unit}".strip())
    return f"{metadata['data_source']}; its range: {'; '.join(parts)}"
