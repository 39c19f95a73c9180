"""Train the same thing several times with one part left out, each in a process of its own, and make one table."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from custom.case import CaseError

__all__ = ["Ablations", "table"]

logger = logging.getLogger(__name__)


class Ablations:
    """Run ``ablate`` of the configs once a variant and collect the scores.

    Args:
        variants: name -> config overrides; the first one is what the others are compared with.
        config_files: of the runs.
        options: overrides for all of them, such as the data set and the minutes.
        output_dir: gets a folder a variant, ``ablations.json`` and ``ablations.md``.
        run_id: what to run.
    """

    def __init__(self, variants: Mapping[str, Mapping[str, Any]], config_files: Sequence[str | Path],
                 options: Mapping[str, Any], output_dir: str | Path, run_id: str = "ablate") -> None:
        self.variants, self.options, self.run_id = dict(variants), dict(options), run_id
        self.config_files, self.output_dir = [str(path) for path in config_files], Path(output_dir)

    def run(self) -> dict[str, dict]:
        """Train and score what is not done yet; returns and writes variant -> scores.

        Raises:
            CaseError: a run failed; names it and its log.
        """
        found = {}
        for name, overrides in self.variants.items():
            folder = self.output_dir / re.sub(r"\W+", "_", name)
            scores = folder / "scores.json"
            if not scores.is_file():
                logger.info("%s: training", name)
                self._run(name, folder, overrides)
            found[name] = json.loads(scores.read_text())
            self._write(found)
        return found

    def _run(self, name: str, folder: Path, overrides: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        values = {**self.options, "output_dir": str(folder), **overrides}
        command = [sys.executable, "-m", "monai.bundle", "run", self.run_id, "--config_file", str(self.config_files)]
        for key, value in values.items():
            command += [f"--{key}", "$None" if value is None else value if isinstance(value, str) else repr(value)]
        log = folder / "log.txt"
        with log.open("w") as stream:
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
        if code or not (folder / "scores.json").is_file():
            raise CaseError(f"ablation {name!r} ended with exit code {code}; read {log}, and run again to go on")

    def _write(self, found: Mapping[str, Mapping]) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for name, content in (("ablations.json", json.dumps(found, indent=1)), ("ablations.md", table(found))):
            part = self.output_dir / f".{name}.part"
            part.write_text(content, encoding="utf-8")
            os.replace(part, self.output_dir / name)
        logger.info("\n%s", table(found))


def table(found: Mapping[str, Mapping[str, Mapping]]) -> str:
    """Markdown table of variant -> inferer -> scores, with the paired difference to the first variant.

    The 95 % interval is that of the mean paired difference over cases (Student's t).
    """
    first = next(iter(found.values()))
    lines = ["| variant | inferer | dose score, Gy | DVH score, Gy | difference of dose score [95 %] |",
             "|---|---|---|---|---|"]
    for variant, inferers in found.items():
        for inferer, scores in inferers.items():
            difference = np.subtract(scores["dose_errors_gy"], first[inferer]["dose_errors_gy"])
            text = "" if scores is first[inferer] or difference.size < 2 else _interval(difference)
            lines.append(f"| {variant} | {inferer} | {scores['dose_score']:.3f} | {scores['dvh_score']:.3f} | {text} |")
    return "\n".join(lines) + "\n"


def _interval(difference: np.ndarray) -> str:
    half = stats.t.ppf(0.975, difference.size - 1) * difference.std(ddof=1) / np.sqrt(difference.size)
    return f"{difference.mean():+.3f} [{difference.mean() - half:+.3f}, {difference.mean() + half:+.3f}]"
