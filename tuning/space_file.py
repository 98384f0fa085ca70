"""Reads space files and checks every entry against the config. `space.yaml` is the default and explains the format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Field, ValidationError

from msrn_ray.config import ExperimentConfig, describe_errors
from msrn_ray.errors import UserError
from msrn_ray.io.files import read_yaml
from msrn_ray.settings import Settings

from .space import Parameter, Space, choice_name, value_of

DEFAULT_SPACE = Path(__file__).with_name("space.yaml")
_MOST_SUBSET_ITEMS = 8  # 255 subsets
# All trials share the images and labels, and the search decides a trial's folder, resources and length
_SAME_FOR_ALL = ("preset", "protocol", "data.", "resources.", "train.epochs", "train.storage", "train.run_name")
_SEARCHABLE_DATA = ("data.image_size", "data.crop_scales", "data.flip")


class Entry(Settings):
    """How a value is drawn, as a space file writes it."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    times: tuple[float, float] | None = None
    choices: tuple[Any, ...] | None = None
    subsets: tuple[Any, ...] | None = None
    when: dict[str, Any] = Field(default_factory=dict)
    points: Annotated[int, Field(ge=2)] = 3


def read_space(path: Path | None) -> dict[str, Any]:
    """Return the entries of a space file, on top of the default ones where it says `extends: default`.

    Args:
        path: the file; None: the default.

    Raises:
        UserError: if the file cannot be read or is not a mapping.
    """
    file = path or DEFAULT_SPACE
    entries = read_yaml(file, f"--space {file}")
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise UserError(
            f"--space {file}: is not a mapping of config paths; write lines such as `model.tau: {{low: 0.1, high: 0.5}}`"
        )
    extends = entries.pop("extends", None)
    if extends not in (None, "default"):
        raise UserError(f"--space {file}: extends: {extends!r} is not known; write `extends: default`, or leave it out")
    merged = (read_space(None) if extends else {}) | entries
    return {name: entry for name, entry in merged.items() if entry is not None}


def build_space(entries: Mapping[str, Any], base: ExperimentConfig, source: str) -> Space:
    """Check every entry against the config and return the space.

    Args:
        entries: what `read_space` returned.
        base: the experiment that trials start from; it decides conditions on paths that are not searched.
        source: name of the file in errors.

    Raises:
        UserError: with file and entry, for an unknown path, a range or value that the config does not allow, or an empty space.
    """
    parameters: dict[str, Parameter] = {}
    for path, raw in entries.items():
        try:
            parameter = _parameter(path, raw, base, parameters)
        except UserError as error:
            reason = str(error).removeprefix("config: ").removeprefix(f"{path}: ")
            raise UserError(f"{source}: {path}: {reason}") from None
        if parameter is not None:
            parameters[path] = parameter
    if not parameters:
        raise UserError(f"{source}: nothing is searched; name at least one config path")
    return Space(tuple(parameters.values()))


def _parameter(path: str, raw: Any, base: ExperimentConfig, earlier: Mapping[str, Parameter]) -> Parameter | None:
    """Return the parameter of an entry; None where its condition is on a path that is not searched and does not hold."""
    if path.startswith(_SAME_FOR_ALL) and path not in _SEARCHABLE_DATA:
        raise UserError(f"is the same for all trials; set it with --{path.replace('_', '-')}")
    value_of(base, path)
    if not isinstance(raw, dict):
        raise UserError(
            f"{raw!r} does not say how to draw it; write {{low: ..., high: ...}}, {{choices: [...]}} or {{times: [...]}}"
        )
    try:
        entry = Entry.model_validate(raw)
    except ValidationError as error:
        raise UserError("; ".join(describe_errors(error))) from None
    kinds = [name for name in ("low", "times", "choices", "subsets") if getattr(entry, name) is not None]
    if len(kinds) != 1 or (entry.low is None) != (entry.high is None):
        raise UserError("needs either low and high, or times, or choices, or subsets")
    conditions = _conditions(entry, base, earlier)
    if conditions is None:
        return None
    fixed = {parent: earlier[parent].values[names[0]] for parent, names in conditions.items()}
    if entry.choices is not None or entry.subsets is not None:
        values = _choices(path, entry, base.with_overrides(fixed))
        return Parameter(path, CategoricalDistribution(tuple(values)), values, conditions, entry.points)
    return Parameter(path, _range(path, entry, base.with_overrides(fixed)), {}, conditions, entry.points)


