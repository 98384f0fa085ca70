"""The console command `msrn` (= `python -m msrn_ray`)."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from pydantic import ValidationError

from tuning.options import Search, default_search

from ..config import describe_errors
from ..errors import UserError
from .cluster import Cluster, Plan, Runs
from .data import Doctor, Graph, Prepare
from .evaluate import Evaluate, ImportOfficial, Presets
from .predict import Predict
from .start import first_positional, starting_config
from .train import Train

_ABOUT = "MSRN (arXiv 2106.11596): multi-label image classification with label graphs and semantic attention, on Ray."
_COMMANDS = {
    "train": Train,
    "search": Search,
    "evaluate": Evaluate,
    "predict": Predict,
    "prepare": Prepare,
    "graph": Graph,
    "doctor": Doctor,
    "runs": Runs,
    "cluster": Cluster,
    "plan": Plan,
    "presets": Presets,
    "import-official": ImportOfficial,
}


def main() -> None:
    """Parses the command line and runs one subcommand."""
    with report_errors():
        _parse(sys.argv[1:] or ["--help"]).run()


@contextmanager
def report_errors() -> Iterator[None]:
    """Exits with 2 and one line for what the user can mend, with 130 after Ctrl-C; a fault of ours keeps its traceback."""
    try:
        yield
    except ValidationError as error:
        _fail("; ".join(describe_errors(error)))
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("msrn: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _parse(argv: list[str]) -> Any:
    commands: list[Any] = []
    for name, command in _COMMANDS.items():
        default: Any = tyro.MISSING_NONPROP
        if argv[0] == name:
            default = _with_defaults(argv)
        about = (command.__doc__ or "").strip()
        commands.append(Annotated[command, tyro.conf.subcommand(name, default=default, description=about)])
    union: Any = commands[0]
    for other in commands[1:]:
        union |= other
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return _check_order(tyro.cli(union, prog="msrn", description=_ABOUT, args=argv), argv)
    except SystemExit as stop:
        error: BaseException | None = stop
        while error is not None:  # a value out of range: pydantic's words are clear, tyro's frame around them is not
            if isinstance(error, ValidationError):
                raise error from None
            error = error.__context__
    return tyro.cli(
        union, prog="msrn", description=_ABOUT, args=argv
    )  # again, with tyro's own help or error on the screen


def _check_order(command: Any, argv: list[str]) -> Any:
    """Refuses a preset or checkpoint that `starting_config` did not see, behind a flag: its settings would not be used."""
    seen = first_positional(argv[1:])
    if isinstance(command, Evaluate):
        named, used = command.checkpoint, Path(seen or "")
    elif isinstance(command, (Train, Search, Graph, Doctor)):
        named, used = Path(command.preset), Path(seen or "scenes")
    elif isinstance(command, Prepare):
        named, used = Path(command.preset), Path(seen or "")
    else:
        return command
    if named != used:
        raise UserError(f"give {named} first, before the options: msrn {argv[0]} {named} ...")
    return command


def _with_defaults(argv: list[str]) -> Any:
    """The subcommand's options start from the preset, saved config, run or checkpoint that the command line names."""
    if argv[0] == "train":
        return Train(experiment=starting_config(argv))
    if argv[0] == "search":
        return default_search(starting_config(argv), argv)
    if argv[0] == "evaluate":
        config = starting_config(argv)
        return Evaluate(
            tyro.MISSING,
            protocol=config.protocol,
            batch_size=config.train.eval_batch_size,
            data=config.data,
            resources=config.resources,
        )
    if argv[0] == "graph":
        config = starting_config(argv)
        return Graph(
            tau=config.model.tau, tau_degree=config.model.tau_degree, protocol=config.protocol, data=config.data
        )
    if argv[0] == "prepare":
        return Prepare(tyro.MISSING, tyro.MISSING, data=starting_config(argv).data)
    if argv[0] == "doctor":
        config = starting_config(argv)
        return Doctor(protocol=config.protocol, data=config.data)
    return tyro.MISSING_NONPROP


def _fail(message: str) -> NoReturn:
    print(f"msrn: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
