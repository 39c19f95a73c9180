"""Command line: ``python -m custom.release {metadata,verify,release}`` makes and checks the Model Zoo's release."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from custom.case import CaseError
from custom.release.assemble import assemble, pack, read_json, synchronise_metadata
from custom.release.trial import make_environment, try_out
from custom.release.verify import FAILED, NOT_RUN, verify

logger = logging.getLogger("custom.release")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; 1 when a check failed."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for name in ("monai", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return options.run(options)
    except CaseError as error:
        logger.error("%s", error)
        return 1


def run_metadata(options: argparse.Namespace) -> int:
    """Bring the channels of ``metadata.json`` up to date with ``inference.json``."""
    synchronise_metadata(options.root / "bundle" / "configs")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Assemble the bundle in a temporary folder, or take the one that is named, and check it."""
    if options.bundle is not None:
        return _checked(options.bundle, options)
    with tempfile.TemporaryDirectory() as folder:
        return _checked(assemble(options.root, folder), options)


def run_release(options: argparse.Namespace) -> int:
    """Assemble, check, zip, and predict from the zip in an environment of its own."""
    bundle = assemble(options.root, options.dist)
    if _checked(bundle, options):
        return 1
    archive = pack(bundle)
    python = make_environment(options.environment, read_json(bundle / "configs" / "metadata.json"), options.python)
    logger.info("predicted from the zip with %s: %s", python, try_out(archive, python))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    logger.info("%s  %.1f MB, SHA-256 %s", archive, archive.stat().st_size / 1e6, digest)
    return 0


def _checked(bundle: Path, options: argparse.Namespace) -> int:
    schema = options.schema if options.schema is not None and options.schema.is_file() else None
    results = verify(bundle, schema, options.online, options.zoo)
    failed = [result.name for result in results if result.status == FAILED]
    left = [result.name for result in results if result.status == NOT_RUN]
    logger.info("%s: %d checks passed, %d failed%s", bundle.name, len(results) - len(failed) - len(left), len(failed),
                f"; not run: {', '.join(left)}" if left else "")
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m custom.release", description=__doc__.split("``", 2)[2].strip())
    parser.add_argument("--root", type=Path, default=Path("."), help="the repository")
    commands = parser.add_subparsers(required=True)
    for name, run in (("metadata", run_metadata), ("verify", run_verify), ("release", run_release)):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        if name == "metadata":
            continue
        command.add_argument("--schema", type=Path, help="copy of the zoo's meta_schema_20240725.json")
        command.add_argument("--online", action="store_true", help="also ask the package index about the pins")
        command.add_argument("--zoo", type=Path, help="checkout of Project-MONAI/model-zoo, to run its own verifier")
        if name == "verify":
            command.add_argument("bundle", type=Path, nargs="?", help="assembled bundle; by default one is assembled")
        else:
            command.add_argument("--dist", type=Path, default=Path("dist"), help="folder for the release")
            command.add_argument("--environment", type=Path, default=Path(".venv-release"), help="for the trial run")
            command.add_argument("--python", default=sys.executable, help="interpreter of that environment")
    return parser


if __name__ == "__main__":
    sys.exit(main())
