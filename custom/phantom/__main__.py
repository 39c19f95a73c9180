"""Command line: ``python -m custom.phantom OUT`` writes synthetic DICOM studies."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from custom.case import Site, Technique
from custom.phantom import make_case, with_dose, write_study

logger = logging.getLogger("custom.phantom")

DEMO_SEEDS = {Site.HEAD_NECK: 3, Site.LUNG: 1}
DEMO_NAMES = {Site.HEAD_NECK: "hn_demo", Site.LUNG: "lung_demo"}
BEAMLET_MM = 5.0
ITERATIONS = 80


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the studies the command line asks for into ``OUT/<name>/``."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("pydicom").setLevel(logging.ERROR)  # rt-utils uses attributes that pydicom 3 warns about
    sites = list(DEMO_SEEDS) if options.site == "both" else [options.site]
    jobs = [(site, seed) for site in sites for seed in (options.seeds or [DEMO_SEEDS[site]])]
    for done, (site, seed) in enumerate(jobs, 1):
        folder = _write(site, seed, options)
        logger.info("%d of %d: %s", done, len(jobs), folder)


def _write(site: str, seed: int, options: argparse.Namespace) -> Path:
    """Make, plan and write one patient."""
    case = make_case(site, seed, shape=options.shape, technique=options.technique, noise_hu=options.noise_hu)
    name = DEMO_NAMES[site] if seed == DEMO_SEEDS[site] else case.name
    plan = None
    if not options.no_dose:
        from custom.physics.fluence import plan_dose  # the anatomy alone needs no dose engine

        plan = plan_dose(case, beamlet_mm=BEAMLET_MM, iterations=ITERATIONS, normalise=True)
        case = with_dose(case, plan.dose_gy)
    return write_study(case, options.out / name, patient_id=name.upper(), fluence=plan)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m custom.phantom", description=__doc__.split(":", 1)[1].strip())
    parser.add_argument("out", type=Path, help="folder for the studies; one sub-folder a patient")
    parser.add_argument("--site", choices=[*DEMO_SEEDS, "both"], default="both")
    parser.add_argument("--seeds", type=int, nargs="+", help="patients to draw; by default the demo patient")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("I", "J", "K"), help="voxels; by default 4 x 4 x 5 mm")
    parser.add_argument("--technique", choices=[Technique.IMRT, Technique.VMAT], help="by default that of the site")
    parser.add_argument("--noise-hu", type=float, default=12.0, help="standard deviation of the CT noise")
    parser.add_argument("--no-dose", action="store_true", help="leave out dose planning and the RTDOSE")
    return parser


if __name__ == "__main__":
    main()
