"""Compliance as a validation metric, and the early stop on it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.handlers import IgniteMetricHandler, from_engine

from custom.case import Case
from custom.dosimetry.constraints import check, compliance, load_constraints
from custom.engines import WallClockSchedule
from custom.phantom import make_case
from custom.protocol.compliance import CompliancePlateau, ComplianceScore
from custom.transforms.condition import AppendContextd, ConditionChannelsd

SPATIAL = ("ct", "prescription", "body", "sdm_target_high", "sdm_target_mid", "sdm_target_low", "sdm_Brainstem",
           "sdm_SpinalCord", "sdm_Parotid_R", "sdm_Parotid_L", "sdm_Esophagus", "sdm_Larynx", "sdm_Bone_Mandible")
CONTEXT = ("has_ct", "is_vmat", "is_lung", "prescription_level", "spacing_x", "spacing_y", "spacing_z",
           *(f"has_{name[4:]}" for name in SPATIAL if name.startswith("sdm_")))
NAMES = [*SPATIAL, *CONTEXT]


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("HeadNeck", 4, spacing_mm=(8, 8, 8))


@pytest.fixture(scope="module")
def image(case):
    data = ConditionChannelsd(spatial_channels=SPATIAL, context_channels=CONTEXT)({"work": case})
    return AppendContextd()(data)["image"]


def dose_of(case, share):
    """70 Gy in the targets, a share of it in the rest of the body."""
    return np.where(case.target_mask(), 1.02, share).astype(np.float32) * case.body


def test_it_is_the_reports_compliance(case, image):
    """Of the structures that the network is told of, with the exact rows."""
    drawn = {f"sdm_{roi}" for roi in case.masks} & set(SPATIAL)
    masks = {roi: mask for roi, mask in case.masks.items() if f"sdm_{roi}" in drawn or roi in case.prescription_gy}
    told = replace(case, masks=masks | {"Body": case.body})
    score = ComplianceScore(NAMES)
    values = []
    for share in (0.2, 0.5, 0.9):
        dose = dose_of(case, share)
        score(torch.from_numpy(dose)[None, None], image[None])
        values.append(compliance(check(load_constraints(), told, dose * case.highest_prescription_gy)))
    assert values[0] > values[1] > values[2]
    assert score.get_buffer().flatten().tolist() == pytest.approx(values, abs=0.01)
    assert float(score.aggregate()) == pytest.approx(np.mean(values), abs=0.01)
    score.reset()
    assert math.isnan(score.aggregate())


def test_lists_and_the_packed_label(case, image):
    score = ComplianceScore(NAMES, structures=["SpinalCord"])
    dose = torch.from_numpy(dose_of(case, 0.9))
    score([dose[None], torch.stack([0.1 * dose, dose])], [image, image])  # the label's second channel does not count
    assert score.get_buffer().flatten().tolist() == [0, 100]
    with pytest.raises(ValueError, match="ComplianceScore: expected"):
        score(dose[None, None], image[None][..., 1:])


def test_it_works_in_a_validator(case, image):
    """As the overlay wires it: of the prediction and, beside it, of the reference."""
    low, high = (torch.from_numpy(dose_of(case, share))[None] for share in (0.2, 0.9))

    class Network(torch.nn.Module):
        def forward(self, image):
            return low[None]

    def metric(key):
        return IgniteMetricHandler(metric_fn=ComplianceScore(NAMES), output_transform=from_engine([key, "image"]))

    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"), network=Network(), val_data_loader=[{"image": image[None], "label": high[None]}],
        key_val_metric={"constraints_met_percent": metric("pred")},
        additional_metrics={"reference_constraints_met_percent": metric("label")})
    evaluator.run()
    found = evaluator.state.metrics
    assert found["constraints_met_percent"] > found["reference_constraints_met_percent"] + 10


def stop_of(values, patience, every=1):
    """The epoch at which a run with these validation results ends, and its plateau."""
    plateau, trainer = CompliancePlateau(patience), Engine(lambda *_: None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    WallClockSchedule(optimizer, early_stop=plateau).attach(trainer)
    validator = Engine(lambda *_: None)
    plateau.attach(validator)
    found = iter(values)

    def validate(engine):
        if engine.state.epoch % every == 0:
            validator.state.metrics = {"constraints_met_percent": next(found)}
            validator.state.epoch = engine.state.epoch
            validator.fire_event(Events.EPOCH_COMPLETED)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    trainer.run([0, 1], max_epochs=len(values) * every)
    return trainer.state.epoch, plateau


def test_training_ends_when_compliance_has_not_improved_for_20_epochs():
    rising = [50.0 + n for n in range(10)]
    epoch, plateau = stop_of(rising + [59.0] * 40, patience=20)
    assert (epoch, plateau.best, plateau.best_epoch) == (31, 59.0, 10)  # seen at the start of the next epoch
    assert stop_of([50.0 + n for n in range(50)], patience=20)[0] == 50
    assert stop_of([60.0, *[55.0] * 20], patience=20, every=5)[0] == 26  # epochs, not validations


def test_the_plateau_is_part_of_the_checkpoint():
    _, plateau = stop_of([50.0, 60.0, 59.0, 58.0], patience=20)
    again = CompliancePlateau(20)
    again.load_state_dict(plateau.state_dict())
    assert again.state_dict() == {"best": 60.0, "best_epoch": 2, "epoch": 4, "phase": 0} and not again.exhausted


class Export:
    """What the plateau needs of an export."""

    patience, exhausted, seen = 3, False, 0

    phase = 0

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: setattr(self, "seen", self.seen + 1))

    def enter_phase(self, phase):
        self.phase = phase

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_the_plateau_carries_the_export_along():
    plateau, validator = CompliancePlateau(20, export=Export()), Engine(lambda *_: None)
    plateau.attach(validator)
    validator.state.metrics, validator.state.epoch = {"constraints_met_percent": 50.0}, 4
    validator.fire_event(Events.EPOCH_COMPLETED)
    assert plateau.export.seen == 1 and plateau.state_dict()["export"] == {"seen": 1} and not plateau.exhausted
    again = CompliancePlateau(20, export=Export())
    again.load_state_dict(plateau.state_dict())
    assert (again.best, again.export.seen) == (50.0, 1)
    again.export.exhausted = True
    assert again.exhausted


def test_the_plateau_begins_anew_with_a_phase():
    """The denoiser's first weights replace the prior's, and its compliance is not held against the prior's."""
    plateau, validator = CompliancePlateau(20, export=Export()), Engine(lambda *_: None)
    plateau.attach(validator)
    for epoch, value, phase in ((10, 60.0, 0), (29, 50.0, 0), (30, 40.0, 1)):
        plateau.enter_phase(phase)
        validator.state.metrics, validator.state.epoch = {"constraints_met_percent": value}, epoch
        validator.fire_event(Events.EPOCH_COMPLETED)
        assert not plateau.exhausted
    assert (plateau.best, plateau.best_epoch, plateau.export.phase) == (40.0, 30, 1)


def test_without_patience_it_never_ends_a_run():
    assert stop_of([60.0] + [50.0] * 40, patience=None)[0] == 41
