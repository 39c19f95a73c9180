"""Training steps, schedules, checkpoints and weights, with networks of one weight."""

from __future__ import annotations

import csv
import json
import math
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, MetaTensor, decollate_batch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents

from custom import engines
from custom.case import CaseError
from custom.engines import (
    EmaExport,
    HistoryWriter,
    MetricsCollector,
    ObjectiveUpdate,
    PhasedObjective,
    Resume,
    Unwrapd,
    ValidateAtEnd,
    WallClockSchedule,
    WeightsLoader,
    collate_cases,
)


def one_weight(value: float = 1.0) -> torch.nn.Linear:
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, value)
    return network


def squares(network, batch) -> dict[str, torch.Tensor]:
    """How far the network is from doubling its input."""
    error = network(batch["image"]) - 2 * batch["image"]
    return {"mse": (error**2).mean(), "mae": error.abs().mean()}


def make_trainer(network, optimizer, handlers, epochs=3, objective=squares, **update) -> SupervisedTrainer:
    """Four samples an epoch."""
    loader = DataLoader([{"image": torch.tensor([float(n + 1)])} for n in range(4)], batch_size=1)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=epochs, train_data_loader=loader, network=network, optimizer=optimizer,
        loss_function=None, decollate=False, train_handlers=handlers,
        iteration_update=ObjectiveUpdate(objective, autocast_dtype=None, **update))
    trainer.logger.setLevel("CRITICAL")
    return trainer


# ------------------------------------------------------------------------------------------------------ one update
def test_update_is_one_weighted_clipped_step():
    network = one_weight()
    trainer = make_trainer(network, torch.optim.SGD(network.parameters(), lr=0.1), [], epochs=1,
                           loss_weights={"mse": 0.5, "mae": 2.0}, clip_norm=1e9)
    seen = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda e: (seen.extend(e.state.output),
                                                                             e.terminate()))
    trainer.run()
    # x = 1, w = 1: mse 1 with gradient -2, mae 1 with gradient -1
    assert seen == [{"loss": 0.5 + 2.0, "mse": 1.0, "mae": 1.0}]
    assert network.weight.item() == pytest.approx(1 + 0.1 * (0.5 * 2 + 2.0 * 1))

    network = one_weight()
    trainer = make_trainer(network, torch.optim.SGD(network.parameters(), lr=0.1), [], epochs=1, clip_norm=0.5)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda e: e.terminate())
    trainer.run()
    assert network.weight.item() == pytest.approx(1 + 0.1 * 0.5, rel=1e-4)


def test_number_formats_that_would_lose_gradients_are_refused():
    for dtype in ("float16", "bf16"):
        with pytest.raises(CaseError, match=f"autocast_dtype '{dtype}'; expected 'bfloat16' or None"):
            engines.ObjectiveUpdate(lambda network, batch: {}, autocast_dtype=dtype)


def test_batch_transform_sees_each_batch():
    network = one_weight()
    trainer = make_trainer(network, torch.optim.SGD(network.parameters(), lr=0.0), [], epochs=1,
                           batch_transform=lambda batch: {"image": 0 * batch["image"]})
    trainer.run()
    assert trainer.state.output == [{"loss": 0.0, "mse": 0.0, "mae": 0.0}]


def test_terms_rise_over_their_share_of_the_run():
    update = ObjectiveUpdate(squares, {"dvh": 4.0}, ramped=["dvh", "other"], ramp=(0.2, 0.6))
    assert [update.weight("dvh", p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, 2, 4, 4])
    assert update.weight("other", 0.5) == pytest.approx(0.75) and update.weight("mse", 0.0) == 1.0


def test_training_learns_and_stops_at_a_loss_that_is_no_number():
    network = one_weight()
    make_trainer(network, torch.optim.SGD(network.parameters(), lr=0.05), [], epochs=10).run()
    assert network.weight.item() == pytest.approx(2.0, abs=0.1)

    def broken(network, batch):
        return {"mse": network(batch["image"]).mean() * math.nan, "fine": network(batch["image"]).mean()}

    trainer = make_trainer(network, torch.optim.SGD(network.parameters(), lr=0.05), [], objective=broken)
    before = network.weight.item()
    with pytest.raises(CaseError, match="loss is nan at iteration 1; terms .*mse.*nan.*learning rate"):
        trainer.run()
    assert network.weight.item() == before


