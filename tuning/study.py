"""The Optuna study of a search: the only place that says which points were drawn and how their trials ended; no Ray.

Each draw, epoch and end is in the study's storage before anything else acts on it, so a search that is killed loses nothing. Opened
again, the study first gives out the unfinished trials, which resume from their checkpoints under their numbers, then points not drawn
yet. A sampler is seeded by (seed, trial number, parameter), so an interrupted search draws what an undisturbed one would.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, get_args

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError
from msrn_ray.runs.history import best_index

from .options import MINIMIZED, Objective, SearchPlan
from .trial_point import TrialPoint

_KEPT_METRICS = (*get_args(Objective), "train/loss")
REDUCTION = 3  # ASHA: the best third of a rung continues
MAX_SAME_FAILURES = 3  # in a row, for the same reason; then the search stops
# User attributes of the study: a format on disk, studies of earlier versions have them
PLAN_KEY, NUM_TRIALS_KEY, RETRIED_KEY = "plan", "trials", "retried"


class SearchStudy:
    """Gives out trials and records their epochs, failures and ends.

    Attributes:
        study: Optuna's.
        plan: what is searched.
        config: what trials start from: the plan's, with the settings that a resumed search may change.
        objective: the plan's first, which ranks the trials and the epochs of a trial.
        space: the plan's.
        num_trials: how many trials the search runs in all.
        stopped_because: why the study gives out no more trials, after MAX_SAME_FAILURES in a row.
    """

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self.plan = SearchPlan.model_validate(study.user_attrs[PLAN_KEY])
        self.config = self.plan.config
        self.objective = self.plan.objectives[0]
        self.space = self.plan.space()
        self.num_trials = int(study.user_attrs[NUM_TRIALS_KEY])
        self.stopped_because: str | None = None
        self._open: dict[int, optuna.Trial] = {}
        self._failures: list[str] = []  # kinds of those in a row
        study.pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=math.ceil(self.epochs / REDUCTION**2), reduction_factor=REDUCTION
        )

    @property
    def epochs(self) -> int:
        """Epochs of a trial that does not stop early."""
        return self.plan.config.train.epochs

    @property
    def num_unfinished(self) -> int:
        """Number of trials that have not ended, or are not drawn yet."""
        ended = self.drawn_trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        return max(0, self.num_trials - len(ended))

    def set_num_trials(self, num_trials: int) -> None:
        """Change the number of trials in all.

        Raises:
            UserError: if more are drawn already, or the grid has fewer points.
        """
        drawn, most = len(self.drawn_trials()), len(self.study.get_trials(deepcopy=False))
        if num_trials < drawn:
            raise UserError(f"--trials {num_trials}: {drawn} were drawn already; give at least as many")
        if self.plan.sampler == "grid" and num_trials > most:
            raise UserError(f"--trials {num_trials}: the grid has {most} points")
        self.num_trials = num_trials
        self.study.set_user_attr(NUM_TRIALS_KEY, num_trials)

    def retry_failed(self) -> int:
        """Add the points of failed trials to the queue as additional trials, each failure once; return how many.

        The points that are left of a shortened grid come before them.
        """
        done = self.study.user_attrs.get(RETRIED_KEY, [])
        again = [trial for trial in self.drawn_trials(TrialState.FAIL) if trial.number not in done]
        for trial in again:
            self.study.enqueue_trial(trial.params)
        self.study.set_user_attr(RETRIED_KEY, [*done, *(trial.number for trial in again)])
        queued = len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        self.num_trials = max(self.num_trials + len(again), len(self.drawn_trials()) + queued)
        self.study.set_user_attr(NUM_TRIALS_KEY, self.num_trials)
        return len(again)

    def drawn_trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the drawn trials in these states, in order; without states all drawn trials."""
        wanted = states or (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        return self.study.get_trials(deepcopy=False, states=wanted)

    def check_data(self, data: str, source: str) -> None:
        """Refuse to resume with other images or labels.

        Raises:
            UserError: with both data sets.
        """
        if data != self.plan.data:
            raise UserError(
                f"study {self.study.study_name} is of another data set: it was searched on {self.plan.source}"
                f" ({self.plan.data[:12]}), data.root now holds {source} ({data[:12]}); start a new search"
            )

    def next_trial(self) -> TrialPoint | None:
        """Return the next trial to run; None once all are given out or the search has stopped."""
        while self.stopped_because is None:
            left = [trial for trial in self.drawn_trials(TrialState.RUNNING) if trial.number not in self._open]
            if left:
                self._seed(left[0].number)
                # Optuna has no public way to continue a trial; the parameters that it has are not drawn again
                trial = optuna.trial.Trial(self.study, left[0]._trial_id)
            elif len(self.drawn_trials()) < self.num_trials:
                self._seed(len(self.drawn_trials()))
                trial = self.study.ask()
            else:
                return None
            overrides = self.space.suggest(trial, partial(self._seed, trial.number))
            self._open[trial.number] = trial
            if _attribute(self.epochs) in trial.user_attrs:  # killed between its last epoch and its end
                self._complete(trial)
                continue
            try:
                self.plan.config.with_overrides(overrides)
            except UserError as error:  # values that are valid alone may be invalid together
                self.fail(trial.number, "config", str(error))
                continue
            return TrialPoint(trial.number, overrides)
        return None

    def _seed(self, *numbers: int) -> None:
        """Seed the study's sampler by a trial's number, and a parameter's: one that a kill left undrawn gets the same value later."""
        seed = int(np.random.SeedSequence([self.plan.config.train.seed, *numbers]).generate_state(1)[0])
        self.study.sampler = self._sampler(seed)

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        if self.plan.sampler != "tpe":
            return optuna.samplers.RandomSampler(seed)
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning):
            warnings.simplefilter("ignore")
            return optuna.samplers.TPESampler(
                n_startup_trials=min(10, max(3, self.num_trials // 3)),  # a short search too has some trials that learn
                multivariate=True,
                group=True,
                constant_liar=True,
                seed=seed,
            )

    def record(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """Record an epoch's metrics; a score that is nan is a failure.

        Nothing changes with an epoch that is known, a trial that has ended, or a report without a score, which comes with a checkpoint
        within an epoch.

        Args:
            number: of the trial.
            metrics: `epoch` (from 1) and the objectives.

        Returns:
            Whether the trial is to stop.
        """
        trial, epoch = self._open.get(number), int(metrics["epoch"])
        if trial is None or self.objective not in metrics:
            return False
        if _attribute(epoch) in trial.user_attrs:
            if epoch >= self.epochs:  # the storage did not answer when the trial's end was to be stored
                self._complete(trial)
            return False
        for objective in self.plan.objectives:
            if math.isnan(metrics[objective]):
                reason = ": no image of val has a label" if objective.startswith("val/") else ""
                self.fail(number, "nan", f"{objective} is nan in epoch {epoch}{reason}")
                return True
        self._failures = []  # this trial works, so the failures beside it have no cause in common with all trials
        # a kill may have come between this report to Optuna and the attribute
        reported = self.study.get_trials(deepcopy=False)[number].intermediate_values
        if len(self.plan.objectives) == 1 and epoch not in reported:
            trial.report(float(metrics[self.objective]), epoch)
        trial.set_user_attr(_attribute(epoch), {name: metrics[name] for name in _KEPT_METRICS if name in metrics})
        if epoch >= self.epochs:
            self._complete(trial)
        elif self.plan.prunes and trial.should_prune():
            self.study.tell(number, state=TrialState.PRUNED)
            del self._open[number]
            return True
        return False

    def _complete(self, trial: optuna.Trial) -> None:
        best = best_epoch(trial.user_attrs, self.objective)
        assert best is not None
        self.study.tell(trial.number, [best[objective] for objective in self.plan.objectives])
        del self._open[trial.number]

    def fail(self, number: int, kind: str, reason: str) -> None:
        """Record that a trial failed; a trial that has ended stays as it is.

        MAX_SAME_FAILURES of a kind in a row, with no epoch of any trial between them, stop the search.

        Args:
            number: of the trial.
            kind: failures of a kind have the same cause.
            reason: one line for the user.
        """
        trial = self._open.get(number)
        if trial is None:
            return
        trial.set_user_attr("failure", reason)
        self.study.tell(number, state=TrialState.FAIL)
        del self._open[number]
        self._failures = [earlier for earlier in self._failures if earlier == kind] + [kind]
        if len(self._failures) == MAX_SAME_FAILURES:
            self.stopped_because = (
                f"{MAX_SAME_FAILURES} trials in a row failed for the same reason; the last one: {reason}"
            )

    def score_of(self, trial: FrozenTrial) -> float:
        """Return the first objective of a trial's best epoch; nan before its first epoch."""
        best = best_epoch(trial.user_attrs, self.objective)
        return best[self.objective] if best else math.nan

    def ranked_trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the drawn trials in these states, best first, those without a score last; without states all drawn trials."""
        sign = 1 if self.objective in MINIMIZED else -1

        def rank(trial: FrozenTrial) -> tuple[bool, float, int]:
            score = self.score_of(trial)
            return math.isnan(score), sign * score, trial.number

        return sorted(self.drawn_trials(*states), key=rank)

    def scored_trials(self) -> list[FrozenTrial]:
        """Return the trials that ended with a score, best first; one that was stopped early counts with its best epoch so far."""
        ended = self.ranked_trials(TrialState.COMPLETE, TrialState.PRUNED)
        return [trial for trial in ended if not math.isnan(self.score_of(trial))]

    def best_trial(self) -> FrozenTrial | None:
        """Return the best trial by the first objective."""
        return next(iter(self.scored_trials()), None)

    def config_of(self, trial: FrozenTrial) -> ExperimentConfig:
        """Return a trial's config for `msrn train --config`, which runs it again into `runs`, under a new name."""
        config = self.config.with_overrides(self.space.overrides(trial.params))
        return config.with_overrides({"train.storage": "runs", "train.run_name": None})


def _attribute(epoch: int) -> str:
    """Return the name of the trial's user attribute that holds an epoch's metrics: a format on disk."""
    return f"epoch {epoch:04d}"


def epochs_of(attributes: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the metrics of each epoch that a trial has recorded, in order, with `epoch`."""
    return [
        {"epoch": int(name.split()[1])} | values
        for name, values in sorted(attributes.items())
        if name.startswith("epoch ")
    ]


def best_epoch(attributes: Mapping[str, Any], objective: str) -> dict[str, float] | None:
    """Return the metrics of a trial's best epoch, by the rule of training; None before the first epoch."""
    sign, epochs = (-1 if objective in MINIMIZED else 1), epochs_of(attributes)
    return epochs[best_index([sign * epoch[objective] for epoch in epochs])] if epochs else None
