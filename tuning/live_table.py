"""What a search prints while it runs: a live table on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .study import SearchStudy, epochs_of

STATES = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}
_SHOWN = {"model.levels": "levels", "model.tau": "tau", "optim.lr": "lr"}  # the other parameters are in trials.csv
_ROWS = 20  # more do not fit a terminal


class LiveTable:
    """Shows a study; `start` and `stop` enclose the time in which it changes."""

    def __init__(self, study: SearchStudy, console: Console) -> None:
        self._study = study
        self._console = console
        self._live = Live(console=console, refresh_per_second=2, transient=True)
        self._printed: set[tuple[int, TrialState, int]] = set()

    def start(self) -> None:
        """Start to refresh the table on a terminal."""
        if self._console.is_terminal:
            self._live.start()

    def stop(self) -> None:
        """Replace the live table by the whole one."""
        self._live.stop()
        self._console.print(study_table(self._study))

    def update(self, number: int) -> None:
        """Show the new state of a trial; show nothing while the storage does not answer, which the study actor waits for."""
        with suppress(StorageInternalError):
            if self._console.is_terminal:
                self._live.update(study_table(self._study, _ROWS))
                return
            trial = self._study.study.get_trials(deepcopy=False)[number]
            state = (number, trial.state, len(epochs_of(trial.user_attrs)))
            if state not in self._printed:  # a trial reports its best and last epochs again when it ends
                self._printed.add(state)
                self._console.print(trial_line(self._study, trial), markup=False)


def shown_parameters(params: Mapping[str, Any]) -> dict[str, str]:
    """Return levels (layer2 as 2), tau and learning rate as a table shows them."""
    values = {path: params.get(path, "") for path in _SHOWN}
    return {
        path: f"{value:.3g}" if isinstance(value, float) else str(value).replace("layer", "")
        for path, value in values.items()
    }


def trial_line(study: SearchStudy, trial: FrozenTrial) -> str:
    """Return a line with a trial's last epoch and the best trial so far."""
    epochs = epochs_of(trial.user_attrs)
    parts = [f"trial {trial.number}", STATES[trial.state]]
    if epochs:
        parts.append(f"epoch {epochs[-1]['epoch']}/{study.epochs}")
        parts.append(f"{study.objective} {epochs[-1][study.objective]:.4f}")
        if "train/images_per_second" in epochs[-1]:
            parts.append(f"{epochs[-1]['train/images_per_second']:.0f} img/s")
    parts += [f"{_SHOWN[path]} {value}" for path, value in shown_parameters(trial.params).items() if value]
    if "failure" in trial.user_attrs:
        parts.append(trial.user_attrs["failure"])
    best = study.best_trial()
    if best is not None:
        parts.append(f"best so far {study.score_of(best):.4f} (trial {best.number})")
    return "  ".join(parts)


def study_table(study: SearchStudy, rows: int | None = None) -> Table:
    """Return a table of the trials, best first: at most `rows`, but every running trial."""
    best = study.best_trial()
    trials = study.ranked_trials()
    title = f"{len(trials)} of {study.num_trials} trials"
    if best is not None:
        title += f", best {study.objective} {study.score_of(best):.4f} (trial {best.number})"
    table = Table("trial", *_SHOWN.values(), "epoch", study.objective, "img/s", "state", title=title)
    if rows is not None and len(trials) > rows:
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        ended = [trial for trial in trials if trial.state != TrialState.RUNNING]
        trials = [*ended[: max(0, rows - len(running))], *running]
    for trial in trials:
        epochs = epochs_of(trial.user_attrs)
        speed = epochs[-1].get("train/images_per_second") if epochs else None
        state = STATES[trial.state]
        table.add_row(
            str(trial.number),
            *shown_parameters(trial.params).values(),
            f"{epochs[-1]['epoch'] if epochs else 0}/{study.epochs}",
            f"{study.score_of(trial):.4f}" if epochs else "",
            "" if speed is None else f"{speed:.0f}",
            f"{state}: {trial.user_attrs['failure'][:60]}" if "failure" in trial.user_attrs else state,
        )
    return table
