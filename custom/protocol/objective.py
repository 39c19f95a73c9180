"""L_cond beside any other objective, on the clean dose that objective predicted anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["ConstraintObjective"]


class ConstraintObjective:
    """Another objective's terms, and ``"constraints"``: the protocol's loss of the clean dose it predicted.

    The clean dose is the prior's, or the one a denoiser's output stands for. No second pass through the network is
    needed: its answers are watched while the other objective runs. Objectives that predict no dose (the autoencoder's)
    get no such term.

    Args:
        objective: ``objective(network, batch) -> {name: scalar tensor}``.
        loss: ``loss(pred, ref, image) -> scalar tensor``, a :class:`custom.protocol.loss.ConstraintLoss`.
    """

    def __init__(self, objective: Callable[..., Mapping[str, Tensor]], loss: Callable[..., Tensor]) -> None:
        self.objective, self.loss = objective, loss

    @property
    def progress(self) -> float:
        """Share of the run that is over, for objectives that change with it."""
        return getattr(self.objective, "progress", 0.0)

    @progress.setter
    def progress(self, value: float) -> None:
        if hasattr(self.objective, "progress"):
            self.objective.progress = value

    def __call__(self, network: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        watched = _Watched(network)
        terms = dict(self.objective(watched, batch))
        if watched.dose is not None:
            terms["constraints"] = self.loss(watched.dose.float(), batch["label"].float(), batch["image"])
        return terms


class _Watched:
    """A network that remembers the last clean dose it predicted."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.dose = network, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, image: Tensor) -> Tensor:
        self.dose = self.network(image)
        return self.dose

    def predict_prior(self, image: Tensor) -> Tensor:
        self.dose = self.network.predict_prior(image)
        return self.dose

    def denoise(self, x_t: Tensor, t: Tensor, conditions: Any) -> Tensor:
        x0 = self.network.denoise(x_t, t, conditions)
        self.dose = self.network.to_dose(x0, conditions)
        return x0

    def denoise_output(self, x_t: Tensor, t: Tensor, conditions: Any) -> Tensor:
        output = self.network.denoise_output(x_t, t, conditions)
        self.dose = self.network.to_dose(self.network.schedule.to_x0(output, x_t, t), conditions)
        return output
