"""The search space: the format of its file, what is refused and how, what is drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from msrn_ray.errors import UserError
from msrn_ray.presets import PRESETS
from msrn_ray.settings import LEVELS
from tuning.space import Space
from tuning.space_file import DEFAULT_SPACE, build_space, read_space

BASE = PRESETS["scenes"].config


def space_of(**entries: Any) -> Space:
    """Return the space of entries whose paths are written with `__` for the dot."""
    return build_space({path.replace("__", "."): entry for path, entry in entries.items()}, BASE, "my.yaml")


def draw(space: Space, number: int = 40) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Draw points: parameters as the study stores them, and config overrides."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for _ in range(number):
        trial = study.ask()
        overrides = space.suggest(trial, lambda index: None)
        drawn.append((dict(trial.params), overrides))
    return drawn


@pytest.mark.parametrize("name", PRESETS)
def test_default_space_contains_every_preset(name: str) -> None:
    config = PRESETS[name].config
    space = build_space(read_space(None), config, "space.yaml")
    point, outside = space.point_of(config)
    assert outside == []
    assert config.with_overrides(space.overrides(point)) == config
    assert point["model.tau"] == 0.4


def test_drawn_values_make_valid_configs() -> None:
    space = build_space(read_space(None), BASE, "space.yaml")
    levels, losses = set(), set()
    for params, overrides in draw(space, 60):
        config = BASE.with_overrides(overrides)
        assert " ".join(config.model.levels) == params["model.levels"]
        assert 0.05 <= config.model.tau <= 0.9
        assert BASE.optim.lr / 10 <= config.optim.lr <= BASE.optim.lr * 10
        assert (config.loss.name == "asl") == ("loss.clip" in params) == ("loss.gamma_negative" in params)
        levels.add(config.model.levels)
        losses.add(config.loss.name)
    assert losses == {"asl", "soft_margin"}
    assert len(levels) > 8


def test_subsets_are_complete_distinct_and_not_empty() -> None:
    (parameter,) = space_of(model__levels={"subsets": list(LEVELS)}).parameters
    assert len(parameter.values) == 15
    assert {frozenset(value) for value in parameter.values.values()} == {
        frozenset(name.split()) for name in parameter.values
    }
    assert all(parameter.values.values())


def test_integers_are_drawn_for_integer_settings() -> None:
    space = space_of(model__embed_dim={"low": 16, "high": 64}, loss__gamma_negative={"low": 0, "high": 6})
    drawn = [overrides for _, overrides in draw(space)]
    assert {type(overrides["model.embed_dim"]) for overrides in drawn} == {int}
    assert any(not overrides["loss.gamma_negative"].is_integer() for overrides in drawn)


def test_logarithmic_range_draws_decades_evenly() -> None:
    space = space_of(optim__lr={"low": "1e-5", "high": "1e-1", "log": True})  # YAML reads 1e-5 as text
    values = [overrides["optim.lr"] for _, overrides in draw(space, 400)]
    assert 0.4 < sum(value < 1e-3 for value in values) / 400 < 0.6


def test_list_choices_come_back_as_lists() -> None:
    space = space_of(data__crop_scales={"choices": [[], [1.0, 0.8]]}, optim__clip_norm={"choices": [None, 5]})
    assert space.parameters[0].values == {"none": [], "1.0 0.8": [1.0, 0.8]}
    seen = {(str(overrides["data.crop_scales"]), overrides["optim.clip_norm"]) for _, overrides in draw(space)}
    assert seen == {("[]", None), ("[]", 5.0), ("[1.0, 0.8]", None), ("[1.0, 0.8]", 5.0)}


def test_experiment_decides_conditions_on_fixed_values() -> None:
    clip = {"low": 0, "high": 0.2, "when": {"loss.name": "asl"}}
    tau = {"low": 0.1, "high": 0.2}
    assert [parameter.path for parameter in space_of(model__tau=tau, loss__clip=clip).parameters] == ["model.tau"]
    asl = BASE.with_overrides({"loss.name": "asl"})
    (parameter,) = build_space({"loss.clip": clip}, asl, "my.yaml").parameters
    assert parameter.when == {}


def test_conditional_value_is_checked_under_its_condition() -> None:
    """The config refuses a warm-up with onecycle, the preset's schedule."""
    space = space_of(
        optim__schedule={"choices": ["onecycle", "cosine"]},
        optim__warmup_epochs={"choices": [0, 2], "when": {"optim.schedule": "cosine"}},
    )
    for params, overrides in draw(space):
        BASE.with_overrides(overrides)
        assert ("optim.warmup_epochs" in params) == (params["optim.schedule"] == "cosine")


def test_grid_has_every_valid_point_once() -> None:
    space = space_of(
        loss__name={"choices": ["soft_margin", "asl"]},
        loss__clip={"low": 0, "high": 0.2, "points": 2, "when": {"loss.name": ["asl"]}},
        optim__lr={"times": [0.1, 10]},
        model__embed_dim={"low": 1, "high": 2, "points": 5},
    )
    grid = space.grid()
    assert len(grid) == (1 + 2) * 3 * 2
    assert len({tuple(sorted(point.items())) for point in grid}) == len(grid)
    assert all(("loss.clip" in point) == (point["loss.name"] == "asl") for point in grid)
    assert sorted({point["optim.lr"] for point in grid}) == pytest.approx([5e-5, 5e-4, 5e-3])
    study = optuna.create_study()
    for point in grid:  # the study takes them as they are
        study.enqueue_trial(point)
    for point in grid:
        trial = study.ask()
        space.suggest(trial, lambda index: None)
        assert trial.params == point


