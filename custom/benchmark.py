"""Where the seconds of a case go, as ratios within one run: machines differ, and so do their moods."""

from __future__ import annotations

import copy
import logging
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from custom.case import Keys
from custom.precision import wait_for
from custom.whole import write_json

__all__ = ["Benchmark", "CascadeUNet", "table"]

logger = logging.getLogger(__name__)


class CascadeUNet(nn.Module):
    """Two plain 3D U-Nets in a row, the second sees the first one's dose: a yardstick of the size of C3D.

    The winner of OpenKBP (Liu et al., Med Phys 48, 2021) has 32 million parameters in such a cascade; here both are
    MONAI's :class:`~monai.networks.nets.BasicUNet`. It is never trained, only timed.

    Args:
        in_channels: of the image.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.first = BasicUNet(3, in_channels, 1, features=(16, 32, 64, 128, 256, 16))
        self.second = BasicUNet(3, in_channels + 1, 1, features=(32, 64, 128, 256, 512, 32))

    def forward(self, image: Tensor) -> Tensor:
        """Dose ``(B, 1, X, Y, Z)`` of an image ``(B, C, X, Y, Z)``."""
        return self.second(torch.cat([image, self.first(image)], dim=1))


class Benchmark:
    """Time every part of a prediction, case by case.

    Args:
        datalist: ``{"image": path}`` each.
        preprocessing: names and transforms, in their order.
        network: the network.
        inferers: name -> inferer.
        postprocessing: transforms from ``pred`` to files.
        output_dir: gets ``benchmark.json``.
        repeats: of every network call; the fastest counts.
        device: where the network is.
        autocast_dtype: number format of all networks but the plain one; None for float32.
    """

    def __init__(self, datalist: Sequence[Mapping], preprocessing: Mapping[str, Callable], network: nn.Module,
                 inferers: Mapping[str, Callable], postprocessing: Callable, output_dir: str | Path, repeats: int = 2,
                 device: torch.device | str = "cpu", autocast_dtype: str | None = None) -> None:
        self.datalist, self.preprocessing, self.network = datalist, dict(preprocessing), network
        self.inferers, self.postprocessing, self.repeats = dict(inferers), postprocessing, repeats
        self.path, self.device = Path(output_dir) / "benchmark.json", torch.device(device)
        self.dtype = None if autocast_dtype is None else getattr(torch, autocast_dtype)

    def run(self) -> list[dict]:
        """Time all cases; returns and writes rows of stage, mean seconds, ratio and peak memory so far."""
        cases = [self._case(item) for item in self.datalist]
        rows = []
        for stage in cases[0]:
            seconds = sum(case[stage][0] for case in cases) / len(cases)
            rows.append({"stage": stage, "seconds": seconds, "peak_gb": max(case[stage][1] for case in cases)})
        unit = next(row["seconds"] for row in rows if row["stage"] == "network, 1 step")
        for row in rows:
            row["ratio_to_1_step"] = row["seconds"] / unit
        record = {"cases": len(cases), "threads": torch.get_num_threads(), "device": str(self.device),
                  "autocast_dtype": str(self.dtype), "stages": rows}
        write_json(self.path, record)
        logger.info("\n%s", table(rows))
        return rows

    def _case(self, item: Mapping) -> dict[str, tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}
        data = dict(item)

        def timed(stage: str, call: Callable, repeats: int = 1):
            best = float("inf")
            for _ in range(repeats):
                wait_for(self.device)
                start = time.perf_counter()
                result = call()
                wait_for(self.device)
                best = min(best, time.perf_counter() - start)
            found[stage] = best, _peak_gb()
            return result

        for stage, transform in self.preprocessing.items():
            data = timed(stage, lambda t=transform, d=data: t(d))
        image = data[Keys.IMAGE][None].to(self.device)
        image = image.as_tensor() if hasattr(image, "as_tensor") else image
        self.network.eval()
        with torch.inference_mode():
            plain = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                pred = self._networks(image, timed)
            timed("1 step, contiguous, float32", lambda: plain(image.contiguous()), self.repeats)
            for name, inferer in self.inferers.items():
                timed(name, lambda i=inferer: i(image, self.network))
        timed("restoring and writing", lambda: self.postprocessing({**data, Keys.PRED: pred[0]}))
        return found

    def _networks(self, image: Tensor, timed: Callable) -> Tensor:
        """Time the network's parts, the network, and the yardstick; the network's answer."""
        if hasattr(self.network, "predict_prior"):
            prior = timed("network, its prior", lambda: self.network.predict_prior(image), self.repeats)
            if getattr(self.network, "broad", None) is not None:
                prior = timed("network, its broad branch", lambda: self.network.blend(prior, image), self.repeats)
            if getattr(self.network, "dvh", None) is not None:
                shift = timed("network, its DVH estimate", lambda: self.network.dvh_shift(prior, image), self.repeats)
                prior = prior + shift
            known = timed("network, conditions", lambda: self.network.encode(image, prior), self.repeats)
            last = torch.full((1,), self.network.schedule.num_train_timesteps - 1, device=self.device)
            noise = torch.zeros_like(image[:, :1])
            timed("network, one evaluation", lambda: self.network.denoise(noise, last, known), self.repeats)
        pred = timed("network, 1 step", lambda: self.network(image), self.repeats)
        yardstick = CascadeUNet(image.shape[1]).to(self.device).eval()
        padded = nn.functional.pad(image, [p for n in reversed(image.shape[2:]) for p in (0, -n % 16)])
        timed("C3D-sized cascade", lambda: yardstick(padded), self.repeats)
        return pred


def table(rows: Sequence[Mapping]) -> str:
    """The rows as a Markdown table."""
    lines = ["| stage | seconds | ratio to 1 step | peak memory so far, GB |", "|---|---|---|---|"]
    lines += [f"| {r['stage']} | {r['seconds']:.2f} | {r['ratio_to_1_step']:.2f} | {r['peak_gb']:.2f} |" for r in rows]
    return "\n".join(lines)


def _peak_gb() -> float:
    """Largest resident memory of this process up to now (``getrusage``; KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
