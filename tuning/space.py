"""The search space: which config values are drawn, and how.

Every parameter is a dotted path of `ExperimentConfig`, so a point of the space is a set of overrides, and a search result is a config.
Optuna stores no lists (levels, crop scales): it gets their items as text, and `Space.overrides` turns them back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError

LARGEST_GRID = 10_000


@dataclass(frozen=True)
class Parameter:
    """A value that is drawn.

    Attributes:
        path: its dotted config path, and its name in the study.
        distribution: Optuna's description of its values.
        values: what each choice stands for in the config; empty for a number.
        when: parameter -> choices; it is drawn only where every such parameter has one of its choices.
        points: number of values that a grid takes from a range.
    """

    path: str
    distribution: CategoricalDistribution | FloatDistribution | IntDistribution
    values: Mapping[Any, Any]
    when: Mapping[str, tuple[Any, ...]]
    points: int

    def is_drawn(self, params: Mapping[str, Any]) -> bool:
        """Return whether it belongs to a point whose earlier parameters are `params`."""
        return all(parent in params and params[parent] in allowed for parent, allowed in self.when.items())

    def suggest(self, trial: optuna.Trial) -> Any:
        """Draw a value, as the study stores it."""
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                return trial.suggest_categorical(self.path, choices)
            case FloatDistribution(low=low, high=high, log=log):
                return trial.suggest_float(self.path, low, high, log=log)
            case IntDistribution(low=low, high=high, log=log):
                return trial.suggest_int(self.path, low, high, log=log)

    def takes(self, value: Any) -> bool:
        """Return whether a config value can be drawn."""
        if isinstance(self.distribution, CategoricalDistribution):
            return value in self.values.values()
        return isinstance(value, (int, float)) and self.distribution.low <= value <= self.distribution.high

    def grid_values(self) -> list[Any]:
        """Return all choices, or `points` values of the range, evenly spaced on its scale."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        space = np.geomspace if self.distribution.log else np.linspace
        numbers = space(self.distribution.low, self.distribution.high, self.points).tolist()
        # rounding may move the ends of a geometric row out of the range
        numbers = [self.distribution.low, *numbers[1:-1], self.distribution.high]
        return list(dict.fromkeys(map(round, numbers))) if isinstance(self.distribution, IntDistribution) else numbers


@dataclass(frozen=True)
class Space:
    """All parameters of a search, each after those that it depends on."""

    parameters: tuple[Parameter, ...]

    def suggest(self, trial: optuna.Trial, before: Callable[[int], None]) -> dict[str, Any]:
        """Draw a point and return its config overrides.

        Args:
            trial: Optuna's, which stores what is drawn.
            before: is called with the index of a parameter before that parameter is drawn.
        """
        params: dict[str, Any] = {}
        for index, parameter in enumerate(self.parameters):
            if parameter.is_drawn(params):
                before(index)
                params[parameter.path] = parameter.suggest(trial)
        return self.overrides(params)

    def overrides(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config overrides of parameters, which are as the study stores them."""
        choices = {parameter.path: parameter.values for parameter in self.parameters}
        return {path: choices[path][value] if choices[path] else value for path, value in params.items()}

    def point_of(self, config: ExperimentConfig) -> tuple[dict[str, Any], list[str]]:
        """Return the point that is `config` itself, and the paths whose config value is outside the space."""
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
        """Return every point of the grid once, as parameters of the study.

        Raises:
            UserError: if there are more than LARGEST_GRID.
        """
        points: list[dict[str, Any]] = [{}]
        for parameter in self.parameters:
            values = [{parameter.path: value} for value in parameter.grid_values()]
            points = [point | value for point in points for value in (values if parameter.is_drawn(point) else [{}])]
            if len(points) > LARGEST_GRID:
                raise UserError(
                    f"the grid has more than {LARGEST_GRID} points; name fewer values with --space, or use --sampler tpe"
                )
        return points


def value_of(config: ExperimentConfig, path: str) -> Any:
    """Return the plain value at a dotted path.

    Raises:
        UserError: if there is none, with the allowed names.
    """
    value: Any = config.to_dict()
    for part in path.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    if isinstance(value, dict):
        config.with_overrides({path: None})  # raises the error that names the wrong part of the path
    return value


def choice_name(value: Any) -> Any:
    """Return a config value as the study stores it: itself, or the items of a list as text, since Optuna stores no lists."""
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else value
