"""What pyproject.toml cannot say: a wheel takes the bundle's configs and weights along, as ``custom/bundle``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PARTS = ("configs", "models")


class BuildWithBundle(build_py):
    """Builds the package and copies the bundle into it; an editable install finds the bundle beside the package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for part in PARTS:
                target = Path(self.build_lib) / "custom" / "bundle" / part
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(Path("bundle") / part, target)


setup(cmdclass={"build_py": BuildWithBundle})
