"""What training and inference need beyond MONAI's engines and ignite's handlers."""

from __future__ import annotations

import csv
import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from ignite import distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from monai.data import list_data_collate
from monai.engines import Evaluator, Trainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys

from custom.case import CaseError
from custom.metrics import write_metrics
from custom.networks.growth import grow
from custom.precision import wait_for
from custom.whole import whole_file

__all__ = [
    "Attached",
    "BroadStart",
    "EmaExport",
    "HistoryWriter",
    "MetricsCollector",
    "ObjectiveUpdate",
    "PhasedObjective",
    "Resume",
    "Unwrapd",
    "ValidateAtEnd",
    "WallClockSchedule",
    "WeightsLoader",
    "collate_cases",
]

logger = logging.getLogger(__name__)


def collate_cases(batch: Sequence[Mapping]) -> dict:
    """Collate tensors as MONAI does and keep everything else (cases, paths, notes) as lists."""
    tensors = [{k: v for k, v in item.items() if isinstance(v, torch.Tensor)} for item in batch]
    out = list_data_collate(tensors)
    for key in batch[0]:
        if key not in out:
            out[key] = [_Whole.wrap(item[key]) for item in batch]
    return out


class _Whole(str):
    """Holds any object through MONAI's collation, which takes a string for one value; unwrapped by Unwrapd."""

    value: object

    @classmethod
    def wrap(cls, value: object) -> _Whole:
        whole = cls(type(value).__name__)
        whole.value = value
        return whole


class Unwrapd:
    """First transform after the network: gives back what :func:`collate_cases` wrapped; else changes nothing."""

    def __call__(self, data: Mapping) -> dict:
        return {k: v.value if isinstance(v, _Whole) else v for k, v in data.items()}


class ObjectiveUpdate:
    """One training step for ``SupervisedTrainer(iteration_update=...)``: an objective's weighted terms, one update.

    Args:
        objective: ``objective(network, batch) -> {name: scalar tensor}``.
        loss_weights: weight of each term; a term without one counts 1.
        ramped: terms whose weight rises linearly from 0 over ``ramp`` (shares of the run).
        clip_norm: gradient norm limit.
        autocast_dtype: ``"bfloat16"`` or None for float32; float16 would lose small gradients.
        batch_transform: applied to each batch on the device, such as MONAI's ``MixUpd`` (the paper's mixup).
    """

    def __init__(self, objective: Callable, loss_weights: Mapping[str, float] | None = None,
                 ramped: Sequence[str] = (), ramp: tuple[float, float] = (0.3, 0.5), clip_norm: float = 1.0,
                 autocast_dtype: str | None = "bfloat16", batch_transform: Callable | None = None) -> None:
        if autocast_dtype not in (None, "bfloat16"):
            raise CaseError(f"training: autocast_dtype {autocast_dtype!r}; expected 'bfloat16' or None (float32)")
        self.batch_transform = batch_transform
        self.objective, self.loss_weights = objective, dict(loss_weights or {})
        self.ramped, self.ramp, self.clip_norm = tuple(ramped), ramp, clip_norm
        self.dtype = getattr(torch, autocast_dtype) if autocast_dtype else None

    def weight(self, term: str, progress: float) -> float:
        """Weight of a term at ``progress`` (0 to 1) of the run."""
        weight = self.loss_weights.get(term, 1.0)
        if term in self.ramped:
            low, high = self.ramp
            weight *= min(1.0, max(0.0, (progress - low) / max(high - low, 1e-9)))
        return weight

    def __call__(self, engine: Engine, batchdata: Mapping) -> list[dict]:
        device = engine.state.device
        batch = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in
                 batchdata.items()}
        if self.batch_transform is not None:
            batch = self.batch_transform(batch)
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        progress = getattr(engine.state, "progress", 0.0)
        if hasattr(self.objective, "progress"):
            self.objective.progress = progress
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None):
            terms = self.objective(engine.network, batch)
        loss = sum(self.weight(name, progress) * value.float() for name, value in terms.items())
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        if not torch.isfinite(loss):
            raise CaseError(f"training: loss is {loss.item()} at iteration {engine.state.iteration}; terms "
                            f"{ {k: v.item() for k, v in terms.items()} }. Lower the learning rate or the clip norm")
        loss.backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        trained = [p for p in engine.network.parameters() if p.requires_grad and p.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, self.clip_norm)
        engine.optimizer.step()
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        mean_loss = idist.all_reduce(loss.item()) / idist.get_world_size()  # over processes; the terms are one's own
        output = {CommonKeys.LOSS: mean_loss, **{name: value.item() for name, value in terms.items()}}
        engine.state.output = [output]  # a list of dictionaries, as MONAI's engines give and its tracking expects
        return engine.state.output