def test_objective_is_told_the_progress_and_changes_its_phase():
    def named(name):
        return lambda network, batch: {name: network(batch["image"]).mean()}

    objective = PhasedObjective(named("prior"), named("denoiser"), change_at=0.5)
    network = one_weight()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    trainer = make_trainer(network, optimizer, [WallClockSchedule(optimizer)], epochs=2, objective=objective)
    seen = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED,
                              lambda e: seen.append((set(e.state.output[0]) - {"loss"}).pop()))
    trainer.run()
    assert seen == ["prior"] * 4 + ["denoiser"] * 4
    for change_at, name in ((0.0, "denoiser"), (1.0, "prior")):
        only = PhasedObjective(named("prior"), named("denoiser"), change_at)
        only.progress = 0.0 if change_at == 0 else 0.99
        assert set(only(network, {"image": torch.ones(1, 1)})) == {name}


# ------------------------------------------------------------------------------------------------------ schedule
@pytest.fixture
def optimizer():
    return torch.optim.SGD(one_weight().parameters(), lr=0.4)


def test_factor_warms_up_and_falls_as_a_cosine(optimizer):
    schedule = WallClockSchedule(optimizer, warmup=0.2, final=0.1)
    assert schedule.factor(0.0) == 0.01 and schedule.factor(0.1) == pytest.approx(0.5)
    assert schedule.factor(0.2) == pytest.approx(1.0) and schedule.factor(1.0) == pytest.approx(0.1)
    assert schedule.factor(0.6) == pytest.approx((1.0 + 0.1) / 2)
    assert schedule.factor(0.4) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_factor_begins_anew_at_a_phases_change(optimizer):
    whole = WallClockSchedule(optimizer, warmup=0.1, final=0.05)
    phased = WallClockSchedule(optimizer, warmup=0.1, final=0.05, restart_at=0.8)
    for along in (0.0, 0.05, 0.3, 0.9):
        assert phased.factor(0.8 * along) == pytest.approx(whole.factor(along))
        assert phased.factor(0.8 + 0.2 * along) == pytest.approx(whole.factor(along), abs=1e-6)
    assert phased.factor(0.8 - 1e-9) == pytest.approx(0.05) and phased.factor(1.0) == pytest.approx(0.05)


def run_with_schedule(schedule, epochs=3) -> tuple[Engine, list[float]]:
    engine, rates = Engine(lambda engine, batch: None), []
    schedule.attach(engine)
    (group,) = schedule.optimizer.param_groups
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: rates.append(group["lr"]))
    engine.run(range(4), max_epochs=epochs)
    return engine, rates


def test_schedule_by_epochs(optimizer):
    schedule = WallClockSchedule(optimizer, warmup=0.25, final=0.1)
    engine, rates = run_with_schedule(schedule)
    assert rates == pytest.approx([0.4 * schedule.factor(n / 12) for n in range(12)])
    assert engine.state.iteration == 12 and engine.state.progress == pytest.approx(11 / 12)


