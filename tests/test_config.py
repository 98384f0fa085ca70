"""The config tree: overrides, validation, files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from msrn_ray import config as config_module
from msrn_ray.config import ExperimentConfig, config_from_dict, load_config
from msrn_ray.data_settings import DataSettings
from msrn_ray.errors import UserError
from msrn_ray.settings import LossSettings, ModelSettings, OptimSettings, ResourceSettings, Settings, TrainSettings

GROUPS = {
    "data": DataSettings,
    "model": ModelSettings,
    "loss": LossSettings,
    "optim": OptimSettings,
    "train": TrainSettings,
    "resources": ResourceSettings,
}


def unusual() -> ExperimentConfig:
    """Return a config in which every group differs from its defaults, with None, tuples, long floats and odd text."""
    return ExperimentConfig().with_overrides(
        {
            "preset": "voc2007",
            "protocol": "paper",
            "data.root": "/data/ümlaut: 'quoted' # not a comment",
            "data.crop_scales": [],
            "data.max_bad_fraction": 0.1 + 0.2,
            "model.pretrained": None,
            "model.levels": ["layer3", "layer4"],
            "loss.group_weight": 1e-12,
            "optim.step_epochs": [3, 9],
            "optim.clip_norm": None,
            "train.run_name": "1e3",
            "resources.num_workers": 3,
            "resources.use_gpu": False,
        }
    )


def test_overrides_reach_nested_values_and_leave_the_rest() -> None:
    before = ExperimentConfig()
    after = before.with_overrides({"optim.lr": 0.01, "model.levels": ["layer4"], "protocol": "paper"})
    assert after.optim.lr == 0.01
    assert after.model.levels == ("layer4",)
    assert after.protocol == "paper"
    assert before == ExperimentConfig()
    assert after.with_overrides({"optim.lr": 0.1, "model.levels": before.model.levels, "protocol": "honest"}) == before
    assert before.with_overrides({}) == before


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("nonsense", ("data", "optim", "protocol")),
        ("nonsense.lr", ("data", "optim", "protocol")),
        ("optim.nonsense", ("optim", "lr", "weight_decay")),
        ("optim.nonsense.lr", ("lr", "weight_decay")),
        ("", ("data", "optim", "protocol")),
        ("optim.", ("lr", "weight_decay")),
    ],
)
def test_unknown_path_names_what_is_allowed(path: str, allowed: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        ExperimentConfig().with_overrides({path: 1})
    assert repr(path) in str(caught.value)
    assert all(name in str(caught.value) for name in allowed)


@pytest.mark.parametrize("path", ["optim.lr.x", "data.root.x", "model.levels.0"])
def test_path_below_a_value_is_unknown(path: str) -> None:
    with pytest.raises(UserError, match=f"unknown setting '{path}'"):
        ExperimentConfig().with_overrides({path: 1})


def test_group_cannot_be_set_at_once() -> None:
    with pytest.raises(UserError, match=r"'optim' is a group; set one of: optim\.name, optim\.lr"):
        ExperimentConfig().with_overrides({"optim": {"lr": 0.1}})


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("optim.lr", -1, ("optim.lr", "-1", "greater than 0")),
        ("optim.lr", math.nan, ("optim.lr", "nan")),
        ("optim.lr", math.inf, ("optim.lr", "inf")),
        ("optim.momentum", 1.0, ("optim.momentum", "1.0", "less than 1")),
        ("data.image_size", 63, ("data.image_size", "63", "64")),
        ("data.image_size", 224.5, ("data.image_size", "224.5", "integer")),
        ("data.dataset", "cifar", ("data.dataset", "'cifar'", "'coco'", "'apparel'")),
        ("data.val_fraction", 0, ("data.val_fraction", "0", "greater than 0")),
        ("data.crop_scales", [1.0, 1.5], ("data.crop_scales.1", "1.5", "less than or equal to 1")),
        ("model.levels", ["layer5"], ("model.levels.0", "'layer5'", "'layer4'")),
        ("model.tau", 0, ("model.tau", "0", "greater than 0", "auto")),
        ("model.tau", 1.01, ("model.tau", "1.01", "at most 1")),
        ("model.tau", math.nan, ("model.tau", "nan")),
        ("model.tau", "automatic", ("model.tau", "'automatic'", "or auto")),
        ("model.tau", None, ("model.tau", "None", "or auto")),
        ("model.tau_degree", 0, ("model.tau_degree", "0", "greater than 0")),
        ("model.frozen_stages", 6, ("model.frozen_stages", "6", "less than or equal to 5")),
        ("train.epochs", 0, ("train.epochs", "0", "greater than or equal to 1")),
        ("train.seed", -1, ("train.seed", "-1", "greater than or equal to 0")),
        ("train.max_failures", -1, ("train.max_failures", "-1", "greater than or equal to 0")),
        *[
            ("train.checkpoint_every", value, ("train.checkpoint_every", repr(value), '"200 steps"', '"10 minutes"'))
            for value in (
                "0 steps",
                "1.5 steps",
                "0.0 minutes",
                "minutes",
                "5 hours",
                "-5 steps",
                "5 steps ",
                "",
                7,
                True,
            )
        ],
        *[
            ("resources.num_workers", value, ("resources.num_workers", repr(value), "1 or more", "2..8"))
            for value in (0, -1, 2.5, "8..2", "2..2", "0..4", "2-8", "..8", "many", True)
        ],
        ("loss.group_weight", "much", ("loss.group_weight", "'much'", "number")),
        ("protocol", "test", ("protocol", "'test'", "'honest'", "'paper'")),
    ],
)
def test_bad_value_names_field_value_and_bound(path: str, value: object, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        ExperimentConfig().with_overrides({path: value})
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("every", "steps", "seconds"),
    [
        ("1 step", 1, None),
        ("200 steps", 200, None),
        ("10 minutes", None, 600),
        ("0.5minutes", None, 30),
        ("1 minute", None, 60),
        (None, None, None),
    ],
)
def test_checkpoint_interval_in_steps_or_seconds(every: str | None, steps: int | None, seconds: float | None) -> None:
    train = ExperimentConfig().with_overrides({"train.checkpoint_every": every}).train
    assert (train.checkpoint_every, train.checkpoint_steps, train.checkpoint_seconds) == (every, steps, seconds)


@pytest.mark.parametrize(
    ("value", "expected", "fewest_and_most"),
    [(3, 3, (3, 3)), ("3", 3, (3, 3)), ("2..8", "2..8", (2, 8)), (None, None, None)],
)
def test_number_or_range_of_workers(value: object, expected: object, fewest_and_most: tuple[int, int] | None) -> None:
    resources = ExperimentConfig().with_overrides({"resources.num_workers": value}).resources
    assert (resources.num_workers, resources.worker_range) == (expected, fewest_and_most)


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(UserError, match=r"optim\.lr: .*; .*train\.epochs: "):
        ExperimentConfig().with_overrides({"optim.lr": 0, "train.epochs": 0})


def test_config_is_frozen() -> None:
    config = ExperimentConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.protocol = "paper"  # type: ignore[misc]  # mypy refuses this, and so must the run time
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]  # as above


def test_unknown_field_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.learning_rate: .*not permitted"):
        config_from_dict({"optim": {"learning_rate": 0.1}})
    with pytest.raises(ValidationError, match="nonsense"):
        TrainSettings(nonsense=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "model.levels is empty"),
        (["layer3", "layer3"], "model.levels names a stage twice: layer3 layer3"),
        (["layer4", "layer2"], "must go from fine to coarse: layer2 layer4"),
    ],
)
def test_bad_levels_are_refused(levels: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExperimentConfig().with_overrides({"model.levels": levels})


def test_onecycle_takes_no_warm_up() -> None:
    onecycle = ExperimentConfig().with_overrides({"optim.schedule": "onecycle"})
    with pytest.raises(UserError, match=r"optim\.warmup_epochs must be 0 with optim\.schedule=onecycle"):
        onecycle.with_overrides({"optim.warmup_epochs": 0.5})
    for schedule in ("step", "cosine", "constant"):
        changed = onecycle.with_overrides({"optim.schedule": schedule, "optim.warmup_epochs": 0.5})
        assert changed.optim.warmup_epochs == 0.5


def test_at_most_one_micro_batch_per_image() -> None:
    ExperimentConfig().with_overrides({"train.batch_size": 4, "optim.accumulation": 4})
    with pytest.raises(UserError, match=r"optim\.accumulation=5 is larger than train\.batch_size=4"):
        ExperimentConfig().with_overrides({"train.batch_size": 4, "optim.accumulation": 5})


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "config"])
def test_saved_config_loads_unchanged(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    unusual().save(path)
    assert load_config(path) == unusual()
    assert load_config(path).to_dict() == unusual().to_dict()
    assert all(getattr(unusual(), group) != kind() for group, kind in GROUPS.items()), (
        "only values that differ from defaults test the trip"
    )
    if name.endswith(".json"):
        assert json.loads(path.read_text(encoding="utf-8")) == unusual().to_dict()


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "config.yaml"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        unusual().save(path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {path.name: "old"}


def test_dict_is_plain_data() -> None:
    def check(node: Any) -> None:
        if isinstance(node, dict):
            node = [*node, *node.values()]
        if isinstance(node, list):
            for inner in node:
                check(inner)
        else:
            assert node is None or type(node) in {str, int, float, bool}

    check(unusual().to_dict())
    assert config_from_dict(unusual().to_dict()) == unusual()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"optim: {lr: 0.1", "not YAML or JSON"),
        (b"\xff\xfe\x00\x80binary", "not YAML or JSON"),
        (b"\x00\x01\x02", "not YAML or JSON"),
        (b"- optim\n- train\n", "a mapping of settings is expected, not list"),
        (b"", "a mapping of settings is expected, not NoneType"),
        (b"optim: {learning_rate: 0.1}\n", "optim.learning_rate"),
        (b"optim: {lr: -1}\n", "optim.lr: input should be greater than 0 (got -1)"),
        (b"optim: 3\n", "optim: "),
        (b"!!python/object/apply:os.mkdir [ran]\n", "not YAML or JSON"),
    ],
)
def test_file_that_is_no_config_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "some config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists(), "a config file must not run code"


def test_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


def test_every_setting_is_described() -> None:
    kinds = [kind for kind in vars(config_module).values() if isinstance(kind, type) and issubclass(kind, Settings)]
    assert set(GROUPS.values()) < set(kinds)
    silent = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name, field in kind.model_fields.items()
        if not field.description and name not in GROUPS  # a group is described by its class
    ]
    assert silent == []
    assert all(kind.__doc__ for kind in kinds)