class Attached:
    """A handler that other parts of the config refer to by its id, as an entry of a list of handlers.

    MONAI's ``check_properties`` wants every such entry to be an object with a ``_target_``, not a reference.

    Args:
        handler: has ``attach(engine)``.
    """

    def __init__(self, handler) -> None:
        self.handler = handler

    def attach(self, engine: Engine) -> None:
        self.handler.attach(engine)


class PhasedObjective:
    """One objective up to a share of the run, another from there on: first the dose prior, then the denoiser.

    Args:
        first, then: objectives.
        change_at: progress (0 to 1) at which ``then`` takes over; 0 and 1 leave one of them out.
    """

    def __init__(self, first: Callable, then: Callable, change_at: float) -> None:
        self.first, self.then, self.change_at = first, then, change_at
        self.progress = 0.0

    def __call__(self, network: torch.nn.Module, batch: Mapping) -> dict[str, torch.Tensor]:
        return (self.then if self.progress >= self.change_at else self.first)(network, batch)


class WallClockSchedule:
    """Cosine learning rate with warm-up over minutes of wall clock, or over epochs; ends the run when it is over.

    The time already spent is part of the checkpoint, so a resumed run goes on where it stopped. Of many processes, all
    keep the first one's time, so that they end at the same iteration. Minutes of the process's own processor time are
    for comparisons on a machine that does other work too: they are worth the same however busy it is.

    Args:
        optimizer: its groups' ``lr`` at construction is the peak.
        minutes: length of the run; None schedules by the engine's ``max_epochs``.
        warmup: share of the run with rising learning rate.
        final: learning rate at the end, as a share of the peak.
        restart_at: progress at which the schedule begins anew (a phase's change).
        early_stop: the validator's :class:`EmaExport`, or what stands in for it (``enter_phase``, ``exhausted``,
            ``patience``); its patience ends the run before its time.
        clock: ``"wall"``, or ``"processor"`` for the time that this process's threads have computed, all together.
    """

    CLOCKS = {"wall": "monotonic", "processor": "process_time"}

    def __init__(self, optimizer: torch.optim.Optimizer, minutes: float | None = None, warmup: float = 0.03,
                 final: float = 0.002, restart_at: float = 1.0, early_stop: EmaExport | None = None,
                 clock: str = "wall") -> None:
        if clock not in self.CLOCKS:
            raise CaseError(f"schedule: clock {clock!r}; expected one of {', '.join(self.CLOCKS)}")
        self.clock = getattr(time, self.CLOCKS[clock])
        self.restart_at, self.early_stop = restart_at, early_stop
        self.optimizer, self.minutes, self.warmup, self.final = optimizer, minutes, warmup, final
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.spent_s, self._last = 0.0, None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._step)

    def factor(self, progress: float) -> float:
        """Share of the peak learning rate at ``progress``."""
        if 0.0 < self.restart_at < 1.0:
            start, stop = (0.0, self.restart_at) if progress < self.restart_at else (self.restart_at, 1.0)
            progress = (progress - start) / (stop - start)
        if progress < self.warmup:
            return max(progress / self.warmup, 0.01)
        along = min(1.0, (progress - self.warmup) / (1.0 - self.warmup))
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * along))

    def state_dict(self) -> dict:
        return {"spent_s": self.spent_s}

    def load_state_dict(self, state: Mapping) -> None:
        self.spent_s = float(state["spent_s"])

    def _start(self, engine: Engine) -> None:
        self._last = self.clock()

    def _step(self, engine: Engine) -> None:
        now = self.clock()
        self.spent_s, self._last = idist.broadcast(self.spent_s + now - self._last), now
        if self.minutes is None:
            total = engine.state.max_epochs * engine.state.epoch_length
            progress = (engine.state.iteration - 1) / max(total, 1)
        else:
            progress = self.spent_s / (60.0 * self.minutes)
        engine.state.progress = progress
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(min(progress, 1.0))
        if self.early_stop is not None:
            self.early_stop.enter_phase(int(0.0 < self.restart_at <= progress))
        if self.early_stop is not None and self.early_stop.exhausted:
            logger.info("no better within the patience of %s: stopped early", self.early_stop.patience)
            engine.terminate()
        if progress >= 1.0:
            logger.info("the %s minutes are over at epoch %d", self.minutes, engine.state.epoch)
            engine.terminate()