def test_schedule_by_the_clock_ends_the_run_and_goes_on_after_a_break(optimizer, monkeypatch):
    """One minute, 12 s a step: four steps until 48 s; an interrupted run has its seconds from the checkpoint."""
    seconds = count(1000.0, 12.0)
    monkeypatch.setattr(engines, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    schedule = WallClockSchedule(optimizer, minutes=1.0, warmup=0.0)
    _, rates = run_with_schedule(schedule, epochs=100)
    assert rates == pytest.approx([0.4 * schedule.factor(s / 60) for s in (12, 24, 36, 48)])

    optimizer.param_groups[0]["lr"] = 0.4
    again = WallClockSchedule(optimizer, minutes=1.0, warmup=0.0)
    again.load_state_dict({"spent_s": 30.0})
    _, rates = run_with_schedule(again, epochs=100)
    assert rates == pytest.approx([0.4 * again.factor(s / 60) for s in (42, 54)])
    assert again.state_dict() == {"spent_s": 66.0}


def test_processor_time_is_a_clock_of_its_own(optimizer, monkeypatch):
    """20 s of computing a step of a minute: two steps, whatever the wall clock says."""
    seconds = count(5.0, 20.0)
    monkeypatch.setattr(engines, "time", SimpleNamespace(process_time=lambda: next(seconds), monotonic=None))
    schedule = WallClockSchedule(optimizer, minutes=1.0, warmup=0.0, clock="processor")
    _, rates = run_with_schedule(schedule, epochs=100)
    assert rates == pytest.approx([0.4 * schedule.factor(s / 60) for s in (20, 40)])
    with pytest.raises(CaseError, match="clock 'sun'"):
        WallClockSchedule(optimizer, clock="sun")


# ------------------------------------------------------------------------------------------------------ resume
class PowerError(Exception):
    """The power fails."""


def run_resumed(folder, epochs=6, stop_at=None, crash_in=None):
    """Weight, momentum and iterations of a run that may stop after an iteration, or crash as an epoch begins."""
    network = one_weight()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    schedule, history = WallClockSchedule(optimizer), HistoryWriter(folder / "history.csv")
    kept = {"network": network, "optimizer": optimizer, "schedule": schedule, "history": history}
    trainer = make_trainer(network, optimizer, [schedule, history, Resume(folder, kept, interval=3)], epochs=epochs)
    iterations = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: iterations.append(e.state.iteration))
    if stop_at:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), lambda e: e.terminate())

    def crash(engine):
        raise PowerError

    if crash_in:
        trainer.add_event_handler(Events.EPOCH_STARTED(once=crash_in), crash)
        with pytest.raises(PowerError):
            trainer.run()
    else:
        trainer.run()
    state = optimizer.state_dict()["state"]
    return network.weight.item(), state[0]["momentum_buffer"].item() if state else None, iterations


def test_resumed_run_equals_one_without_a_break(tmp_path):
    weight, momentum, _ = run_resumed(tmp_path / "whole")
    _, _, first = run_resumed(tmp_path / "broken", crash_in=4)
    assert first == list(range(1, 13))
    again, momentum_again, second = run_resumed(tmp_path / "broken")
    assert second == list(range(13, 25))
    assert (again, momentum_again) == pytest.approx((weight, momentum), rel=1e-6)
    assert {p.name for p in (tmp_path / "broken").iterdir()} == {"checkpoint.pt", "history.csv"}
    assert run_resumed(tmp_path / "broken")[2] == []  # over: nothing is trained again
    rows = [[row.split(",")[n] for n in (0, 2, 3)] for row in
            (tmp_path / "broken" / "history.csv").read_text().splitlines()]
    assert rows == [[row.split(",")[n] for n in (0, 2, 3)] for row in
                    (tmp_path / "whole" / "history.csv").read_text().splitlines()]


def test_epoch_that_was_stopped_is_repeated_with_its_weights(tmp_path):
    weight, _, first = run_resumed(tmp_path, stop_at=14)
    assert first == list(range(1, 15))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)  # plain data, no code
    assert state["network"]["weight"].item() == weight and state["epochs"] == 3
    assert run_resumed(tmp_path)[2] == list(range(13, 25))


def test_checkpoint_is_kept_within_an_epoch(tmp_path):
    network = one_weight()
    resume, saved = Resume(tmp_path, {"network": network}, interval=3), []
    trainer = make_trainer(network, torch.optim.SGD(network.parameters(), lr=0.01), [resume], epochs=1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: saved.append(resume.path.is_file()))
    trainer.run()
    assert saved == [False, False, True, True]


# ------------------------------------------------------------------------------------------------------ weights
def test_weights_are_loaded_before_the_run(tmp_path):
    torch.save(one_weight(3.0).state_dict(), tmp_path / "model.pt")
    network, seen = one_weight(), []
    engine = Engine(lambda engine, batch: seen.append(network.weight.item()))
    WeightsLoader(tmp_path / "model.pt", network).attach(engine)
    engine.run([0])
    assert seen == [3.0]
    both = one_weight(), one_weight()
    WeightsLoader(tmp_path / "model.pt", both).load()
    assert [network.weight.item() for network in both] == [3.0, 3.0]


@pytest.mark.parametrize("path", ["", None, "nowhere/model.pt"])
def test_missing_weights_are_told(path):
    with pytest.raises(CaseError, match="no weights at .*not trained.*released bundle"):
        WeightsLoader(path, one_weight()).load()


def test_training_may_start_from_nothing_but_not_from_a_wrong_path():
    network = one_weight(5.0)
    WeightsLoader("", network, required=False).load()
    assert network.weight.item() == 5.0
    with pytest.raises(CaseError, match="no weights at wrong.pt"):
        WeightsLoader("wrong.pt", network, required=False).load()