def _conditions(
    entry: Entry, base: ExperimentConfig, earlier: Mapping[str, Parameter]
) -> dict[str, tuple[Any, ...]] | None:
    """Return `when` as parameter -> choices; None where a path that is not searched has another value in `base`."""
    conditions: dict[str, tuple[Any, ...]] = {}
    for parent, wanted in entry.when.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        checked = [value_of(base.with_overrides({parent: value}), parent) for value in values]
        if parent not in earlier:
            if value_of(base, parent) not in checked:
                return None
            continue
        if not earlier[parent].values:
            raise UserError(f"when: {parent} is a range; only an entry with choices or subsets can be a condition")
        names = tuple(map(choice_name, checked))
        for name in names:
            if name not in earlier[parent].values:
                raise UserError(
                    f"when: {parent} is never {name!r}; name one of {', '.join(map(str, earlier[parent].values))}"
                )
        conditions[parent] = names
    return conditions


def _choices(path: str, entry: Entry, base: ExperimentConfig) -> dict[Any, Any]:
    """Return stored value -> config value of every choice, checked and in the config's form."""
    raw: Sequence[Any] = entry.choices if entry.choices is not None else list(_subsets(entry.subsets or ()))
    if not raw:
        raise UserError(f"{'choices' if entry.choices is not None else 'subsets'} is empty; give at least one value")
    values: dict[Any, Any] = {}
    for choice in raw:
        value = value_of(base.with_overrides({path: choice}), path)
        if choice_name(value) in values:
            raise UserError(f"{choice!r} is named twice")
        values[choice_name(value)] = value
    return values


def _subsets(items: Sequence[Any]) -> Iterator[list[Any]]:
    if len(items) > _MOST_SUBSET_ITEMS:
        raise UserError(f"subsets of {len(items)} values are too many; give {_MOST_SUBSET_ITEMS} values at most")
    for size in range(1, len(items) + 1):
        yield from map(list, combinations(items, size))


def _range(path: str, entry: Entry, base: ExperimentConfig) -> FloatDistribution | IntDistribution:
    number = _number_type(path)
    if number is None:
        raise UserError("is not a number; give choices")
    if entry.times is not None:
        value = value_of(base, path)
        if not isinstance(value, (int, float)) or value <= 0 or min(entry.times) <= 0:
            raise UserError(f"times needs factors and a preset value above 0 (it is {value!r}); give low and high")
        low, high, log = value * entry.times[0], value * entry.times[1], True
    else:
        assert entry.low is not None
        assert entry.high is not None
        low, high, log = entry.low, entry.high, entry.log
    if low > high:
        raise UserError(f"low {low:g} is above high {high:g}; swap them")
    if log and low <= 0:
        raise UserError(f"a log scale has no {low:g}; raise low above 0, or remove log")
    if number is int and (low != round(low) or high != round(high)):
        raise UserError(f"is a whole number; give whole numbers, not {low:g} to {high:g}")
    for end in (low, high):
        base.with_overrides({path: number(end)})
    return IntDistribution(int(low), int(high), log=log) if number is int else FloatDistribution(low, high, log=log)


def _number_type(path: str) -> type[int] | type[float] | None:
    """Return the number type that the config declares at the path, float for a float or a word such as `auto`; None: no number."""
    annotation: Any = ExperimentConfig
    for part in path.split("."):
        annotation = annotation.model_fields[part].annotation
    parts = [get_args(part)[0] if get_origin(part) is Annotated else part for part in get_args(annotation)]
    declared = parts or [annotation]
    return float if float in declared else int if int in declared else None
