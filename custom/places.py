"""Where the bundle's own files lie."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundle_folder"]


def bundle_folder() -> Path:
    """Folder with the bundle's ``configs`` and ``models``.

    That is ``custom/bundle`` where the package was installed from a wheel, the parent of ``custom`` in an assembled
    bundle, and ``bundle`` beside ``custom`` in the repository, which is also the answer where there is none of them.
    """
    package = Path(__file__).absolute().parent
    places = (package / "bundle", package.parent, package.parent / "bundle")
    return next((place for place in places if (place / "configs").is_dir()), places[-1])