class Resume:
    """Keep one checkpoint of everything a run needs and start from it when it is there.

    A run that was stopped within an epoch repeats that epoch, with the weights it had.

    Args:
        folder: where ``checkpoint.pt`` lies; written atomically.
        objects: name -> object with ``state_dict``; the epochs done are added.
        interval: iterations between checkpoints, besides the end of each epoch.
    """

    def __init__(self, folder: str | Path, objects: Mapping[str, object], interval: int = 100) -> None:
        self.path = Path(folder) / "checkpoint.pt"
        self.objects, self.interval = dict(objects), interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._load)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self._save, -1)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save, 0)
        engine.add_event_handler(Events.TERMINATE, self._save, -1)

    def _load(self, engine: Engine) -> None:
        if not self.path.is_file():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        Checkpoint.load_objects(self.objects, {name: state[name] for name in self.objects})
        # load_state_dict of an engine that has begun is refused; this is what it would set
        engine.state.epoch = int(state["epochs"])
        engine.state.iteration = engine.state.epoch * engine.state.epoch_length
        logger.info("resumed from %s after epoch %d", self.path, engine.state.epoch)

    def _save(self, engine: Engine, unfinished: int) -> None:
        state = {name: value.state_dict() for name, value in self.objects.items()}
        state["epochs"] = engine.state.epoch + unfinished
        _save_whole(state, self.path)


class EmaExport:
    """After each validation keep the averaged weights as a raw ``model.pt`` when the score is the best of its phase.

    A new phase trains another part, so its first weights replace those of the phase before, whatever they score.

    Args:
        network: module whose ``state_dict`` is exported (the averaged one).
        folder: ``model.pt`` is written here, atomically.
        metric: name in the validator's ``state.metrics``; lower is better.
        patience: validations without improvement after which :attr:`exhausted` is true; None for never.
    """

    def __init__(self, network: torch.nn.Module, folder: str | Path, metric: str = "dose_score",
                 patience: int | None = None) -> None:
        self.network, self.path, self.metric = network, Path(folder) / "model.pt", metric
        self.patience = patience
        self.best, self.since, self.phase = math.inf, 0, 0

    def enter_phase(self, phase: int) -> None:
        """Begin anew when ``phase`` is another one."""
        if phase != self.phase:
            self.best, self.since, self.phase = math.inf, 0, phase

    @property
    def exhausted(self) -> bool:
        """True when the patience is over."""
        return self.patience is not None and self.since >= self.patience

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._check)

    def state_dict(self) -> dict:
        return {"best": self.best, "since": self.since, "phase": self.phase}

    def load_state_dict(self, state: Mapping) -> None:
        self.best, self.since, self.phase = float(state["best"]), int(state["since"]), int(state.get("phase", 0))

    def _check(self, engine: Engine) -> None:
        value = float(engine.state.metrics[self.metric])
        if value < self.best:
            self.best, self.since = value, 0
            _save_whole({k: v.contiguous() for k, v in self.network.state_dict().items()}, self.path)
        else:
            self.since += 1
        logger.info("%s %.4f, best %.4f", self.metric, value, self.best)


