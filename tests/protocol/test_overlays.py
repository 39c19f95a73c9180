"""The overlays of the protocol, as MONAI's runner puts them together."""

from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from custom.engines import PhasedObjective
from custom.inferers import DoseDiffusionInferer
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
    objective = parser.get_parsed_content("objective")
    assert isinstance(objective, ConstraintObjective) and isinstance(objective.objective, PhasedObjective)
    assert isinstance(objective.loss, ConstraintLoss) and objective.loss.beyond_reference
    assert parser.get_parsed_content("loss_weights")["constraints"] == 0.5
    assert parser.get_parsed_content("compliance_metric").names == parser.get_parsed_content("condition_channels")
    handlers = parser["validate"]["handlers"]
    assert any("validate::export" in str(h) for h in handlers) or "@validate#export" in handlers
    assert parser["validate"]["export"]["patience"] == "@compliance_patience"


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
