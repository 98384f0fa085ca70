"""The console command `msrn` (= `python -m msrn_ray`): its subcommand `train`, and the table of all subcommands."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from pydantic import ValidationError

from ..config import ExperimentConfig, describe_errors
from ..errors import UserError
from ..presets import PresetName
from .cluster import Cluster, Plan, Runs
from .data import Convert, Doctor, Graph, Prepare
from .evaluate import Evaluate, ImportOfficial, Presets
from .named_data import name_data
from .output import from_here, new_console, print_summary
from .parser import StartsFromConfig, parse
from .predict import Predict
from .search import Search


@dataclass(frozen=True)
class Train(StartsFromConfig):
    """Train on Ray: a preset, changed by options, or a saved config, or an interrupted run."""

    preset: tyro.conf.Positional[PresetName] = "scenes"
    """Experiment to start from; `msrn presets` lists them."""
    config: Path | None = None
    """Start from this saved YAML or JSON instead of a preset (a run folder holds one)."""
    resume: Path | None = None
    """Resume this run folder from its last checkpoint."""
    or_resume: bool = False
    """Resume the run of this `--train.run-name` if it exists, instead of refusing the name. A job that is submitted again then resumes
    its own run."""
    experiment: Annotated[ExperimentConfig, tyro.conf.arg(name="")] = field(default_factory=ExperimentConfig)
    """The experiment; every option below changes one value of it."""

    @classmethod
    def from_config(cls, config: ExperimentConfig, argv: Sequence[str]) -> Train:
        """See `StartsFromConfig`."""
        return cls(experiment=config)

    def run(self) -> None:
        """Train, then print where the results are."""
        from ..ray_train.driver import train

        start = time.monotonic()
        result = train(self.experiment, resume=self.resume is not None or self._run_exists())
        print_summary(new_console(), result.metrics)
        chosen = " (chosen on the test split: protocol paper)" if self.experiment.protocol == "paper" else ""
        scores = [
            f"{split} mAP {result.metrics[f'{split}/mAP']:.4f}"
            for split in ("val", "test")
            if f"{split}/mAP" in result.metrics
        ]
        print(f"{', '.join(scores)}{chosen} in {time.monotonic() - start:.0f} s")
        print(f"best checkpoint {from_here(result.best_checkpoint)}")
        print(f"curves {from_here(result.run_folder / 'curves.png')}")
        print(f"all figures {from_here(result.run_folder / 'metrics.jsonl')}")

    def _run_exists(self) -> bool:
        """Return whether `or_resume` finds its run."""
        name = self.experiment.train.run_name
        if self.or_resume and name is None:
            raise UserError("--or-resume: name the run with --train.run-name, so that the next start finds it")
        return self.or_resume and (Path(self.experiment.train.storage).expanduser() / str(name)).exists()


COMMANDS: dict[str, type[Any]] = {
    "train": Train,
    "search": Search,
    "evaluate": Evaluate,
    "predict": Predict,
    "prepare": Prepare,
    "convert": Convert,
    "graph": Graph,
    "doctor": Doctor,
    "runs": Runs,
    "cluster": Cluster,
    "plan": Plan,
    "presets": Presets,
    "import-official": ImportOfficial,
}


def main() -> None:
    """Run one subcommand. Exit with 2 and one line for what the user can fix, and with 130 after Ctrl-C; a bug keeps its traceback."""
    try:
        try:
            if sys.argv[1:] == ["--version"]:
                print(f"msrn {_installed_version()}")
            else:
                parse(COMMANDS, name_data(sys.argv[1:]) or ["--help"]).run()
        finally:
            sys.stdout.flush()  # before a message on stderr, and here, so that an error of the flush is caught below
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


def _installed_version() -> str:
    try:
        return version("msrn-ray")
    except PackageNotFoundError:
        return "(not installed: a source checkout)"


def _fail(message: str) -> NoReturn:
    print(f"msrn: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)