class ValidateAtEnd:
    """Validate once more when a run ends with weights that were not: between two validations, or within an epoch.

    Args:
        validator: MONAI evaluator.
    """

    def __init__(self, validator: Evaluator) -> None:
        self.validator = validator
        self.changed: bool | None = None  # since the last validation; None: neither trained nor validated yet

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._set, True)
        self.validator.add_event_handler(Events.COMPLETED, self._set, False)
        engine.add_event_handler(Events.COMPLETED, self._validate)

    def _set(self, engine: Engine, changed: bool) -> None:
        self.changed = changed

    def _validate(self, engine: Engine) -> None:
        resumed_within = self.changed is None and engine.state.iteration % engine.state.epoch_length
        if self.changed or resumed_within:
            self.validator.run(engine.state.epoch)


class HistoryWriter:
    """One CSV of every epoch's mean loss terms and every validation's metrics; rewritten whole, part of the checkpoint.

    Attach the same object to the trainer and to the validator.

    Args:
        path: CSV with the columns epoch, minutes, name, value.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows: list[list] = []
        self.terms: dict[str, list[float]] = {}
        self.epoch = 0
        self.start = time.monotonic()

    def attach(self, engine: Engine) -> None:
        if isinstance(engine, Trainer):
            engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._end)
        else:
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: self._write(
                {name: value for name, value in e.state.metrics.items() if isinstance(value, float)}))

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping) -> None:
        self.rows = [list(row) for row in state["rows"]]
        self.start = time.monotonic() - 60 * max((row[1] for row in self.rows), default=0.0)

    def _begin(self, engine: Engine) -> None:
        self.epoch, self.terms = engine.state.epoch, {}

    def _add(self, engine: Engine) -> None:
        for name, value in engine.state.output[0].items():
            self.terms.setdefault(name, []).append(value)

    def _end(self, engine: Engine) -> None:
        self._write({name: sum(values) / len(values) for name, values in self.terms.items()})

    def _write(self, values: Mapping[str, float]) -> None:
        minutes = round((time.monotonic() - self.start) / 60, 2)
        self.rows += [[self.epoch, minutes, str(name), float(f"{value:.6g}")] for name, value in values.items()]
        if idist.get_rank() > 0:
            return
        with whole_file(self.path) as part, part.open("w", newline="") as stream:
            csv.writer(stream).writerows([["epoch", "minutes", "name", "value"], *self.rows])


class MetricsCollector:
    """Gather each case's row of metrics and write ``metrics.csv`` and ``metrics.json`` when the run is over.

    ``prediction_seconds`` is what the inferer took, without reading, conditions and files.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self.rows: list[Mapping] = []
        self.begun = self.seconds = 0.0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._predicted)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _begin(self, engine: Engine) -> None:
        self.begun = time.perf_counter()

    def _predicted(self, engine: Engine) -> None:
        wait_for(engine.state.device)
        self.seconds = time.perf_counter() - self.begun

    def _add(self, engine: Engine) -> None:
        items = engine.state.output
        self.rows += [{**item["metrics"], "prediction_seconds": self.seconds / len(items)} for item in items]

    def _write(self, engine: Engine) -> None:
        if not self.rows:  # every case failed, which the evaluator says
            return
        summary = write_metrics(self.rows, self.output_dir)
        logger.info("%d cases: dose score %.4f Gy, DVH score %.4f Gy; see %s", len(self.rows), summary["dose_score"],
                    summary["dvh_score"], self.output_dir / "metrics.json")


def _save_whole(state: Mapping[str, object], path: Path) -> None:
    """Save on the first of the processes, whole or not at all."""
    if idist.get_rank() == 0:
        with whole_file(path) as part:
            torch.save(state, part)


