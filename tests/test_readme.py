"""The README is true: its commands parse, its files exist, its pictures are pictures."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from msrn_ray.cli.app import _COMMANDS, _parse
from msrn_ray.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every `msrn ...` and `python -m msrn_ray ...` of the README, in blocks and in running text."""
    joined = README.replace("\\\n", " ")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", joined, re.S) for line in block.splitlines()]
    inline = re.findall(r"`(msrn [^`]+)`", joined)
    found = []
    for text in [*lines, *inline]:
        for part in re.split(r"&&|-- +(?=python)", text.split("  #")[0]):
            words = part.strip().removeprefix(".venv/bin/").removeprefix("python -m msrn_ray")
            if words != part.strip().removeprefix(".venv/bin/"):
                found.append("msrn" + words)
            elif words.startswith("msrn "):
                found.append(words)
    return found


def test_the_readme_has_the_commands_that_are_looked_for() -> None:
    used = {shlex.split(command)[1] for command in commands()}
    assert used >= set(_COMMANDS)


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = shlex.split(command)[1:]
    # runs and configs that the README only names are stood in for by the preset that they started from
    monkeypatch.setattr("msrn_ray.cli.app.starting_config", lambda argv: PRESETS["scenes"].config)
    if "--help" in argv:
        with pytest.raises(SystemExit) as stop:
            _parse(argv)
        assert stop.value.code == 0
    else:
        assert type(_parse(argv)) is _COMMANDS[argv[0]]


def test_options_exist_with_the_defaults_that_are_named() -> None:
    config = PRESETS["scenes"].config
    options = set(re.findall(r"--(data|model|loss|optim|train|resources)\.([a-z-]+)", README))
    assert {("train", "checkpoint-every"), ("train", "max-failures"), ("resources", "num-workers")} <= options
    for group, name in options:
        field = name.removeprefix("no-").replace("-", "_")
        assert hasattr(getattr(config, group), field), f"--{group}.{name}"
    assert f"`--train.max-failures` times ({config.train.max_failures})" in README
    assert f'`--train.checkpoint-every "{config.train.checkpoint_every}"`' in README


def test_every_preset_is_in_the_table() -> None:
    for name in set(PRESETS) - {"scenes"}:
        assert f"| `{name}` |" in README
        assert f"`msrn train {name} --data.root {'FILE' if name == 'manifest' else 'DIR'}`" in README


def test_files_on_the_map_exist() -> None:
    tree = README.split("## Map")[1]
    for name in re.findall(r"[\w/]+\.(?:py|yaml)", tree):
        assert any((ROOT / folder / name).exists() for folder in ("", "msrn_ray", "tuning")), name
    modules = {path.name for path in (ROOT / "msrn_ray").glob("*.py")}
    left_out = {"__init__.py", "errors.py", "types.py", "distributed.py"}
    named = set(re.findall(r"\w+\.py", tree))
    assert modules - left_out - named <= {
        "inputs.py",
        "prediction.py",
        "graph_report.py",
        "label_names.py",
    }


def test_pictures_are_pictures() -> None:
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / name).read_bytes().startswith(b"\x89PNG"), name
