"""The experiment as one frozen, validated tree. A flag and a searched parameter are the same override.

The tree travels as plain data: to JSON and YAML, to the workers, into every checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
import yaml
from pydantic import ValidationError, model_validator

from .data_settings import DataSettings
from .errors import UserError
from .io.files import atomic_write, read_yaml
from .settings import LossSettings, ModelSettings, OptimSettings, ResourceSettings, Settings, TrainSettings


class ExperimentConfig(Settings):
    """A whole experiment."""

    preset: Annotated[str, tyro.conf.Suppress] = "scenes"
    """Name of the preset that this config started from."""
    protocol: Literal["honest", "paper"] = "honest"
    """`honest`: choose the best epoch on val, score test once at the end. `paper`: choose on the published test split, as the papers do."""
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    resources: ResourceSettings = ResourceSettings()

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.optim.schedule == "onecycle" and self.optim.warmup_epochs:
            raise ValueError("optim.warmup_epochs must be 0 with optim.schedule=onecycle, which has its own warm-up")
        if self.optim.accumulation > self.train.batch_size:
            raise ValueError(
                f"optim.accumulation={self.optim.accumulation} is larger than train.batch_size={self.train.batch_size}"
            )
        return self

    def with_overrides(self, overrides: Mapping[str, Any]) -> ExperimentConfig:
        """Return a copy with dotted paths replaced, e.g. `{"optim.lr": 0.01, "model.levels": ["layer4"]}`.

        Raises:
            UserError: for an unknown path or a value out of range, with the field, the value and what is allowed.
        """
        tree = self.to_dict()
        for path, value in overrides.items():
            *parents, leaf = path.split(".")
            node: Any = tree
            while parents and isinstance(node.get(parents[0]), dict):
                node = node[parents.pop(0)]
            if parents or leaf not in node:  # parents: what is left of the path because it was not found
                raise UserError(f"unknown setting {path!r}; allowed here: {', '.join(sorted(node))}")
            if isinstance(node[leaf], dict):
                raise UserError(f"{path!r} is a group; set one of: {', '.join(f'{path}.{key}' for key in node[leaf])}")
            node[leaf] = value
        return config_from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data (dict, list, str, numbers, None): what JSON, YAML and a checkpoint hold."""
        return self.model_dump(mode="json")

    def save(self, path: Path) -> None:
        """Write JSON (`.json`) or YAML (any other suffix)."""
        tree = self.to_dict()
        text = json.dumps(tree, indent=2) if path.suffix == ".json" else yaml.safe_dump(tree, sort_keys=False)
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")


def config_from_dict(tree: Mapping[str, Any], source: str = "config") -> ExperimentConfig:
    """Validate plain data; `source` names it in the error.

    Raises:
        UserError: one line with each wrong field, its value and what is allowed.
    """
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {'; '.join(describe_errors(error))}") from None


def describe_errors(error: ValidationError) -> Iterable[str]:
    """Yield a phrase per wrong field: its dotted path, what is wrong, and the value given."""
    group = [error.title.removesuffix("Settings").lower()] if error.title.endswith("Settings") else []
    for item in error.errors():
        path = ".".join(str(part) for part in [*group, *item["loc"]])
        if item["type"] == "value_error":
            yield item["msg"].removeprefix("Value error, ")  # our own validators name the field themselves
        else:
            yield f"{path}: {item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r})"


def load_config(path: str | Path) -> ExperimentConfig:
    """Read a config saved as JSON or YAML.

    Raises:
        UserError: if the file is missing, is not YAML/JSON, or holds a wrong field.
    """
    tree = read_yaml(Path(path), f"config {path}")
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: a mapping of settings is expected, not {type(tree).__name__}")
    return config_from_dict(tree, source=f"config {path}")
