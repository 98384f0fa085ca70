"""The results of a search: the best config, all trials as a table, and a page with plots."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jinja2
import matplotlib
import optuna
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from optuna.trial import FrozenTrial, TrialState, create_trial
from optuna.visualization import matplotlib as draw
from rich.console import Console

from msrn_ray.errors import UserError
from msrn_ray.io.files import atomic_write

from .live_table import STATES, shown_parameters
from .options import MINIMIZED
from .study import SearchStudy, best_epoch, epochs_of

BEST_CONFIG, PAGE, CSV, PARQUET = "best_config.yaml", "report.html", "trials.csv", "trials.parquet"
_TEMPLATE = Path(__file__).with_name("page.html")
_FEWEST_TRIALS = 4  # importances of fewer trials mean nothing
_MOST_AXES = 8  # of the plot with a line per trial


class LevelRow(NamedTuple):
    """What the trials with one set of levels reached."""

    levels: str
    trials: int
    best: float
    median: float
    whole: int
    """Trials that did not stop early."""


class Plot(NamedTuple):
    """A heading, what the plot shows, and the plot as a data URI; where that is None, `about` says why."""

    title: str
    about: str
    uri: str | None


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
            with atomic_write(folder / name) as unfinished:
                write(unfinished)
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
        f"best {study.objective} {study.score_of(best):.4f} (trial {best.number})",
        f"train it: msrn train --config {folder / BEST_CONFIG}",
        sep="\n",
        markup=False,
    )


def trials_table(study: SearchStudy) -> pa.Table:
    """Return a row per trial, best first: state, times, metrics of its best epoch, and each parameter under its config path."""
    trials = study.ranked_trials()
    best = [best_epoch(trial.user_attrs, study.objective) or {} for trial in trials]
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
    for trial in study.scored_trials():
        if "model.levels" in trial.params:
            groups.setdefault(trial.params["model.levels"], []).append(trial)
    rows = []
    for levels, trials in groups.items():
        scores = [study.score_of(trial) for trial in trials]  # best first
        whole = sum(trial.state == TrialState.COMPLETE for trial in trials)
        rows.append(LevelRow(levels, len(trials), scores[0], median(scores), whole))
    return sorted(rows, key=lambda row: row.median, reverse=study.objective not in MINIMIZED)


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
        study=study,
        best=best,
        best_values=sorted(best.params.items()),
        cost=cost(study),
        states={STATES[state]: len(study.drawn_trials(state)) for state in STATES},
        levels=level_rows(study),
        plots=draw_all(study),
        trials=[
            {
                "number": trial.number,
                "state": STATES[trial.state],
                "epochs": len(epochs_of(trial.user_attrs)),
                "score": study.score_of(trial),
                "shown": shown_parameters(trial.params),
                "failure": trial.user_attrs.get("failure", ""),
            }
            for trial in study.ranked_trials()
        ],
    )


def draw_all(study: SearchStudy) -> list[Plot]:
    """Draw the plots that the study has enough trials and parameters for: Optuna's own, by matplotlib as SVG."""
    scored = scored_study(study)
    trials = scored.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    drawn = sorted({path for trial in trials for path in trial.params})
    varied = [path for path in drawn if len({trial.params[path] for trial in trials if path in trial.params}) > 1]
    common = [path for path in varied if all(path in trial.params for trial in trials)]
    enough = len(trials) >= _FEWEST_TRIALS and len(varied) > 0
    why = "" if enough else f"It needs at least {_FEWEST_TRIALS} trials with a score. "
    if enough:
        common.sort(key=list(optuna.importance.get_param_importances(scored, params=varied)).index)
    tau_lr = ["model.tau", "optim.lr"]
    about = {
        "History": f"{study.objective} of each trial's best epoch and the best so far. Trials stopped early count with what they reached.",
        "What matters": why + "Importance of each parameter for being among the better trials (PED-ANOVA).",
        "tau x learning rate": why + f"{study.objective} interpolated between the trials.",
        "All trials at once": why + "A line per trial, over the most important parameters.",
        "Both objectives": "Marked: the trials that no other trial beats in both.",
    }
    of_parameters: dict[str, tuple[Callable[..., Any], list[str]]] = {
        "What matters": (draw.plot_param_importances, varied),
        "tau x learning rate": (draw.plot_contour, tau_lr),
        "All trials at once": (draw.plot_parallel_coordinate, common[:_MOST_AXES]),
    }
    if not set(tau_lr) <= set(common):
        del of_parameters["tau x learning rate"]
    drawings: dict[str, Callable[[], Any] | None] = {
        "History": partial(draw.plot_optimization_history, scored, target_name=study.objective)
    }
    for title, (plot, params) in of_parameters.items():
        drawing = partial(plot, scored, params=params, target_name=study.objective)
        drawings[title] = drawing if enough and params else None
    if len(study.plan.objectives) == 2 and study.drawn_trials(TrialState.COMPLETE):
        objectives: list[str] = list(study.plan.objectives)
        drawings["Both objectives"] = partial(draw.plot_pareto_front, study.study, target_names=objectives)
    return [_plot(title, about[title], drawing) for title, drawing in drawings.items()]


def scored_study(study: SearchStudy) -> optuna.Study:
    """Return all trials with a score, also those that were stopped early, as finished trials of a study in memory.

    Optuna's plots leave out trials that were stopped early, which with ASHA are most.
    """
    copy = optuna.create_study(direction=study.study.directions[0], storage=optuna.storages.InMemoryStorage())
    scores = {trial.number: study.score_of(trial) for trial in study.scored_trials()}
    for trial in study.drawn_trials():  # those without a score too, so that the rest keep their numbers
        end: dict[str, Any] = {"value": scores[trial.number]} if trial.number in scores else {"state": TrialState.FAIL}
        copy.add_trial(create_trial(params=trial.params, distributions=trial.distributions, **end))
    return copy


def _plot(title: str, about: str, plot: Callable[[], Any] | None) -> Plot:
    if plot is None:
        return Plot(title, about, None)
    matplotlib.use("agg")  # needs no window system, and must not start one
    from matplotlib import pyplot

    with warnings.catch_warnings(), pyplot.style.context({}):  # Optuna sets a style for the whole process
        warnings.simplefilter("ignore")  # Optuna calls its matplotlib plots experimental, each time
        axes = plot()
        figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
        figure.set_size_inches(11, 5.5)
        figure.tight_layout()
        stream = io.BytesIO()
        figure.savefig(stream, format="svg")
        pyplot.close(figure)
    return Plot(title, about, "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode())
