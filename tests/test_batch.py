"""A case that fails costs itself only, wherever it fails; what cannot be written ends the run."""

from __future__ import annotations

import logging

import pytest
import torch
from monai.data import DataLoader
from monai.inferers import SimpleInferer

from custom.batch import BatchError, CaseDataset, CaseEvaluator
from custom.case import CaseError, OutputError
from custom.engines import MetricsCollector, collate_cases


def evaluator(read=None, network=None, write=None, names="abc", **options) -> tuple[CaseEvaluator, list[float]]:
    """One number a case: 1, 2, 3; ``read``, ``network`` and ``write`` may raise on some of them."""
    written: list[float] = []

    def load(item):
        number = float("abc".index(item["image"][-1]) + 1)
        if read:
            read(number)
        return {"image": torch.full((1, 2), number)}

    def save(item):
        if write:
            write(float(item["pred"].max()))
        written.append(float(item["pred"].max()))
        return {**item, "metrics": {"case": "x", "dose_score": 1.0}}

    class Net(torch.nn.Module):
        def forward(self, image):
            if network:
                network(float(image.max()))
            return image

    dataset = CaseDataset([{"image": f"/data/{name}"} for name in names], load)
    loader = DataLoader(dataset, batch_size=1, num_workers=0, collate_fn=collate_cases)
    return CaseEvaluator(device=torch.device("cpu"), val_data_loader=loader, network=Net(), inferer=SimpleInferer(),
                         postprocessing=save, **options), written


def raising(number: float, error: Exception):
    def check(value: float) -> None:
        if value == number:
            raise error
    return check


@pytest.mark.parametrize("place", ["read", "network", "write"])
def test_the_others_are_done(place, caplog):
    run, written = evaluator(**{place: raising(2.0, CaseError("b: no target; name one"))})
    with caplog.at_level(logging.ERROR), pytest.raises(BatchError, match="1 of 3 cases failed.*\n  1. .*b: no target"):
        run.run()
    assert written == [1.0, 3.0]
    assert sum("no target" in record.getMessage() for record in caplog.records) == 1


def test_an_error_that_nobody_foresaw_is_told_with_its_kind_and_path():
    run, written = evaluator(read=raising(1.0, ZeroDivisionError("division by zero")))
    with pytest.raises(BatchError, match="/data/a: ZeroDivisionError: division by zero"):
        run.run()
    assert written == [2.0, 3.0]


def test_a_single_case_gives_its_message_alone():
    run, _ = evaluator(read=raising(1.0, CaseError("a: no target")), names="a")
    with pytest.raises(BatchError) as caught:
        run.run()
    assert str(caught.value) == "/data/a: a: no target" or str(caught.value) == "a: no target"


def test_without_a_failure_nothing_is_raised_and_a_second_run_starts_afresh():
    trouble = [raising(2.0, CaseError("b: x"))]
    run, written = evaluator(read=lambda value: trouble[0](value))
    with pytest.raises(BatchError):
        run.run()
    trouble[0] = raising(9.0, CaseError(""))
    run.run()
    assert written == [1.0, 3.0, 1.0, 2.0, 3.0]


def test_what_cannot_be_written_ends_the_run():
    run, written = evaluator(write=raising(2.0, OutputError("disk full")))
    with pytest.raises(OutputError, match="disk full"):
        run.run()
    assert written == [1.0]


def test_an_output_folder_that_cannot_be_made_is_told_before_the_first_case(tmp_path):
    (tmp_path / "file").write_text("")
    run, written = evaluator(output_dir=tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="cannot write to .*choose another"):
        run.run()
    assert written == []


def test_the_check_leaves_no_folder_behind(tmp_path):
    run, _ = evaluator(output_dir=tmp_path / "out", read=raising(1.0, CaseError("a")), names="a")
    with pytest.raises(BatchError):
        run.run()
    assert list(tmp_path.iterdir()) == []


def test_results_of_an_earlier_run_are_pointed_at(tmp_path):
    (tmp_path / "b").mkdir()
    run, _ = evaluator(output_dir=tmp_path, read=raising(2.0, CaseError("b: x")))
    with pytest.raises(BatchError, match="from an earlier run"):
        run.run()


def test_scores_are_of_the_cases_that_were_done(tmp_path):
    collector = MetricsCollector(tmp_path)
    run, _ = evaluator(read=lambda value: (_ for _ in ()).throw(CaseError("all fail")), val_handlers=[collector])
    with pytest.raises(BatchError, match="3 of 3 cases failed"):
        run.run()
    assert collector.rows == [] and not list(tmp_path.iterdir())
