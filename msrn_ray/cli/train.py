"""The subcommands of `msrn`: their options as typed dataclasses, and what each one does."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..config import ExperimentConfig
from ..errors import UserError
from ..presets import PRESETS, PresetName
from .output import from_here, new_console, print_summary

assert set(PRESETS) == set(PresetName.__args__)  # type: ignore[attr-defined]  # the command line's choices are the presets


@dataclass(frozen=True)
class Train:
    """Train on Ray: a preset, changed by options, or a saved config, or an interrupted run."""

    preset: tyro.conf.Positional[PresetName] = "scenes"
    """Experiment to start from; `msrn presets` lists them."""
    config: Path | None = None
    """Start from this saved YAML or JSON instead of a preset (a run folder holds one)."""
    resume: Path | None = None
    """Go on with this run folder from its last checkpoint."""
    or_resume: bool = False
    """Where there is a run of this `--train.run-name` already, go on with it instead of refusing the name: a job that is submitted again
    resumes itself."""
    experiment: Annotated[ExperimentConfig, tyro.conf.arg(name="")] = field(default_factory=ExperimentConfig)
    """The experiment; every option below changes one value of it."""

    def run(self) -> None:
        """Trains, then says where the results are."""
        from ..ray_train.driver import train

        start = time.monotonic()
        result = train(self.experiment, resume=self.resume is not None or self._is_there())
        out = new_console()
        print_summary(out, result.metrics)
        chosen = " (chosen on the test split: protocol paper)" if self.experiment.protocol == "paper" else ""
        scores = [
            f"{split} mAP {result.metrics[f'{split}/mAP']:.4f}"
            for split in ("val", "test")
            if f"{split}/mAP" in result.metrics
        ]
        out.print(f"{', '.join(scores)}{chosen} in {time.monotonic() - start:.0f} s", markup=False)
        out.print(f"best checkpoint {from_here(result.best_checkpoint)}", markup=False)
        out.print(f"curves {from_here(result.run_folder / 'curves.png')}", markup=False)
        out.print(f"all figures {from_here(result.run_folder / 'metrics.jsonl')}", markup=False)

    def _is_there(self) -> bool:
        """Whether `or_resume` finds its run."""
        name = self.experiment.train.run_name
        if self.or_resume and name is None:
            raise UserError("--or-resume: name the run with --train.run-name, so that it is found again")
        return self.or_resume and (Path(self.experiment.train.storage).expanduser() / str(name)).exists()
