"""The READMEs are true: commands parse, options, files and links exist, defaults are right, the Python example runs."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from msrn_ray.cli.app import COMMANDS
from msrn_ray.cli.named_data import NAMING_COMMANDS, name_data
from msrn_ray.cli.parser import parse
from msrn_ray.config import ExperimentConfig
from msrn_ray.presets import PRESETS
from tests.test_architecture import RAY_ROOMS, RINGS
from tests.tiny import make_photo, make_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "cluster/README.md", "tuning/README.md", "tests/README.md", "msrn_ray/README.md")
}
README, REFERENCE, WORKING = PAGES["README.md"], PAGES["msrn_ray/README.md"], PAGES["tests/README.md"]
ALL = "\n".join(PAGES.values())
CONFIG = ExperimentConfig()
OPTION = r"--(data|model|loss|optim|train|resources)\.([a-z-]+)"


def commands(text: str) -> list[str]:
    """Every `msrn ...` and `python -m msrn_ray ...` of a page, in blocks and in running text."""
    joined = text.replace("\\\n", " ")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", joined, re.S) for line in block.splitlines()]
    inline = re.findall(r"`(msrn [^`]+)`", joined)
    found = []
    for line in [*lines, *inline]:
        for part in re.split(r"&&|-- +(?=python)", line.split("  #")[0]):
            stripped = part.strip().removeprefix(".venv/bin/")
            words = stripped.removeprefix("python -m msrn_ray")
            if words != stripped:
                found.append("msrn" + words)
            elif words.startswith("msrn "):
                found.append(words)
    return found


def default_of(group: str, name: str) -> Any:
    """The config's value of an option, which may be the `no-` form of a flag.

    Raises:
        AttributeError: if the option does not exist.
    """
    return getattr(getattr(CONFIG, group), name.removeprefix("no-").replace("-", "_"))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_takes_two_minutes() -> None:
    assert len(README.split()) <= 1400


def test_readme_shows_every_command() -> None:
    assert {shlex.split(command)[1] for command in commands(README)} >= set(COMMANDS)


def test_test_command_is_one_marked_line() -> None:
    (block,) = re.findall(r"<!-- test command -->\n```bash\n(.*?)```$", README, re.S | re.M)
    install = ".venv/bin/pip install -e '.[dev]' -c cluster/requirements.txt"
    assert block == f"python3 -m venv .venv && {install} && .venv/bin/pytest\n"


@pytest.mark.parametrize(("page", "command"), [(page, command) for page in PAGES for command in commands(PAGES[page])])
def test_command_parses(page: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(command)[1:]
    if len(argv) > 1 and argv[0] in NAMING_COMMANDS and argv[1] not in PRESETS and not argv[1].startswith("-"):
        Path(argv[1]).touch()  # data of the user
    argv = name_data(argv)
    # the runs and configs of the examples do not exist: parse against the preset that they started from
    monkeypatch.setattr("msrn_ray.cli.parser.starting_config", lambda argv: PRESETS["scenes"].config)
    if "--help" in argv:
        with pytest.raises(SystemExit) as stop:
            parse(COMMANDS, argv)
        assert stop.value.code == 0
    else:
        assert type(parse(COMMANDS, argv)) is COMMANDS[argv[0]]


def test_config_options_exist() -> None:
    options = set(re.findall(OPTION, ALL))
    assert {("train", "checkpoint-every"), ("train", "max-failures"), ("resources", "num-workers")} <= options
    for group, name in options:
        default_of(group, name)


def test_other_options_in_running_text_exist() -> None:
    known = {field.name.replace("_", "-") for command in COMMANDS.values() for field in fields(command)}
    known |= set(ExperimentConfig.model_fields) | {"help"}
    named = set(re.findall(r"`--([a-z-]+)[ `=]", ALL))
    assert {"efficiency", "short-side", "protocol", "space"} <= named
    assert named - known == {"working-dir"}  # of `ray job submit`


def test_defaults_that_are_named_are_true() -> None:
    named = re.findall(rf'`{OPTION}` \(default "?([^")]+)"?\)', ALL)
    assert {"max-failures", "checkpoint-every", "hang-minutes", "wait-minutes"} <= {name for _, name, _ in named}
    rows = re.findall(rf"^\| `{OPTION}` \| `([^`]+)` \|", ALL, re.M)
    assert {"compile", "amp", "head"} <= {name for _, name, _ in rows}
    for group, name, value in [*named, *rows]:
        default = default_of(group, name)
        assert default == (type(default)(value) if type(default) in (int, float) else value) or str(default) == value
    plan = {field.name: field.default for field in fields(COMMANDS["plan"])}
    for name, value in re.findall(r"`--([a-z-]+)` \(default ([\d.]+)\)", PAGES["cluster/README.md"]):
        assert plan[name.replace("-", "_")] == float(value), name


def test_every_preset_is_in_the_table() -> None:
    for name in set(PRESETS) - {"scenes"}:
        assert f"| `{name}` |" in REFERENCE
        assert f"`msrn train {name} --data.root {'FILE' if name == 'manifest' else 'DIR'}`" in REFERENCE


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_pictures_are_png(page: str) -> None:
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGES[page]):
        assert ((ROOT / page).parent / name).read_bytes().startswith(b"\x89PNG"), name


@pytest.mark.parametrize("page", PAGES)
def test_files_of_the_project_exist(page: str) -> None:
    for name in re.findall(r"(?<![\w/.])((?:msrn_ray|tuning|tests|cluster)/[\w/.-]*)", PAGES[page]):
        if "NAME" not in name and "ROOM" not in name:
            assert (ROOT / name.rstrip(".")).exists(), name


def test_rooms_in_the_table_are_those_of_the_tests() -> None:
    rooms, uses_ray = {}, set()
    for ring, cell, ray in re.findall(r"^\| (\d+) \| (.*?) \| .* \| (yes|no) \|$", WORKING, re.M):
        for name in re.findall(r"`(?:msrn_ray/)?(\w+)(?:/|\.py)`", cell):
            rooms[name] = int(ring)
            uses_ray |= {name} if ray == "yes" else set()
    *rings, above = RINGS
    assert rooms == {name: number for number, names in enumerate(rings, 1) for name in names}
    assert all(f"{name}.py`" in WORKING for name in above)
    assert uses_ray == RAY_ROOMS - above


def test_every_room_is_in_the_table() -> None:
    table = WORKING.split("## Rooms")[1].split("## ")[0]
    for path in (ROOT / "msrn_ray").iterdir():
        is_room = (path / "__init__.py").exists() or (path.suffix == ".py" and path.name != "__init__.py")
        assert not is_room or f"`msrn_ray/{path.name}{'/' if path.is_dir() else ''}`" in table, path.name


def test_every_benchmark_is_in_the_table() -> None:
    table = WORKING.split("## Benchmarks")[1]
    modules = {path.stem for path in (ROOT / "tests/benchmarks").glob("*.py")} - {"__init__", "measure"}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == modules
    assert set(re.findall(r"python -m tests\.benchmarks\.(\w+)", ALL)) <= modules


def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in example.splitlines() if line]) == 4
    make_tiny_checkpoint(tmp_path / "runs/RUN")
    make_photo(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["probabilities"].shape == (1, 3)
    assert names["predictor"].label_names == ("label 0", "label 1", "label 2")


def test_public_names_exist() -> None:
    import msrn_ray

    for path in re.findall(r"`(msrn_ray(?:\.\w+)+)", README):
        found: Any = msrn_ray
        for name in path.split(".")[1:]:
            found = getattr(found, name)
