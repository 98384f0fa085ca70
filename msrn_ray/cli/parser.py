"""Parses a command line into a subcommand.

tyro needs the defaults of all options before it parses, and they depend on a word of the command line: the preset, the saved config, the
run or the checkpoint. So this module reads that word first; `_require_first` then checks that tyro read the same word.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import tyro
from pydantic import ValidationError

from ..config import ExperimentConfig, load_config
from ..errors import UserError
from ..presets import PRESETS

_ABOUT = "MSRN (arXiv 2106.11596): multi-label image classification with label graphs and semantic attention, on Ray."


class StartsFromConfig:
    """A command whose options start from an experiment.

    Attributes:
        default_start: what the command starts from if the command line names nothing.
    """

    preset: str  # every subclass has one, or its own `start`
    default_start: ClassVar[str] = "scenes"

    @classmethod
    def from_config(cls, config: ExperimentConfig, argv: Sequence[str]) -> Self:
        """Return the command with the defaults of its options for the words `argv`, which start from `config`."""
        raise AssertionError(f"{cls.__name__} does not say its defaults")

    @property
    def start(self) -> str:
        """What the parsed command starts from: its preset or checkpoint."""
        return str(self.preset)


def parse(commands: Mapping[str, type[Any]], argv: list[str]) -> Any:
    """Return the subcommand that the words `argv` stand for, ready to run.

    Args:
        commands: classes of the subcommands by name.
        argv: the command line after `msrn`.

    Raises:
        UserError, ValidationError: for a value that is wrong.
        SystemExit: for help, or for a command line that tyro cannot parse.
    """
    parser: Any
    settings: dict[str, Any]
    if argv[0] in commands:  # this command alone, or tyro would suggest the options of others for a misspelt option
        parser = commands[argv[0]]
        about = (parser.__doc__ or "").strip()
        settings = {"prog": f"msrn {argv[0]}", "description": about, "args": argv[1:]}
        if issubclass(parser, StartsFromConfig):
            settings["default"] = parser.from_config(starting_config(argv), argv)
    else:
        parser = reduce(or_, (_subcommand(name, command) for name, command in commands.items()))
        settings = {"prog": "msrn", "description": _ABOUT, "args": argv}
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            command: Any = tyro.cli(parser, **settings)
    except SystemExit as stop:
        error: BaseException | None = stop
        while error is not None:  # of a value out of range pydantic's message is clear; tyro's frame around it is not
            if isinstance(error, ValidationError):
                raise error from None
            error = error.__context__
        return tyro.cli(parser, **settings)  # prints tyro's help or error
    if isinstance(command, StartsFromConfig):
        _require_first(command, argv)
    return command


def _subcommand(name: str, command: type[Any]) -> Any:
    """Return a subcommand for the list that tyro prints."""
    about = (command.__doc__ or "").strip()
    return Annotated[command, tyro.conf.subcommand(name, description=about)]


def starting_config(argv: Sequence[str]) -> ExperimentConfig:
    """Return the config of the preset, saved file, run or checkpoint that a command line names.

    Raises:
        UserError: if the named file cannot be read, or two starts are named.
    """
    command, *words = argv
    named = first_positional(words)
    if command == "evaluate":
        from ..runs.checkpoint import load_checkpoint

        return PRESETS["scenes"].config if named is None else load_checkpoint(Path(named)).config
    starts = {
        option: value for option in ("--config", "--resume") if (value := option_value(words, option)) is not None
    }
    if len(starts) + (named in PRESETS) > 1:
        raise UserError(
            f"give one start only: a preset, --config or --resume, not {', '.join([*filter(None, [named]), *starts])}"
        )
    if "--config" in starts:
        config = load_config(Path(starts["--config"]))
        return config.with_overrides({"train.run_name": None})  # the same experiment as a new run
    if "--resume" in starts:
        from ..runs.resume import resume_config

        return resume_config(Path(starts["--resume"]))
    return PRESETS[named if named in PRESETS else "scenes"].config


def _require_first(command: StartsFromConfig, argv: Sequence[str]) -> None:
    """Refuse a preset or checkpoint after a flag: `starting_config` did not see it, so its settings would not be used.

    Raises:
        UserError: with the command line to write.
    """
    used = first_positional(argv[1:]) or command.default_start
    if Path(command.start) != Path(used):
        raise UserError(f"give {command.start} first, before the options: msrn {argv[0]} {command.start} ...")


def option_value(words: Sequence[str], option: str) -> str | None:
    """Return the value in `option VALUE` or `option=VALUE`."""
    for word, next_word in zip(words, [*words[1:], None], strict=False):
        if word == option:
            return next_word
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None


def first_positional(words: Sequence[str]) -> str | None:
    """Return the first word that is no option and does not follow an option without `=`. After a flag without a value it is missed."""
    for previous, word in zip(["", *words], words, strict=False):
        if not word.startswith("-") and ("=" in previous or not previous.startswith("-")):
            return word
    return None