class Intruder:
    """Unpickled, this would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_truncated_pickled_and_other_files_are_refused(tmp_path):
    path, made = tmp_path / "model.pt", tmp_path / "made"
    torch.save(torch.nn.Linear(40, 40).state_dict(), path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CaseError, match="model.pt: not a weights file that can be read safely"):
        WeightsLoader(path, one_weight()).load()
    torch.save({"weight": Intruder(made)}, path)
    with pytest.raises(CaseError, match="read safely"):
        WeightsLoader(path, one_weight()).load()
    assert not made.exists()
    for other in ([torch.ones(1)], {"network": one_weight().state_dict()}):
        torch.save(other, path)
        with pytest.raises(CaseError, match="expected a raw state_dict, found (list|dict)"):
            WeightsLoader(path, one_weight()).load()


def test_another_networks_weights_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(1, 1).state_dict(), path)
    with pytest.raises(CaseError, match="another network; 1 of 1 tensors fit, the first that does not is 'bias'"):
        WeightsLoader(path, one_weight()).load()
    torch.save(torch.nn.Linear(2, 1, bias=False).state_dict(), path)
    with pytest.raises(CaseError, match="0 of 1 tensors fit, the first that does not is 'weight'"):
        WeightsLoader(path, one_weight()).load()


@pytest.mark.parametrize(("fold", "init_weights", "warned"), [(0, "model.pt", True), (0, "", False),
                                                              (None, "model.pt", False)])  # fmt: skip
def test_a_fold_that_begins_with_weights_is_warned_of(fold, init_weights, warned, caplog):
    """Weights that have seen the cases left out would teach the DVH estimate to trust what is known by heart."""
    begun = []
    branch = SimpleNamespace(begin=lambda patients, share: begun.append((len(patients), share)))
    variants = [{"less": less, "voxels": torch.zeros(2, 3), "patient": torch.zeros(4)} for less in (False, True)]
    engines.BroadStart(branch, [{"variants": variants}] * 3, 0.5, fold, init_weights).begin()
    assert begun == [(3, 0.5)] and ("known by heart" in caplog.text) is warned


def test_unstrict_loading_takes_what_fits(tmp_path):
    path, network = tmp_path / "model.pt", torch.nn.Linear(2, 1)
    torch.save({"weight": torch.zeros(1, 3), "bias": torch.tensor([7.0]), "other": torch.ones(1)}, path)
    before = network.weight.clone()
    WeightsLoader(path, network, strict=False).load()
    assert network.bias.item() == 7.0 and torch.equal(network.weight, before)


# ------------------------------------------------------------------------------------------------------ collation
def test_collated_cases_come_back_whole():
    case = SimpleNamespace(name="any object")
    affine = torch.diag(torch.tensor([-2.0, -3.0, 4.0, 1.0], dtype=torch.float64))
    items = [{"image": MetaTensor(torch.full((1, 2, 2, 2), float(n)), affine=affine), "context": torch.tensor([1.0]),
              "case": case, "warnings": ["a", "b"], "path": f"folder{n}", "none": None} for n in range(2)]
    batch = collate_cases(items)
    assert batch["image"].shape == (2, 1, 2, 2, 2) and batch["context"].shape == (2, 1)
    back = [Unwrapd()(item) for item in decollate_batch(batch)]
    assert len(back) == 2
    for n, item in enumerate(back):
        assert item["case"] is case and item["warnings"] == ["a", "b"] and item["path"] == f"folder{n}"
        assert item["none"] is None and (item["image"] == n).all()
        torch.testing.assert_close(item["image"].affine, affine)
    assert Unwrapd()({"pred": 1}) == {"pred": 1}


# ------------------------------------------------------------------------------------------------------ records
def test_best_averaged_weights_are_exported_and_patience_ends(tmp_path, optimizer):
    network, scores = one_weight(0.0), iter([3.0, 2.0, 2.5, 2.2])
    trainer, validator = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
    validator.add_event_handler(Events.EPOCH_STARTED, lambda e: e.state.metrics.update(dose_score=next(scores)))
    export, kept = EmaExport(network, tmp_path / "models", patience=2), []
    export.attach(validator)

    def validate(engine):
        torch.nn.init.constant_(network.weight, engine.state.epoch)
        validator.run([0])
        kept.append(torch.load(tmp_path / "models" / "model.pt", weights_only=True)["weight"].item())

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    WallClockSchedule(optimizer, early_stop=export).attach(trainer)
    trainer.run([0], max_epochs=9)
    assert kept == [1, 2, 2, 2] and [p.name for p in (tmp_path / "models").iterdir()] == ["model.pt"]
    assert export.state_dict() == {"best": 2.0, "since": 2, "phase": 0} and export.exhausted
    again = EmaExport(network, tmp_path)  # without patience
    again.load_state_dict(export.state_dict())
    assert (again.best, again.since, again.exhausted) == (2.0, 2, False)


def test_the_best_of_the_last_phase_is_exported(tmp_path, optimizer):
    """The second phase scores worse, but only its weights have its part trained."""
    network, scores = one_weight(0.0), iter([3.0, 2.0, 2.4, 2.3])
    trainer, validator = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
    validator.add_event_handler(Events.EPOCH_STARTED, lambda e: e.state.metrics.update(dose_score=next(scores)))
    export, kept = EmaExport(network, tmp_path), []
    export.attach(validator)

    def validate(engine):
        torch.nn.init.constant_(network.weight, engine.state.epoch)
        validator.run([0])
        kept.append(torch.load(tmp_path / "model.pt", weights_only=True)["weight"].item())

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    WallClockSchedule(optimizer, restart_at=0.5, early_stop=export).attach(trainer)
    trainer.run([0], max_epochs=4)
    assert kept == [1, 2, 3, 4] and export.best == 2.3


@pytest.mark.parametrize(
    ("minutes", "every", "validated"),
    [(1.0, 1, [1]), (1.3, 1, [1, 2]), (1.6, 1, [1, 2]), (1.6, 2, [2]), (100.0, 1, [1, 2, 3]), (100.0, 2, [2, 3])],
    ids=["before an epoch's first step", "within an epoch", "before its last step", "before its last step, none yet",
         "at its end", "between two validations"])
def test_last_weights_of_a_run_are_validated_once(optimizer, monkeypatch, minutes, every, validated):
    """12 s a step, four steps an epoch: the clock stops the run before step 5, 7 or 8, or not at all."""
    seconds, epochs = count(0.0, 12.0), []
    monkeypatch.setattr(engines, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    trainer, validator = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
    validator.add_event_handler(Events.STARTED, lambda _: epochs.append(trainer.state.epoch))
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=every), lambda _: validator.run([0]))
    validate = ValidateAtEnd(validator)
    monkeypatch.setattr(validator, "run", lambda epoch, run=validator.run: run([0]))
    validate.attach(trainer)
    WallClockSchedule(optimizer, minutes=minutes).attach(trainer)
    trainer.run(range(4), max_epochs=3)
    assert epochs == validated


def test_history_has_the_means_of_each_epoch_and_each_validation(tmp_path):
    network, validator = one_weight(0.0), Engine(lambda engine, batch: None)
    history = HistoryWriter(tmp_path / "new" / "history.csv")
    history.attach(validator)
    validator.add_event_handler(Events.EPOCH_STARTED, lambda e: e.state.metrics.update(dose_score=0.5, table=[1]))
    trainer = make_trainer(network, torch.optim.SGD(network.parameters(), lr=0.0), [history], epochs=2)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=2), lambda e: validator.run([0]))
    trainer.run()
    with (tmp_path / "new" / "history.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    means = [("loss", 30.0 + 5.0), ("mse", 30.0), ("mae", 5.0)]  # errors of 2, 4, 6 and 8
    assert [(r["epoch"], r["name"], float(r["value"])) for r in rows] == [
        *(("1", *mean) for mean in means), *(("2", *mean) for mean in means), ("2", "dose_score", 0.5)]
    assert all(float(r["minutes"]) < 1 for r in rows)


def test_metrics_of_all_cases_are_written_once_the_run_is_over(tmp_path):
    engine = Engine(lambda engine, batch: [{"metrics": {"case": f"pt_{batch}", "openkbp_dose_error_gy": float(batch)}}])
    engine.register_events(*IterationEvents)
    MetricsCollector(tmp_path).attach(engine)
    engine.run([1, 3])
    engine.run([2, 4], max_epochs=1)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["dose_score"] == 3.0 and [row["case"] for row in found["per_case"]] == ["pt_2", "pt_4"]
