"""Many processes: one gradient from all of them in training, a share of the cases for each in batch inference.

``torchrun`` starts the processes and says to each, in its environment, which of how many it is; ``multi_gpu.json`` and
``shards.json`` wire what is here.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from monai.data import DistributedSampler
from monai.engines import Evaluator
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from custom.batch import BatchError
from custom.case import CaseError
from custom.datalists import is_done, prepare

__all__ = ["DistributedObjective", "ShareOfCases", "prepare_shares", "share_of", "start", "stop",
           "validation_sampler"]

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(hours=6)  # a process may wait this long for another that prepares cases


def start(device: torch.device) -> int:
    """Join the other processes that ``torchrun`` started; the rank of this one.

    Args:
        device: of this process; a GPU of its own speaks NCCL, the CPU gloo.

    Raises:
        CaseError: not started by ``torchrun``.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise CaseError(f"multi_gpu.json: {missing} are not in the environment; start the run with torchrun, such as "
                        "`torchrun --nproc_per_node=2 -m monai.bundle run train ...`")
    if not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return distributed.get_rank()


def stop() -> None:
    """Leave the other processes."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


class DistributedObjective:
    """An objective whose gradient is the mean over all processes, as of one batch that holds all of theirs.

    Objectives call a network's parts rather than the network, so the two together are what DistributedDataParallel
    wraps. Parameters that a phase of the training does not use get no gradient in any process.

    Args:
        objective: ``objective(network, batch) -> {name: scalar tensor}``, each a mean over the batch.
        network: on this process's device.
    """

    def __init__(self, objective: Callable, network: nn.Module) -> None:
        self.objective = objective
        self.parallel = DistributedDataParallel(
            _Objective(objective, network), find_unused_parameters=True, broadcast_buffers=False)

    @property
    def progress(self) -> float:
        """Share of the run that is over, for objectives that change with it."""
        return getattr(self.objective, "progress", 0.0)

    @progress.setter
    def progress(self, value: float) -> None:
        self.objective.progress = value

    def __call__(self, network: nn.Module, batch: Mapping) -> dict[str, torch.Tensor]:
        return self.parallel(batch)


class _Objective(nn.Module):
    """An objective as a module, so that its whole computation is one forward pass."""

    def __init__(self, objective: Callable, network: nn.Module) -> None:
        super().__init__()
        self.objective, self.network = objective, network

    def forward(self, batch: Mapping) -> dict[str, torch.Tensor]:
        return self.objective(self.network, batch)


def validation_sampler(dataset: Sequence) -> DistributedSampler:
    """Each process validates its own cases; every case counts once in the score.

    Raises:
        CaseError: fewer cases than processes, which would leave some waiting for the others' scores.
    """
    count = distributed.get_world_size()
    if len(dataset) < count:
        raise CaseError(f"multi_gpu.json: {len(dataset)} validation cases for {count} processes; "
                        "each needs one. Give more cases, a larger --validation_share, or start fewer processes")
    return DistributedSampler(dataset, shuffle=False, even_divisible=False)


def prepare_shares(datasets: Sequence, num_workers: int = 2) -> None:
    """Fill the caches of persistent datasets, each process its share; returns when all have."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    prepare([Subset(data, share_of(range(len(data)), rank, count)) for data in datasets if len(data) > rank],
            num_workers)
    distributed.barrier()


def share_of(items: Sequence, rank: int | None = None, count: int | None = None) -> list:
    """Every ``count``-th item from the ``rank``-th on; by default as the environment's RANK and WORLD_SIZE say."""
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    count = int(os.environ.get("WORLD_SIZE", 1)) if count is None else count
    if not 0 <= rank < count:
        raise CaseError(f"shares: RANK is {rank}, WORLD_SIZE {count}; expected a rank from 0 to {count - 1}")
    return list(items[rank::count])


class ShareOfCases:
    """This process's cases of a batch, without those that are done: the next run, or the restarted worker, goes on.

    The share does not depend on what is done, so that no case falls between two processes. After each restart by
    ``torchrun`` the order begins one case later: a case that kills its worker is tried last, not first again.

    Args:
        cases: all cases, in the same order in every process.
        output_dir: folder of the results; a case with a report there is done.
    """

    def __init__(self, cases: Sequence[Mapping], output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self.rank = int(os.environ.get("RANK", 0))
        own = share_of(cases)
        todo = [case for case in own if not is_done(case, output_dir)]
        turn = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) % max(len(todo), 1)
        self.cases = todo[turn:] + todo[:turn]
        logger.info("process %d: %d of %d cases are its own, %d are done", self.rank, len(own), len(cases),
                    len(own) - len(todo))

    @property
    def failures_file(self) -> Path:
        """Where the cases are named that could not be predicted."""
        return self.output_dir / f"failed_{self.rank}.json"

    def run(self, evaluator: Evaluator) -> None:
        """Predict the cases.

        Cases that cannot be predicted are written to ``failed_<rank>.json`` rather than raised, since an exit code
        would make ``torchrun`` end the other workers.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)  # the list of failures goes there, also where no dose does
        self.failures_file.unlink(missing_ok=True)
        if not self.cases:
            return
        try:
            evaluator.run()
        except BatchError as error:
            failures = [asdict(failure) for failure in evaluator.failures]
            self.failures_file.write_text(json.dumps(failures, indent=1), encoding="utf-8")
            logger.error("%s\nwritten to %s", error, self.failures_file)
