"""The command line of the search; no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from msrn_ray.config import ExperimentConfig
from msrn_ray.presets import PresetName

from .search_plan import Objective, SamplerName

# So that a first search on two cores ends within ten minutes
_SMALL = {"data.image_size": 64, "train.epochs": 5}


@dataclass(frozen=True)
class Search:
    """Search the hyper-parameters of a preset; the best trial becomes a config for `msrn train --config`."""

    preset: tyro.conf.Positional[PresetName] = "scenes"
    """Experiment that every trial starts from, and the first trial; `scenes` is searched at 64 pixels and 5 epochs."""
    config: Path | None = None
    """Start from this saved YAML or JSON instead of a preset."""
    resume: Path | None = None
    """Go on with this search folder: unfinished trials from their checkpoints, then those not drawn yet."""
    retry_failed: bool = False
    """With --resume: the points of the trials that failed are tried again, as trials more."""
    space: Path | None = None
    """YAML file of what is searched (see tuning/space.yaml). None: that file."""
    trials: int | None = None
    """Trials in all, those of a resumed search included. None: 10, or every point of the grid; resumed: as many as before."""
    time_budget: float | None = None
    """Minutes after which all trials are stopped; `--resume` goes on with them. None: no limit."""
    max_concurrent: int | None = None
    """Trials at a time. None: as many as the cluster has CPUs and GPUs for, a CPU of each left for decoding."""
    sampler: SamplerName = "tpe"
    """How points are drawn: `tpe` learns from the trials before, `random`, or `grid`: every point of a grid once."""
    objectives: tuple[Objective, ...] = ("val/mAP",)
    """What is optimised. With several, no trial is stopped early; `best_config.yaml` is the best by the first."""
    early_stopping: bool = True
    """ASHA: of the trials that reach a ninth of their epochs, and again of those that reach a third, only the better third goes on."""
    study_storage: str | None = None
    """Database of the study (postgresql://..., mysql://...). None: study.db in the search folder, which is SQLite."""
    mlflow: str | None = None
    """Also log to this MLflow server or folder (http://..., sqlite:///...); needs the extra `mlflow`."""
    experiment: Annotated[ExperimentConfig, tyro.conf.arg(name="")] = field(default_factory=ExperimentConfig)
    """The experiment; every option below changes one value of all trials, or of the first where that is searched."""

    def run(self) -> None:
        """Searches, then says where the results are."""
        from .driver import search

        search(self)


def default_search(config: ExperimentConfig, argv: list[str]) -> Search:
    """The options' defaults for the command line `argv`, which starts from `config`: that of a preset, a file or a search folder."""
    given = {word.split("=")[0] for word in argv}
    if "--resume" in given:
        return Search(experiment=config)
    if config.resources.num_workers is None:
        config = config.with_overrides({"resources.num_workers": 1})  # trials side by side need no gradient exchange
    if config.preset == "scenes" and "--config" not in given:
        config = config.with_overrides(_SMALL)
    return Search(experiment=config)
