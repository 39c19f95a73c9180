"""Train several systems for the same minutes on the same cases, score them alike, and make one table and figures."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from custom.case import CaseError
from custom.comparison_figures import draw_doses, draw_dvhs
from custom.comparison_table import compare, markdown, structure_errors
from custom.io import read_case
from custom.io.nifti import read_nifti
from custom.whole import write_json, write_whole

__all__ = ["Comparison"]

logger = logging.getLogger(__name__)


class Comparison:
    """Train and score systems one after the other; what is done already is kept, so that a stopped run goes on.

    Args:
        systems: name -> ``{"overlays": [files], "options": {config key: value}}``; the first is what the others are
            compared with. ``"train_options"`` are for the training alone; ``"weights_of"`` names a system whose weights
            are taken instead of a training.
        config_dir: folder of ``inference.json``, ``train.json`` and ``evaluate.json``, and of the overlays.
        cases: the validation cases, ``{"image": path}`` each.
        options: overrides of all trainings: data set, minutes, seed.
        output_dir: gets a folder a system, ``comparison.json``, ``comparison.md``, ``doses.png`` and ``dvhs.png``.
        train_overlays: laid over every training before the system, such as ``smoke.json``.
        picture_case: name of the case of the figures; the first one by default.
        seed: of the bootstrap.
    """

    def __init__(self, systems: Mapping[str, Mapping[str, Any]], config_dir: str | Path, cases: Sequence[Mapping],
                 options: Mapping[str, Any], output_dir: str | Path, train_overlays: Sequence[str] = (),
                 picture_case: str | None = None, seed: int = 0) -> None:
        self.systems, self.config_dir, self.cases = dict(systems), Path(config_dir), [dict(case) for case in cases]
        self.options, self.output_dir, self.train_overlays = dict(options), Path(output_dir), list(train_overlays)
        self.picture_case, self.seed = picture_case, seed
        for name, system in self.systems.items():
            source = system.get("weights_of", name)
            if source not in self.systems:
                raise CaseError(f"comparison: {name} takes the weights of {source!r}, which is none of "
                                f"{list(self.systems)}")

    def run(self) -> dict[str, dict]:
        """Train, score and tabulate; returns the table of :func:`custom.comparison_table.compare`.

        Raises:
            CaseError: a run failed; names it and its log.
        """
        for name, system in self.systems.items():
            if "weights_of" not in system:
                self._train(name, system)
        for name, system in self.systems.items():
            self._score(name, system)
        return self.tabulate()

    def tabulate(self) -> dict[str, dict]:
        """Table and figures of what was scored."""
        found = {name: self._found(name) for name in self.systems}
        table = compare(found, self.seed)
        parts = [markdown(table), structure_errors(found)]
        write_json(self.output_dir / "comparison.json", table)
        self._write("comparison.md", "\n".join(parts))
        logger.info("\n%s", parts[0])
        self._draw()
        return table

    def folder(self, name: str) -> Path:
        """Results of a system."""
        return self.output_dir / re.sub(r"\W+", "_", name).strip("_").lower()

    def _train(self, name: str, system: Mapping) -> None:
        folder = self.folder(name)
        if (folder / "trained").is_file():
            return
        logger.info("%s: training", name)
        overlays = ["train.json", *self.train_overlays, *system.get("overlays", ())]
        own = {**system.get("options", {}), **system.get("train_options", {})}
        options = {**self.options, **own, "output_dir": str(folder)}
        self._run("train", overlays, options, folder / "train.log")
        if not (folder / "model.pt").is_file():
            raise CaseError(f"comparison: {name} was trained too shortly for a single validation; give it more minutes "
                            f"(log: {folder / 'train.log'})")
        (folder / "trained").touch()

    def _score(self, name: str, system: Mapping) -> None:
        out = self.folder(name) / "validation"
        if (out / "metrics.json").is_file():
            return
        logger.info("%s: scoring", name)
        weights = self.folder(system.get("weights_of", name)) / "model.pt"
        options = {**system.get("options", {}), "output_dir": str(out), "weights": str(weights),
                   "seed": self.options.get("seed", 0), "datalist": self.cases}
        out.mkdir(parents=True, exist_ok=True)
        self._run("evaluate", ["evaluate.json", *system.get("overlays", ())], options, out / "evaluate.log")

    def _run(self, run_id: str, overlays: Sequence[str], options: Mapping[str, Any], log: Path) -> None:
        files = [str(self.config_dir / name) for name in ("inference.json", *overlays)]
        command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(files)]
        for key, value in options.items():
            command += [f"--{key}", "$None" if value is None else value if isinstance(value, str) else repr(value)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stream:
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise CaseError(f"comparison: {run_id} ended with exit code {code}; read {log}, and run again to go on")

    def _found(self, name: str) -> dict[str, Any]:
        scores = json.loads((self.folder(name) / "validation" / "metrics.json").read_text())
        source = self.systems[name].get("weights_of", name)
        state = torch.load(self.folder(source) / "model.pt", map_location="cpu", weights_only=True)
        return {**scores, "parameters": sum(value.numel() for value in state.values())}

    def _draw(self) -> None:
        """Both figures of one patient."""
        for item in self.cases:
            case = read_case(item["image"])
            if self.picture_case in (None, case.name):
                break
        else:
            raise CaseError(f"comparison: no case {self.picture_case!r} among the {len(self.cases)} that were scored")
        paths = {name: self.folder(name) / "validation" / case.name / "dose.nii.gz" for name in self.systems}
        doses = {name: read_nifti(path) for name, path in paths.items()}
        draw_doses(case, doses, self.output_dir / "doses.png")
        draw_dvhs(case, doses, self.output_dir / "dvhs.png")

    def _write(self, name: str, text: str) -> None:
        write_whole(self.output_dir / name, text)
