"""The console command `msrn` (= `python -m msrn_ray`)."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import reduce
from operator import or_
from typing import Annotated, Any, NoReturn

import tyro
from pydantic import ValidationError

from ..config import describe_errors
from ..errors import UserError
from .cluster import Cluster, Plan, Runs
from .data import Doctor, Graph, Prepare
from .evaluate import Evaluate, ImportOfficial, Presets
from .predict import Predict
from .search import Search
from .start import StartsFromConfig, require_first, starting_config
from .train import Train

_ABOUT = "MSRN (arXiv 2106.11596): multi-label image classification with label graphs and semantic attention, on Ray."
COMMANDS: dict[str, type[Any]] = {
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
    """Parse the command line and run one subcommand."""
    with report_errors():
        parse(sys.argv[1:] or ["--help"]).run()


@contextmanager
def report_errors() -> Iterator[None]:
    """Exit with 2 and one line for what the user can fix, and with 130 after Ctrl-C; a bug of ours keeps its traceback."""
    try:
        yield
        sys.stdout.flush()  # here, so that an error of it is caught below
    except ValidationError as error:
        _fail("; ".join(describe_errors(error)))
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("msrn: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output (head, less) has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def parse(argv: list[str]) -> Any:
    """Return the subcommand that the words `argv` stand for, ready to run.

    Raises:
        UserError, ValidationError: for a value that is wrong.
        SystemExit: for help, or for a command line that tyro cannot parse.
    """
    subcommands = (_subcommand(name, argv) for name in COMMANDS)
    settings: dict[str, Any] = {"prog": "msrn", "description": _ABOUT, "args": argv}
    union = reduce(or_, subcommands)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            command: Any = tyro.cli(union, **settings)
    except SystemExit as stop:
        error: BaseException | None = stop
        while error is not None:  # of a value out of range pydantic's message is clear; tyro's frame around it is not
            if isinstance(error, ValidationError):
                raise error from None
            error = error.__context__
        return tyro.cli(union, **settings)  # prints tyro's help or error
    if isinstance(command, StartsFromConfig):
        require_first(command, argv)
    return command


def _subcommand(name: str, argv: list[str]) -> Any:
    """Return a subcommand for tyro; that of the command line gets the defaults of its options."""
    command = COMMANDS[name]
    default: Any = tyro.MISSING_NONPROP
    if argv[0] == name and issubclass(command, StartsFromConfig):
        default = command.from_config(starting_config(argv), argv)
    about = (command.__doc__ or "").strip()
    return Annotated[command, tyro.conf.subcommand(name, default=default, description=about)]


def _fail(message: str) -> NoReturn:
    print(f"msrn: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)
