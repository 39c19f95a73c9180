"""The overlays of the protocol, as MONAI's runner puts them together."""

from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from custom.engines import EmaExport, PhasedObjective
from custom.inferers import DoseDiffusionInferer
from custom.objectives import RegressionObjective
from custom.protocol.compliance import CompliancePlateau
from custom.protocol.loss import ConstraintLoss
from custom.protocol.objective import ConstraintObjective
from custom.transforms.edited import EditedLimitsd

CONFIGS = Path(__file__).parents[2] / "bundle" / "configs"


def parser_of(*names, **changes):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in names])
    for key, value in changes.items():
        parser[key] = value
    return parser


def test_guidance_is_off_by_default_and_on_by_its_overlay():
    assert parser_of("inference").get_parsed_content("inferer").guidance is None
    guidance = parser_of("inference", "guidance").get_parsed_content("inferer").guidance
    assert guidance.strength == 0.3 and len(guidance.constraints) > 50
    cord = parser_of("inference", "guidance", guidance_strength=1.0, guidance_structures=["SpinalCord"])
    inferer = cord.get_parsed_content("inferer")
    assert {row.structure for row in inferer.guidance.constraints} == {"SpinalCord"}
    assert inferer.flips == parser_of("inference").get_parsed_content("inferer").flips  # the rest stays
    off = parser_of("inference", "guidance", guidance_strength=0.0).get_parsed_content("inferer")
    assert off.guidance is None


def test_the_training_overlay_wraps_the_objective():
    parser = parser_of("inference", "train", "constraint_loss")
    objective = parser.get_parsed_content("minimised")
    assert isinstance(objective, ConstraintObjective) and isinstance(objective.objective, PhasedObjective)
    assert isinstance(objective.loss, ConstraintLoss) and objective.loss.beyond_reference
    assert parser.get_parsed_content("loss_weights") == {"dvh": 1.0, "constraints": 0.5}
    assert parser.get_parsed_content("compliance_metric").names == parser.get_parsed_content("condition_channels")


def test_the_plateau_takes_the_exports_place():
    parser = parser_of("inference", "train", "constraint_loss", output_dir="nowhere")
    keeper, schedule = parser.get_parsed_content("keeper"), parser.get_parsed_content("schedule")
    assert isinstance(keeper, CompliancePlateau) and keeper.patience == 20
    assert isinstance(keeper.export, EmaExport) and schedule.early_stop is keeper
    assert parser["validate"]["handlers"][0]["handler"] == "@keeper"
    alone = parser_of("inference", "train", output_dir="nowhere").get_parsed_content("schedule").early_stop
    assert isinstance(alone, EmaExport)


def test_another_systems_objective_is_wrapped_too():
    parser = parser_of("inference", "train", "systems/unet", "constraint_loss")
    objective = parser.get_parsed_content("minimised")
    assert isinstance(objective, ConstraintObjective) and isinstance(objective.objective, RegressionObjective)


def test_the_ablation_differs_by_the_loss_alone():
    """Laid over as the ablation does it: no early stop, no metric in the validations, which cost training time."""
    variant = parser_of("inference", "train", "ablations").get_parsed_content("variants")["with the constraint loss"]
    (overlay,) = variant.pop("overlays")
    assert Path(overlay) == CONFIGS / "constraint_loss.json"
    parser = parser_of("inference", "train", "ablations", "constraint_loss", output_dir="nowhere", **variant)
    assert isinstance(parser.get_parsed_content("minimised"), ConstraintObjective)
    assert parser.get_parsed_content("val_additional_metrics") is None
    assert isinstance(parser.get_parsed_content("schedule").early_stop, EmaExport)


@pytest.mark.parametrize("key", ["guidance_ways", "limit_ways"])
def test_the_studies_ways_can_be_made(key):
    ways = parser_of("inference", "studies", "protocol_studies").get_parsed_content(key)
    if key == "guidance_ways":
        strengths = [way["inferer"].guidance and way["inferer"].guidance.strength for way in ways.values()]
        assert strengths == [None, 0.1, 0.3, 1.0, 1.0]
        assert all(isinstance(way["inferer"], DoseDiffusionInferer) for way in ways.values())
        return
    edited = ways["cord 45 to 30 Gy"]["condition"].transforms[0]
    assert isinstance(edited, EditedLimitsd)
    cord = next(row for row in edited.plan_options["objectives"] if row.structure == "SpinalCord")
    assert cord.dose_gy == pytest.approx(38.4 * 30 / 45)
    assert ways["cord 45 to 30 Gy"]["condition"] is ways["plan prior alone, cord 45 to 30 Gy"]["condition"]
