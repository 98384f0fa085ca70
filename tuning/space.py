"""The search space: which config values are drawn, and how.

Every parameter is a dotted path of `ExperimentConfig`, so a point of the space is a set of overrides, and a search result is a config.
Optuna holds a value that is a list (levels, crop scales) as its items in one text; `Space.overrides` turns it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError

LARGEST_GRID = 10_000


@dataclass(frozen=True)
class Parameter:
    """One value that is drawn.

    Attributes:
        path: its dotted config path, which is also its name in the study.
        distribution: Optuna's description of its values.
        values: what each choice stands for in the config; empty for a number.
        when: it is drawn only where each of these parameters has one of these choices.
        points: values of a range that a grid takes.
    """

    path: str
    distribution: BaseDistribution
    values: Mapping[Any, Any]
    when: Mapping[str, tuple[Any, ...]]
    points: int

    def is_drawn(self, params: Mapping[str, Any]) -> bool:
        """Whether it belongs to a point with these parameters before it."""
        return all(parent in params and params[parent] in allowed for parent, allowed in self.when.items())

    def suggest(self, trial: optuna.Trial) -> Any:
        """Draws it."""
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                return trial.suggest_categorical(self.path, choices)
            case FloatDistribution(low=low, high=high, log=log):
                return trial.suggest_float(self.path, low, high, log=log)
            case IntDistribution(low=low, high=high, log=log):
                return trial.suggest_int(self.path, low, high, log=log)
        raise AssertionError(self.distribution)

    def takes(self, value: Any) -> bool:
        """Whether a config value is one that can be drawn."""
        if isinstance(self.distribution, CategoricalDistribution):
            return value in self.values.values()
        assert isinstance(self.distribution, (FloatDistribution, IntDistribution))
        return isinstance(value, (int, float)) and self.distribution.low <= value <= self.distribution.high

    def grid_values(self) -> list[Any]:
        """All choices, or `points` values of the range, evenly spaced on its scale."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        assert isinstance(self.distribution, (FloatDistribution, IntDistribution))
        space = np.geomspace if self.distribution.log else np.linspace
        numbers = space(self.distribution.low, self.distribution.high, self.points).tolist()
        # the ends of a geometric row may miss the range by a rounding
        numbers = [self.distribution.low, *numbers[1:-1], self.distribution.high]
        return list(dict.fromkeys(map(round, numbers))) if isinstance(self.distribution, IntDistribution) else numbers


@dataclass(frozen=True)
class Space:
    """All parameters of a search, each after those that it depends on."""

    parameters: tuple[Parameter, ...]

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Draws a point; -> config overrides."""
        params: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.is_drawn(params):
                params[parameter.path] = parameter.suggest(trial)
        return self.overrides(params)

    def overrides(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The config overrides of a trial's parameters, as the study holds them."""
        known = {parameter.path: parameter.values for parameter in self.parameters}
        return {path: known[path][value] if known[path] else value for path, value in params.items()}

    def point_of(self, config: ExperimentConfig) -> tuple[dict[str, Any], list[str]]:
        """The point that is `config` itself, and the paths whose value there the space does not have."""
        params: dict[str, Any] = {}
        outside = []
        for parameter in self.parameters:
            if parameter.is_drawn(params):
                value = value_of(config, parameter.path)
                if parameter.takes(value):
                    params[parameter.path] = choice_name(value)
                else:
                    outside.append(parameter.path)
        return params, outside

    def grid(self) -> list[dict[str, Any]]:
        """Every point of the grid once, as parameters of the study.

        Raises:
            UserError: if there are more than LARGEST_GRID.
        """
        points: list[dict[str, Any]] = [{}]
        for parameter in self.parameters:
            longer: list[dict[str, Any]] = []
            for point in points:
                drawn = parameter.is_drawn(point)
                longer += [point | {parameter.path: value} for value in parameter.grid_values()] if drawn else [point]
            if len(longer) > LARGEST_GRID:
                raise UserError(
                    f"the grid has more than {LARGEST_GRID} points; name fewer values with --space, or use --sampler tpe"
                )
            points = longer
        return points


def value_of(config: ExperimentConfig, path: str) -> Any:
    """The plain value at a dotted path.

    Raises:
        UserError: if there is none, with the names that are allowed there.
    """
    value: Any = config.to_dict()
    for part in path.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    if isinstance(value, dict):
        config.with_overrides({path: None})  # says what is wrong with the path
    return value


def choice_name(value: Any) -> Any:
    """What the study calls a config value: itself, or the items of a list in one text, since Optuna stores no lists."""
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else value