def _check_hash(path: Path) -> None:
    """Compare a weights file with the ``<file>.sha256`` beside it, where one was shipped (``sha256sum``'s format)."""
    listed = path.with_name(f"{path.name}.sha256")
    if not listed.is_file():
        return
    expected = listed.read_text(encoding="ascii", errors="replace").split()[:1]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    if [found.hexdigest()] != expected:
        raise CaseError(f"{path}: its SHA-256 is {found.hexdigest()[:16]}..., {listed.name} says "
                        f"{''.join(expected)[:16]}...: not the file that was shipped. Download it anew; if you "
                        f"replaced it on purpose, write the new one: sha256sum {path.name} > {listed.name}")


class BroadStart:
    """Before the training of a network's broad branch, after its weights are loaded: the scale of its features.

    Args:
        branch: :class:`custom.networks.broad.BroadBranch`.
        samples: what :class:`custom.transforms.broad.BroadSamplesd` made of each case; what they leave out of a case on
            purpose does not count.
        share: of the branch in the mean over a block.
        fold, init_weights: what is left out of the training, and where it begins; both together call for a warning.
    """

    def __init__(self, branch: torch.nn.Module, samples: Sequence[Mapping], share: float, fold: int | None = None,
                 init_weights: str | Path = "") -> None:
        self.branch, self.samples, self.share = branch, samples, share
        self.fold, self.init_weights = fold, init_weights

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda _: self.begin())

    def begin(self) -> None:
        """Now."""
        if self.fold is not None and self.init_weights:
            logger.warning("fold %s begins with %s: if these weights have seen the cases that it leaves out, its doses "
                           "of them are known by heart and the DVH estimate learns to trust such doses. Begin a fold "
                           "without init_weights", self.fold, self.init_weights)
        items = (self.samples[i] for i in range(len(self.samples)))
        whole = [variant for item in items for variant in item["variants"] if not variant["less"]]
        self.branch.begin([(v["voxels"], v["patient"]) for v in whole], self.share)


class WeightsLoader:
    """Load a raw ``state_dict`` into the network before the run; without weights there is no prediction.

    Args:
        path: ``model.pt``.
        network: module to load into, or several of one kind, which get the same (a network and its moving average).
        required: False lets a training start from nothing when ``path`` is empty.
        strict: False takes what fits; what a larger network has more begins as nothing
            (:func:`custom.networks.growth.grow`).
    """

    def __init__(self, path: str | Path | None, network: torch.nn.Module | Sequence[torch.nn.Module],
                 required: bool = True, strict: bool = True) -> None:
        self.path, self.required, self.strict = path, required, strict
        self.networks = [network] if isinstance(network, torch.nn.Module) else list(network)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda _: self.load())

    def load(self) -> None:
        """Load now.

        Raises:
            CaseError: no file, no state dict, or another network's.
        """
        if not self.path and not self.required:
            return
        path = Path(self.path or "")
        if not path.is_file():
            raise CaseError(f"no weights at {path}: the network is not trained, so nothing is predicted. Take the "
                            "released bundle's models/model.pt, or train one (README, 'I want to train')")
        _check_hash(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CaseError(f"{path}: not a weights file that can be read safely ({error}); take it anew") from error
        own = self.networks[0].state_dict()
        if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise CaseError(f"{path}: expected a raw state_dict, found {type(state).__name__}")
        fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
        if self.strict and (len(fitting) != len(own) or len(state) != len(own)):
            odd = sorted(set(own) ^ set(state)) or [k for k in own if k not in fitting]
            raise CaseError(f"{path}: weights of another network; {len(fitting)} of {len(own)} tensors fit, the first "
                            f"that does not is {odd[0]!r}. Use the config the weights were trained with")
        fitting = grow(self.networks[0], state)
        for network in self.networks[1:]:
            network.load_state_dict(self.networks[0].state_dict())
        logger.info("loaded %d of %d tensors from %s", len(fitting), len(own), path)
