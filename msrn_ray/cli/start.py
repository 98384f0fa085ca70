"""The experiment that a command line starts from, before its options are applied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import ExperimentConfig, load_config
from ..errors import UserError
from ..presets import PRESETS


def starting_config(argv: list[str]) -> ExperimentConfig:
    """The experiment that a command line starts from, before its options: a preset, a saved config, a run, or a checkpoint's config.

    Raises:
        UserError: if the file that it names cannot be read.
    """
    command, rest = argv[0], argv[1:]
    if command == "evaluate":
        from ..runs.checkpoint import load_checkpoint

        named = first_positional(rest)
        return PRESETS["scenes"].config if named is None else load_checkpoint(Path(named)).config
    starts = {option: value for option in ("--config", "--resume") if (value := option_value(rest, option)) is not None}
    named = first_positional(rest)
    if len(starts) + (named in PRESETS) > 1:
        raise UserError(
            f"give one start only: a preset, --config or --resume, not {', '.join([*filter(None, [named]), *starts])}"
        )
    if "--config" in starts:
        return load_config(Path(starts["--config"])).with_overrides(
            {"train.run_name": None}
        )  # the same experiment, not the same run
    if "--resume" in starts:
        from ..runs.resume import resume_config

        return resume_config(Path(starts["--resume"]))
    return PRESETS[named if named in PRESETS else "scenes"].config


def option_value(words: Sequence[str], option: str) -> str | None:
    """The value of `option VALUE` or `option=VALUE`."""
    for word, after in zip(words, [*words[1:], None], strict=False):
        if word == option:
            return after
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None


def first_positional(words: Sequence[str]) -> str | None:
    """The first word that is neither an option nor follows one without `=`; after a flag without a value it is not found."""
    for before, word in zip(["", *words], words, strict=False):
        if not word.startswith("-") and ("=" in before or not before.startswith("-")):
            return word
    return None