def test_too_large_grid_is_refused() -> None:
    with pytest.raises(UserError, match=r"more than 10000 points.*--space.*--sampler tpe"):
        build_space(read_space(None), BASE, "space.yaml").grid()


def test_preset_values_outside_the_space_are_drawn() -> None:
    space = space_of(model__tau={"low": 0.5, "high": 0.9}, model__head={"choices": ["elementwise", "mlp"]})
    assert space.point_of(BASE) == ({"model.head": "elementwise"}, ["model.tau"])


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_space_file_replaces_or_extends_the_default(tmp_path: Path) -> None:
    default = yaml.safe_load(DEFAULT_SPACE.read_text())
    alone = read_space(write(tmp_path, "model.tau: {low: 0.1, high: 0.2}\n"))
    assert alone == {"model.tau": {"low": 0.1, "high": 0.2}}
    extended = read_space(
        write(
            tmp_path,
            "extends: default\nmodel.tau: {low: 0.1, high: 0.2}\nloss.name: null\nmodel.mlp_hidden_dim: {choices: [8]}\n",
        )
    )
    assert set(extended) == set(default) - {"loss.name"} | {"model.mlp_hidden_dim"}
    assert extended["model.tau"] == {"low": 0.1, "high": 0.2}
    assert extended["optim.lr"] == default["optim.lr"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("model.nonsense: {low: 1, high: 2}", ("model.nonsense: unknown setting", "tau")),
        ("nonsense: {low: 1, high: 2}", ("unknown setting 'nonsense'", "optim")),
        ("optim: {low: 1, high: 2}", ("optim: 'optim' is a group", "optim.lr")),
        ("model.tau: {low: 0.9, high: 0.1}", ("model.tau: low 0.9 is above high 0.1", "swap")),
        ("model.tau: {low: 0, high: 0.5}", ("model.tau: must be greater than 0 and at most 1", "got 0.0")),
        ("model.tau: {low: 0.5, high: 1.5}", ("model.tau: must be greater than 0 and at most 1", "got 1.5")),
        ("model.levels: {subsets: []}", ("model.levels: subsets is empty", "at least one")),
        ("model.levels: {choices: [[]]}", ("model.levels is empty", "layer1")),
        ("model.levels: {choices: [[layer5]]}", ("model.levels", "layer5")),
        ("model.levels: {choices: []}", ("model.levels: choices is empty",)),
        ("model.levels: {low: 1, high: 2}", ("model.levels: is not a number", "choices")),
        ("model.head: {choices: [mlp, mlp]}", ("model.head: 'mlp' is named twice",)),
        ("model.head: {choices: [wide]}", ("model.head", "'wide'", "'elementwise'")),
        ("model.embed_dim: {low: 1.5, high: 3}", ("model.embed_dim: is a whole number",)),
        ("optim.lr: {low: 0, high: 1, log: true}", ("optim.lr: a log scale has no 0",)),
        ("optim.lr: {low: 1}", ("optim.lr: needs either low and high",)),
        ("optim.lr: {low: 1, high: 2, choices: [1]}", ("optim.lr: needs either low and high",)),
        ("optim.lr: {low: 1, high: 2, lgo: true}", ("optim.lr", "lgo")),
        ("optim.lr: {low: one, high: 2}", ("optim.lr", "low", "'one'")),
        ("optim.lr: 0.1", ("optim.lr: 0.1 does not say how to draw it", "low")),
        ("optim.ema_decay: {times: [0.1, 10]}", ("optim.ema_decay: times needs", "0.0")),
        ("data.root: {choices: [a, b]}", ("data.root: is the same for all trials", "--data.root")),
        ("train.epochs: {choices: [1, 2]}", ("train.epochs: is the same for all trials", "--train.epochs")),
        ("loss.clip: {low: 0, high: 0.1, when: {model.nothing: 1}}", ("loss.clip: unknown setting 'model.nothing'",)),
        ("loss.clip: {low: 0, high: 0.1, when: {loss.name: lsa}}", ("loss.clip: loss.name", "'lsa'")),
        (
            "loss.name: {choices: [soft_margin]}\nloss.clip: {low: 0, high: 0.1, when: {loss.name: asl}}",
            ("loss.clip: when: loss.name is never 'asl'", "soft_margin"),
        ),
        (
            "model.tau: {low: 0.1, high: 0.2}\nloss.clip: {low: 0, high: 0.1, when: {model.tau: 0.1}}",
            ("loss.clip: when: model.tau is a range",),
        ),
        ("{}", ("nothing is searched",)),
    ],
)
def test_errors_name_the_file_and_the_entry(tmp_path: Path, entry: str, words: tuple[str, ...]) -> None:
    path = write(tmp_path, entry)
    with pytest.raises(UserError) as caught:
        build_space(read_space(path), BASE, str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("- model.tau", "is not a mapping of config paths"),
        ("extends: mine\nmodel.tau: {low: 0.1, high: 0.2}", "extends: 'mine' is not known"),
    ],
)
def test_file_without_a_space_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_space(write(tmp_path, text))
    assert str(tmp_path / "my.yaml") in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--space .*none\.yaml: cannot be read \(No such file"):
        read_space(tmp_path / "none.yaml")


def test_space_of_the_readme_is_valid(tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parents[2] / "tuning/README.md").read_text(encoding="utf-8")
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", readme, re.S) if "extends: default" in block]
    base = PRESETS["voc2007"].config
    space = build_space(read_space(write(tmp_path, text)), base, "my_space.yaml")
    paths = {parameter.path for parameter in space.parameters}
    assert {"model.tau", "optim.momentum", "model.levels"} <= paths
    assert "model.head" not in paths
    assert space.point_of(base)[1] == []
