"""The results of a search: the best config, all trials as a table, and a page with plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jinja2
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from msrn_ray.errors import UserError
from msrn_ray.io.files import atomic_write

from .live_table import STATES, ranked, score_of, shown_parameters
from .report_plots import draw_all
from .search_plan import MINIMIZED
from .study import SearchStudy, best_epoch, epochs_of

BEST_CONFIG, PAGE, CSV, PARQUET = "best_config.yaml", "report.html", "trials.csv", "trials.parquet"
_TEMPLATE = Path(__file__).with_name("page.html")


class LevelRow(NamedTuple):
    """What the trials with one set of levels reached."""

    levels: str
    trials: int
    best: float
    median: float
    whole: int
    """Trials that did not stop early."""


class Cost(NamedTuple):
    """Epochs trained, and the epochs of the same trials without early stopping."""

    epochs: int
    full: int


def write_results(study: SearchStudy, folder: Path, console: Console) -> None:
    """Write the results of a study into the search folder, each file whole or not at all; without a score only the table of trials.

    Raises:
        UserError: if the folder cannot be written.
    """
    best = study.best_trial()
    table = trials_table(study)
    results: dict[str, Callable[[Path], Any]] = {
        CSV: lambda path: pyarrow.csv.write_csv(table, path),
        PARQUET: lambda path: pq.write_table(table, path),
    }
    if best is not None:
        results[BEST_CONFIG] = study.config_of(best).save
        results[PAGE] = lambda path: path.write_text(page(study), encoding="utf-8")
    try:
        for name, write in results.items():
            with atomic_write(folder / name) as partial:
                write(partial)
    except OSError as error:
        raise UserError(
            f"{folder}: the results cannot be written ({error.strerror}); the study is complete, no trial is lost"
        ) from None
    if best is None:
        return
    spent = cost(study)
    console.print(
        f"{spent.epochs} epochs trained of {spent.full} without early stopping"
        f" ({spent.epochs / max(1, spent.full):.0%}); page {folder / PAGE}",
        markup=False,
    )
    console.print(f"best {study.plan.objectives[0]} {score_of(study, best):.4f} (trial {best.number})", markup=False)
    console.print(f"train it: msrn train --config {folder / BEST_CONFIG}", markup=False)


def trials_table(study: SearchStudy) -> pa.Table:
    """Return a row per trial, best first: state, times, metrics of its best epoch, and each parameter under its config path."""
    trials, objective = ranked(study), study.plan.objectives[0]
    best = [best_epoch(trial.user_attrs, objective) or {} for trial in trials]
    metrics = sorted({name for epoch in best for name in epoch if name != "epoch"})
    overrides = [study.space.overrides(trial.params) for trial in trials]
    columns: dict[str, list[Any]] = {
        "trial": [trial.number for trial in trials],
        "state": [STATES[trial.state] for trial in trials],
        "failure": [trial.user_attrs.get("failure") for trial in trials],
        "started": [trial.datetime_start for trial in trials],
        "ended": [trial.datetime_complete for trial in trials],
        "epochs": [len(epochs_of(trial.user_attrs)) for trial in trials],
        "best_epoch": [epoch.get("epoch") for epoch in best],
    }
    columns |= {name: [epoch.get(name) for epoch in best] for name in metrics}
    columns |= {
        parameter.path: _column([values.get(parameter.path) for values in overrides])
        for parameter in study.space.parameters
    }
    return pa.table(columns)


def _column(values: Sequence[Any]) -> list[Any]:
    """Return numbers and truth values as they are, anything else as text: a column has one type."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and kinds <= {bool, str}):
        return list(values)
    return [
        None if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for value in values
    ]


def level_rows(study: SearchStudy) -> list[LevelRow]:
    """Return what each set of levels reached, best median first; nothing where levels are not searched."""
    groups: dict[str, list[FrozenTrial]] = {}
    for trial in study.drawn_trials(TrialState.COMPLETE, TrialState.PRUNED):
        if "model.levels" in trial.params and not math.isnan(score_of(study, trial)):
            groups.setdefault(trial.params["model.levels"], []).append(trial)
    lower = study.plan.objectives[0] in MINIMIZED
    rows = []
    for levels, trials in groups.items():
        scores = [score_of(study, trial) for trial in trials]
        whole = sum(trial.state == TrialState.COMPLETE for trial in trials)
        rows.append(LevelRow(levels, len(trials), (min if lower else max)(scores), median(scores), whole))
    return sorted(rows, key=lambda row: row.median, reverse=not lower)


def cost(study: SearchStudy) -> Cost:
    """Count the epochs of the trials that did not fail, and those of as many trials without early stopping."""
    trials = study.drawn_trials(TrialState.COMPLETE, TrialState.PRUNED)
    return Cost(sum(len(epochs_of(trial.user_attrs)) for trial in trials), len(trials) * study.epochs)


def page(study: SearchStudy) -> str:
    """Return the HTML page; it needs no other file."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    best = study.best_trial()
    assert best is not None
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=study.study.study_name,
        source=study.plan.source,
        objective=study.plan.objectives[0],
        sampler=study.plan.sampler,
        best=best,
        best_score=score_of(study, best),
        best_values=sorted(best.params.items()),
        cost=cost(study),
        states={STATES[state]: len(study.drawn_trials(state)) for state in STATES},
        planned=study.num_trials,
        levels=level_rows(study),
        plots=draw_all(study),
        trials=[
            {
                "number": trial.number,
                "state": STATES[trial.state],
                "epochs": len(epochs_of(trial.user_attrs)),
                "score": score_of(study, trial),
                "shown": shown_parameters(trial.params),
                "failure": trial.user_attrs.get("failure", ""),
            }
            for trial in ranked(study)
        ],
    )
