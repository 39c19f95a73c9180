"""What viewers on MONAI Label need around the dose: their way of naming a study, and labels where they want integers.

The bundle that ``apps/label`` assembles wires these in; the bundle itself runs without them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from custom.case import Case, CaseError, Keys
from custom.transforms.load import LoadImageRTd

__all__ = ["FROM_FILES", "IsodoseLabeld", "LoadViewerStudyd"]

FROM_FILES = "from the files"
VOLUMES = (".nii.gz", ".nii", ".nrrd")
RESULT = "result"  # MONAI Label sends this entry back as JSON


class LoadViewerStudyd(LoadImageRTd):
    """Load the study that a viewer's request means.

    A viewer opens volumes, the prediction needs the DICOM study with its structures: the volume ``NAME.nii.gz`` of a
    MONAI Label datastore stands for the folder ``NAME`` beside it. Folders and DICOM files are loaded as they are.
    Options that a viewer leaves at "from the files", empty or 0 are taken away, so that the files decide.

    Args:
        keys: key of the path.
        **options: of :class:`custom.transforms.load.LoadImageRTd`.

    Raises:
        HTTPException: 422 with the message of the :class:`custom.case.CaseError`, so that the viewer's user reads it.
        CaseError: the same outside a web server.
    """

    def __init__(self, keys: KeysCollection = Keys.IMAGE, **options: Any) -> None:
        super().__init__(keys, **options)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        try:
            return super().__call__(self.request(data))
        except CaseError as error:
            raise _for_the_viewer(error) from error

    def request(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        """The request as the loader takes it."""
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = str(study_of(Path(str(out[key]))))
        for name in self.options:
            value = out.get(name)
            if value in (None, "", 0, FROM_FILES) or isinstance(value, (list, tuple)):  # a list: the choices, none made
                out.pop(name, None)
        if isinstance(out.get("prescription_gy"), str):
            out["prescription_gy"] = _number(out["prescription_gy"])
        return out


def _for_the_viewer(error: CaseError) -> Exception:
    """What MONAI Label's web framework answers with; "Internal Server Error" would be all the user saw."""
    try:
        from starlette.exceptions import HTTPException  # there in MONAI Label's environment only
    except ImportError:
        return error
    return HTTPException(status_code=422, detail=str(error))


def study_of(path: Path) -> Path:
    """The study of a datastore's volume: the folder of the same name beside it; other paths are their own."""
    suffix = next((s for s in VOLUMES if path.name.lower().endswith(s)), None)
    if suffix is None:
        return path
    study = path.with_name(path.name[: -len(suffix)])
    if not study.is_dir():
        raise CaseError(f"{path}: a volume without structures; expected its DICOM study (CT and RTSTRUCT) in the "
                        f"folder {study}. Add studies with apps/label/make_app.py add, or send the study's folder")
    return study


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise CaseError(f"prescription_gy: found {text!r}; expected a number of Gy") from None


class IsodoseLabeld(MapTransform):
    """Isodose bands as integer labels, for viewers that ask for integers and would cut the dose down to whole Gy.

    Where ``data["result_dtype"]`` names an integer type, the dose (Gy) becomes ``k`` between the ``k``-th and the next
    of the levels, 0 below the first; otherwise it stays a dose. Either way ``data["result"]`` tells what the numbers
    mean: MONAI Label sends it back beside the volume.

    Args:
        keys: key of the dose in Gy, ``(1, I, J, K)``.
        levels: rising shares of the highest prescription.
    """

    def __init__(self, keys: KeysCollection = Keys.PRED, levels: Sequence[float] = (0.5, 1.0)) -> None:
        super().__init__(keys)
        if not levels or any(b <= a for a, b in zip(levels, levels[1:])) or levels[0] <= 0:
            raise CaseError(f"isodose levels {list(levels)}; expected rising shares of the prescription, above 0")
        self.levels = tuple(float(level) for level in levels)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        out = dict(data)
        case: Case = out[Keys.CASE]
        levels_gy = [level * case.highest_prescription_gy for level in self.levels]
        integers = str(out.get("result_dtype") or "").startswith(("uint", "int"))
        for key in self.key_iterator(out):
            dose = out[key]
            out[RESULT] = {
                **(out.get(RESULT) or {}), "case": case.name, "content": "isodose bands" if integers else "dose in Gy",
                "levels_gy": [round(gy, 3) for gy in levels_gy], "prescription_gy": dict(case.prescription_gy),
                "max_dose_gy": round(float(dose.max()), 3), "notes": list(case.source.get("notes", ())),
                "warnings": [str(text) for text in out.get("warnings", ())],
            }
            if integers:
                values = (dose.as_tensor() if isinstance(dose, MetaTensor) else dose).contiguous()
                bands = torch.bucketize(values, torch.tensor(levels_gy, dtype=values.dtype), right=True)
                out[key] = MetaTensor(bands.to(torch.float32), affine=dose.affine)
        return out
