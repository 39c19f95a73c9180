"""The network's conditions under another protocol: the plan prior follows limits that were edited in memory."""

from __future__ import annotations

from collections.abc import Mapping

from custom.physics.fluence import load_objectives
from custom.physics.limits import edited, protocol_path, read_protocol
from custom.transforms.condition import ConditionChannelsd

__all__ = ["EditedLimitsd"]


class EditedLimitsd(ConditionChannelsd):
    """:class:`ConditionChannelsd` whose plan prior obeys other limits than the file's.

    Args:
        limits: new limit by structure and metric, as ``{"SpinalCord Max[Gy]": 30}``.
        constraints: the protocol to edit; None for the bundle's ``constraints.json``.
        **options: of :class:`ConditionChannelsd`.

    Raises:
        CaseError: a limit that no row of the protocol sets.
    """

    def __init__(self, limits: Mapping[str, float | str], constraints: str | None = None, **options) -> None:
        super().__init__(**options)
        protocol = edited(read_protocol(constraints or protocol_path()), limits)
        objectives = load_objectives(options.get("plan_objectives"), protocol)
        self.plan_options = {**self.plan_options, "objectives": objectives}
