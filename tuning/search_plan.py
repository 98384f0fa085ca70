"""What a search is: the part that stays the same when it is resumed."""

from __future__ import annotations

from typing import Any, Literal

from msrn_ray.config import ExperimentConfig
from msrn_ray.settings import Settings

from .space import Space
from .space_file import build_space

SamplerName = Literal["tpe", "random", "grid"]
Objective = Literal["val/mAP", "val/CF1", "val/OF1", "val/loss", "train/images_per_second", "epoch_seconds"]
MINIMIZED = ("val/loss", "epoch_seconds")


class SearchPlan(Settings):
    """What a search is, apart from its length. The study stores it, so the field names are a format on disk."""

    config: ExperimentConfig
    """The experiment that every trial starts from."""
    entries: dict[str, Any]
    """The search space, as `read_space` returns it."""
    sampler: SamplerName
    """How points are drawn."""
    objectives: tuple[Objective, ...]
    """What is optimised; the first decides the best epoch of a trial, the best trial and early stopping."""
    early_stopping: bool
    """Whether ASHA stops trials that are behind."""
    data: str
    """Fingerprint of the train and val images and labels."""
    source: str
    """The data set in words."""

    @property
    def prunes(self) -> bool:
        """Whether trials stop early; Optuna orders a rung by one number only."""
        return self.early_stopping and len(self.objectives) == 1

    def space(self) -> Space:
        """Return the space that points are drawn from."""
        return build_space(self.entries, self.config, "space")

    def first_points(self) -> list[dict[str, Any]]:
        """Return the points that are set from the start: all of a grid, else the preset's values within the space.

        Raises:
            UserError: if the grid is too large.
        """
        return self.space().grid() if self.sampler == "grid" else [self.space().point_of(self.config)[0]]
