"""The Optuna study of a search: the one place that says which points were drawn and what became of them; no Ray.

Each draw, epoch and end is in the study's storage before anything else hears of it, so a search that is killed loses nothing. Opened
again, it gives out the unfinished trials first, which go on from their checkpoints under their numbers, then points not drawn yet. A
sampler is seeded by (seed, trial number, parameter), so an interrupted search draws what an undisturbed one would.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError

from .search_plan import MINIMIZED, Plan

_KEPT_METRICS = ("val/mAP", "val/CF1", "val/OF1", "val/loss", "train/loss", "train/images_per_second", "epoch_seconds")
REDUCTION = 3  # ASHA: the better third of a rung goes on
ALIKE_FAILURES = 3  # in a row, of the same kind, and the search stops
_PLAN, _TRIALS, _RETRIED = "plan", "trials", "retried"  # user attributes of the study


class SearchStudy:
    """Gives out trials and takes what becomes of them.

    Attributes:
        study: Optuna's.
        plan: what is searched.
        config: what trials start from: the plan's, with what may change when a search goes on.
        space: the plan's.
        trials: how many are to be run in all.
        stopped_because: why no more trials are given out, after ALIKE_FAILURES of a kind in a row.
    """

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self.plan = Plan.model_validate(study.user_attrs[_PLAN])
        self.config = self.plan.config
        self.space = self.plan.space()
        self.trials = int(study.user_attrs[_TRIALS])
        self.stopped_because: str | None = None
        self._open: dict[int, optuna.Trial] = {}
        self._failures: list[str] = []  # kinds of those in a row
        study.pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=math.ceil(self.epochs / REDUCTION**2), reduction_factor=REDUCTION
        )

    @property
    def epochs(self) -> int:
        """Epochs of a trial that is not stopped early."""
        return self.plan.config.train.epochs

    @property
    def unfinished(self) -> int:
        """Trials that have not ended, or not been drawn."""
        return max(0, self.trials - len(self.frozen(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)))

    def set_trials(self, trials: int) -> None:
        """Makes it so many trials in all.

        Raises:
            UserError: if more were drawn already, or the grid has fewer points.
        """
        drawn, most = len(self.frozen()), len(self.study.get_trials(deepcopy=False))
        if trials < drawn:
            raise UserError(f"--trials {trials}: {drawn} were drawn already; give at least as many")
        if self.plan.sampler == "grid" and trials > most:
            raise UserError(f"--trials {trials}: the grid has {most} points")
        self.trials = trials
        self.study.set_user_attr(_TRIALS, trials)

    def retry_failed(self) -> int:
        """Adds the points of failed trials to the queue, each failure once; how many. They are trials more; what is left of a grid that
        was cut short comes before them."""
        done = self.study.user_attrs.get(_RETRIED, [])
        again = [trial for trial in self.frozen(TrialState.FAIL) if trial.number not in done]
        for trial in again:
            self.study.enqueue_trial(trial.params)
        self.study.set_user_attr(_RETRIED, [*done, *(trial.number for trial in again)])
        queued = len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        self.trials = max(self.trials + len(again), len(self.frozen()) + queued)
        self.study.set_user_attr(_TRIALS, self.trials)
        return len(again)

    def frozen(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in these states, in order; without states all that were drawn."""
        wanted = states or (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        return self.study.get_trials(deepcopy=False, states=wanted)

    def check_data(self, data: str, source: str) -> None:
        """Refuses to go on with other images or labels.

        Raises:
            UserError: with both data sets.
        """
        if data != self.plan.data:
            raise UserError(
                f"study {self.study.study_name} is of another data set: it was searched on {self.plan.source}"
                f" ({self.plan.data[:12]}), data.root now holds {source} ({data[:12]}); start a new search"
            )

    def next_trial(self) -> tuple[int, dict[str, Any]] | None:
        """Number and config overrides of the trial to run now; None where all have been given out or the search has stopped."""
        while self.stopped_because is None:
            left = [trial.number for trial in self.frozen(TrialState.RUNNING) if trial.number not in self._open]
            if left:
                number = left[0]
                self._seed(number)
                # Optuna has no public way to go on with a trial; parameters that it has are not drawn again
                trial = optuna.trial.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)
            elif len(self.frozen()) < self.trials:
                self._seed(len(self.frozen()))
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
            except UserError as error:  # values that are fine alone need not go together
                self.fail(trial.number, "config", str(error))
                continue
            return trial.number, overrides
        return None

    def _seed(self, *numbers: int) -> None:
        """Gives the study a sampler seeded by a trial's number, and that of a parameter: one that a kill left undrawn is drawn as it would
        have been."""
        seed = int(np.random.SeedSequence([self.plan.config.train.seed, *numbers]).generate_state(1)[0])
        self.study.sampler = self._sampler(seed)

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        if self.plan.sampler != "tpe":
            return optuna.samplers.RandomSampler(seed)
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning):
            warnings.simplefilter("ignore")
            return optuna.samplers.TPESampler(
                n_startup_trials=min(10, max(3, self.trials // 3)),  # a short search too has some trials that learn
                multivariate=True,
                group=True,
                constant_liar=True,
                seed=seed,
            )

    def record(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """Takes an epoch's metrics. Nothing changes with an epoch that is known, a trial that has ended, or a report without a score,
        which comes with a checkpoint within an epoch. A score that is nan is a failure.

        Args:
            number: of the trial.
            metrics: `epoch` (from 1) and the objectives.

        Returns:
            Whether the trial is to be stopped.
        """
        trial, epoch = self._open.get(number), int(metrics["epoch"])
        if trial is None or self.plan.objectives[0] not in metrics:
            return False
        if _attribute(epoch) in trial.user_attrs:
            if epoch >= self.epochs:  # the storage did not answer when its end was to be told
                self._complete(trial)
            return False
        for objective in self.plan.objectives:
            if math.isnan(metrics[objective]):
                reason = ": no image of val has a label" if objective.startswith("val/") else ""
                self.fail(number, "nan", f"{objective} is nan in epoch {epoch}{reason}")
                return True
        self._failures = []  # what failed beside it was not everything's fault
        if len(self.plan.objectives) == 1 and epoch not in self._reported(number):
            trial.report(float(metrics[self.plan.objectives[0]]), epoch)
        trial.set_user_attr(_attribute(epoch), {name: metrics[name] for name in _KEPT_METRICS if name in metrics})
        if epoch >= self.epochs:
            self._complete(trial)
        elif self.plan.prunes and trial.should_prune():
            self.study.tell(number, state=TrialState.PRUNED)
            del self._open[number]
            return True
        return False

    def _reported(self, number: int) -> Collection[int]:
        """Epochs whose score Optuna has; a kill may have come between that and our own note."""
        return self.study.get_trials(deepcopy=False)[number].intermediate_values

    def _complete(self, trial: optuna.Trial) -> None:
        best = best_epoch(trial.user_attrs, self.plan.objectives[0])
        assert best is not None
        self.study.tell(trial.number, [best[objective] for objective in self.plan.objectives])
        del self._open[trial.number]

    def fail(self, number: int, kind: str, reason: str) -> None:
        """Takes the failure of a trial; one that has ended is left as it is. The third of a kind, with no epoch of any trial between
        them, stops the search."""
        trial = self._open.get(number)
        if trial is None:
            return
        trial.set_user_attr("failure", reason)
        self.study.tell(number, state=TrialState.FAIL)
        del self._open[number]
        self._failures = [one for one in self._failures if one == kind] + [kind]
        if len(self._failures) == ALIKE_FAILURES:
            self.stopped_because = f"{ALIKE_FAILURES} trials in a row failed alike; the last one: {reason}"

    def best(self) -> FrozenTrial | None:
        """The best trial by the first objective; a trial that was stopped early counts with what it reached."""
        objective = self.plan.objectives[0]
        scored = [
            (best[objective], trial)
            for trial in self.frozen(TrialState.COMPLETE, TrialState.PRUNED)
            if (best := best_epoch(trial.user_attrs, objective)) is not None
        ]
        choose = min if objective in MINIMIZED else max
        return choose(scored, key=lambda pair: pair[0])[1] if scored else None

    def config_of(self, trial: FrozenTrial) -> ExperimentConfig:
        """The config of a trial, as `msrn train --config` runs it again: into `runs`, under a name of its own."""
        config = self.config.with_overrides(self.space.overrides(trial.params))
        return config.with_overrides({"train.storage": "runs", "train.run_name": None})


def _attribute(epoch: int) -> str:
    """The user attribute of a trial that holds the metrics of an epoch."""
    return f"epoch {epoch:04d}"


def epochs_of(attributes: Mapping[str, Any]) -> list[dict[str, float]]:
    """Metrics of each epoch that a trial has reported, in order, with `epoch`."""
    return [
        {"epoch": int(name.split()[1])} | values
        for name, values in sorted(attributes.items())
        if name.startswith("epoch ")
    ]


def best_epoch(attributes: Mapping[str, Any], objective: str) -> dict[str, float] | None:
    """Metrics of a trial's best epoch, the later of equals as training keeps it; None before the first epoch."""
    sign = -1 if objective in MINIMIZED else 1
    return max(epochs_of(attributes), key=lambda epoch: (sign * epoch[objective], epoch["epoch"]), default=None)
