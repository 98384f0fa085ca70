"""The plots of the search's page: Optuna's own, drawn by matplotlib as SVG."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
import optuna
from optuna.trial import TrialState, create_trial
from optuna.visualization import matplotlib as draw

from .live_table import score_of
from .search_plan import MINIMIZED
from .study import SearchStudy

_FEWEST_TRIALS = 4  # importances of fewer trials mean nothing
_MOST_AXES = 8  # of the plot with a line per trial


class Plot(NamedTuple):
    """A heading, what the plot shows, and the plot as a data URI; where that is None, `about` says why."""

    title: str
    about: str
    uri: str | None


def draw_all(study: SearchStudy) -> list[Plot]:
    """Draw the plots that the study has enough trials and parameters for."""
    scored = scored_study(study)
    trials = scored.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    drawn = {path for trial in trials for path in trial.params}
    objective = study.plan.objectives[0]
    varied = [
        path for path in sorted(drawn) if len({trial.params[path] for trial in trials if path in trial.params}) > 1
    ]
    enough = len(trials) >= _FEWEST_TRIALS and len(varied) > 0
    why = "" if enough else f"It needs at least {_FEWEST_TRIALS} trials with a score. "
    tau_lr = ["model.tau", "optim.lr"]
    common = [path for path in varied if all(path in trial.params for trial in trials)]
    if enough:
        common.sort(key=list(optuna.importance.get_param_importances(scored, params=varied)).index)
    plots = [
        _plot(
            "History",
            f"{objective} of each trial's best epoch and the best so far. Trials stopped early count with what they reached.",
            lambda: draw.plot_optimization_history(scored, target_name=objective),
        ),
        _plot(
            "What matters",
            why + "Importance of each parameter for being among the better trials (PED-ANOVA).",
            (lambda: draw.plot_param_importances(scored, params=varied, target_name=objective)) if enough else None,
        ),
    ]
    if set(tau_lr) <= set(common):
        plots.append(
            _plot(
                "tau x learning rate",
                why + f"{objective} interpolated between the trials.",
                (lambda: draw.plot_contour(scored, params=tau_lr, target_name=objective)) if enough else None,
            )
        )
    plots.append(
        _plot(
            "All trials at once",
            why + "A line per trial, over the most important parameters.",
            (lambda: draw.plot_parallel_coordinate(scored, params=common[:_MOST_AXES], target_name=objective))
            if enough and common
            else None,
        )
    )
    if len(study.plan.objectives) == 2 and study.drawn_trials(TrialState.COMPLETE):
        plots.append(
            _plot(
                "Both objectives",
                "Marked: the trials that no other trial beats in both.",
                lambda: draw.plot_pareto_front(study.study, target_names=list(study.plan.objectives)),
            )
        )
    return plots


def scored_study(study: SearchStudy) -> optuna.Study:
    """Return all trials with a score, also those that were stopped early, as finished trials of a study in memory.

    Optuna's plots leave out trials that were stopped early, which with ASHA are most.
    """
    scored = optuna.create_study(
        direction="minimize" if study.plan.objectives[0] in MINIMIZED else "maximize",
        storage=optuna.storages.InMemoryStorage(),
    )
    for trial in study.drawn_trials():  # those without a score too, so that the rest keep their numbers
        value = score_of(study, trial)
        ended = trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and not math.isnan(value)
        point: dict[str, Any] = {"params": trial.params, "distributions": trial.distributions}
        scored.add_trial(create_trial(**point, value=value) if ended else create_trial(**point, state=TrialState.FAIL))
    return scored


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
