"""What a search is: the part that stays the same when it goes on."""

from __future__ import annotations

from typing import Any, Literal

from msrn_ray.config import ExperimentConfig, Settings

from .space import Space
from .space_file import build_space

SamplerName = Literal["tpe", "random", "grid"]
Objective = Literal["val/mAP", "val/CF1", "val/OF1", "val/loss", "train/images_per_second", "epoch_seconds"]
MINIMIZED = ("val/loss", "epoch_seconds")


class Plan(Settings):
    """What a search is, apart from its length."""

    config: ExperimentConfig
    """The experiment that every trial starts from."""
    entries: dict[str, Any]
    """The search space, as `read_space` gives it."""
    sampler: SamplerName
    """How points are drawn."""
    objectives: tuple[Objective, ...]
    """What is optimised; the first decides about the best epoch of a trial, the best trial and early stopping."""
    early_stopping: bool
    """Whether ASHA ends trials that are behind."""
    data: str
    """Fingerprint of the train and val images and labels."""
    source: str
    """The data set in words."""

    @property
    def prunes(self) -> bool:
        """Whether trials are stopped early; Optuna orders a rung by one number only."""
        return self.early_stopping and len(self.objectives) == 1

    def space(self) -> Space:
        """Where points are drawn from."""
        return build_space(self.entries, self.config, "space")

    def first_points(self) -> list[dict[str, Any]]:
        """The points that are set from the start: all of a grid, else what the preset has of the space.

        Raises:
            UserError: if the grid is too large.
        """
        return self.space().grid() if self.sampler == "grid" else [self.space().point_of(self.config)[0]]
