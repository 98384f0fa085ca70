"""The command `msrn search`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from tuning.options import SearchOptions

from ..config import ExperimentConfig
from ..presets import PresetName
from .parser import StartsFromConfig

# So that a first search on two cores ends within ten minutes
_SMALL = {"data.image_size": 64, "train.epochs": 5}


@dataclass(frozen=True)
class Search(SearchOptions, StartsFromConfig):
    """Search the hyper-parameters of a preset; the best trial becomes a config for `msrn train --config`."""

    preset: tyro.conf.Positional[PresetName] = "scenes"
    """Experiment that every trial starts from, and the first trial; `scenes` is searched at 64 pixels and 5 epochs."""
    config: Path | None = None
    """Start from this saved YAML or JSON instead of a preset."""
    experiment: Annotated[ExperimentConfig, tyro.conf.arg(name="")] = field(default_factory=ExperimentConfig)
    """The experiment; every option below changes one value of all trials, or of the first trial where that value is searched."""

    @classmethod
    def from_config(cls, config: ExperimentConfig, argv: Sequence[str]) -> Search:
        """See `StartsFromConfig`; a search that is resumed keeps its config, other starts are adapted to trials."""
        given = {word.split("=")[0] for word in argv}
        if "--resume" in given:
            return cls(experiment=config)
        if config.resources.num_workers is None:
            # trials side by side need no gradient exchange
            config = config.with_overrides({"resources.num_workers": 1})
        if config.preset == "scenes" and "--config" not in given:
            config = config.with_overrides(_SMALL)
        return cls(experiment=config)

    def run(self) -> None:
        """Search, then print where the results are."""
        from tuning.driver import search

        search(self)
