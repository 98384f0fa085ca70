"""What to search: the options, as the command line and Python give them, and the plan, which a resumed search keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError
from msrn_ray.settings import Settings

from .space import Space
from .space_file import build_space

SamplerName = Literal["tpe", "random", "grid"]
Objective = Literal["val/mAP", "val/CF1", "val/OF1", "val/loss", "train/images_per_second", "epoch_seconds"]
MINIMIZED = ("val/loss", "epoch_seconds")


@dataclass(frozen=True)
class SearchOptions:
    """What to search and for how long; the field docstrings are the help text of `msrn search`."""

    resume: Path | None = None
    """Resume this search folder: first the unfinished trials, from their checkpoints, then the trials not drawn yet."""
    retry_failed: bool = False
    """With --resume: run the points of the failed trials again, as additional trials."""
    space: Path | None = None
    """YAML file of the search space (see tuning/space.yaml). None: that file."""
    trials: int | None = None
    """Trials in all, those of a resumed search included. None: 10, or every point of the grid; resumed: as many as before."""
    time_budget: float | None = None
    """Minutes after which all trials stop; `--resume` resumes them. None: no limit."""
    max_concurrent: int | None = None
    """Trials at a time. None: as many as the cluster's CPUs and GPUs allow, with one CPU per trial left for decoding."""
    sampler: SamplerName = "tpe"
    """How points are drawn: `tpe` learns from the earlier trials, `random`, or `grid`: every point of a grid once."""
    objectives: tuple[Objective, ...] = ("val/mAP",)
    """What is optimised. With several objectives no trial stops early, and `best_config.yaml` is the best by the first."""
    early_stopping: bool = True
    """ASHA: of the trials that reach a ninth of their epochs, and again of those that reach a third, only the best third continues."""
    study_storage: str | None = None
    """Database of the study (postgresql://..., mysql://...). None: study.db in the search folder, which is SQLite."""
    mlflow: str | None = None
    """Also log to this MLflow server or folder (http://..., sqlite:///...); needs the extra `mlflow`."""
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    """The experiment; every option below changes one value of all trials, or of the first trial where that value is searched."""


def check_options(options: SearchOptions) -> None:
    """Refuse values that make no sense, with the option's name.

    Raises:
        UserError: for the first such value.
    """
    for option, number in (("--trials", options.trials), ("--max-concurrent", options.max_concurrent)):
        if number is not None and number < 1:
            raise UserError(f"{option} {number}: must be at least 1")
    if options.time_budget is not None and not options.time_budget > 0:
        raise UserError(f"--time-budget {options.time_budget:g}: must be more than 0 minutes")
    if options.experiment.protocol == "paper":
        raise UserError("--protocol paper: would choose the settings on the published test split; search with honest")
    workers = options.experiment.resources.num_workers
    if isinstance(workers, str) and ".." in workers:
        raise UserError(
            f"--resources.num-workers {workers}: one trial could take the workers of the next, which would wait forever; give a number"
        )
    if options.retry_failed and options.resume is None:
        raise UserError("--retry-failed: needs --resume; a new search has no failed trials")
    if not options.objectives or len(set(options.objectives)) < len(options.objectives):
        raise UserError("--objectives: name at least one, each once")


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
