"""The study of a search without Ray: what it gives out and what it records."""

from __future__ import annotations

import math
from typing import Any

import pytest
from optuna.trial import TrialState

from msrn_ray.errors import UserError
from tests.tuning.studies import EPOCHS, epoch_of, next_point, plan_of, quality, run, states
from tuning.study import best_epoch, epochs_of
from tuning.study_storage import create_study, open_study


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_first_trial_is_the_preset(url: str, sampler: str) -> None:
    study = create_study(url, "s", plan_of(sampler=sampler), 4)
    point = next_point(study)
    assert point.number == 0
    assert study.plan.config.with_overrides(point.overrides) == study.plan.config
    assert point.overrides["model.tau"] == 0.4


@pytest.mark.parametrize(("epochs", "rungs"), [(9, (1, 3)), (10, (2, 6))])
def test_early_stopping_keeps_the_better_third(url: str, epochs: int, rungs: tuple[int, int]) -> None:
    study = create_study(url, "s", plan_of(epochs=epochs, sampler="random"), 14)
    points = run(study)
    assert [point.number for point in points] == list(range(14))
    by_number = {point.number: point.overrides for point in points}
    assert {len(epochs_of(trial.user_attrs)) for trial in study.drawn_trials()} == {*rungs, epochs}
    for rung in rungs:  # as a loop over what each trial met at the rung, in the order of trials
        met: list[float] = []
        for trial in study.drawn_trials():
            reached = len(epochs_of(trial.user_attrs))
            if reached < rung:
                continue
            met.append(quality(by_number[trial.number]))
            continues = met[-1] in sorted(met)[-max(1, len(met) // 3) :]
            assert (reached > rung) == continues, (trial.number, rung)
            assert (trial.state == TrialState.PRUNED) or reached == epochs
    assert sum(len(epochs_of(trial.user_attrs)) for trial in study.drawn_trials()) < 0.5 * 14 * epochs


def test_without_early_stopping_no_trial_stops(url: str) -> None:
    study = create_study(url, "s", plan_of(early_stopping=False), 4)
    run(study)
    assert states(study) == [TrialState.COMPLETE] * 4


def test_trial_counts_with_its_best_epoch(url: str) -> None:
    study = create_study(url, "s", plan_of(early_stopping=False), 1)
    next_point(study)
    for epoch in range(1, EPOCHS + 1):
        score = {1: 0.8, 2: 0.8, 3: 0.7}[epoch]
        study.record(0, {"epoch": epoch, "val/mAP": score, "val/OF1": float(epoch)})
    (trial,) = study.study.get_trials()
    assert trial.value == 0.8
    assert best_epoch(trial.user_attrs, "val/mAP") == {"epoch": 2, "val/mAP": 0.8, "val/OF1": 2.0}


def test_grid_has_no_more_trials_than_points(url: str) -> None:
    plan = plan_of(sampler="grid", entries={"model.tau": {"low": 0.1, "high": 0.9}})
    study = create_study(url, "s", plan, 100)
    assert study.num_trials == 3
    with pytest.raises(UserError, match="--trials 4: the grid has 3 points"):
        study.set_num_trials(4)


def test_three_failures_in_a_row_stop_the_search(url: str) -> None:
    study = create_study(url, "s", plan_of(early_stopping=False), 20)
    beside = next_point(study)
    kinds = ["OutOfMemoryError", "NonFiniteLossError", "OutOfMemoryError", "OutOfMemoryError"]
    kinds += ["", *["OutOfMemoryError"] * 3]
    for kind in kinds:
        assert study.stopped_because is None
        if kind:
            study.fail(next_point(study).number, kind, f"{kind}: 5 GB")
        else:  # a trial that was running all the time
            study.record(beside.number, epoch_of(beside.overrides, 1))
    assert study.stopped_because is not None
    reason = "3 trials in a row failed for the same reason; the last one: OutOfMemoryError: 5 GB"
    assert reason in study.stopped_because
    assert "5 GB" in study.stopped_because
    assert study.next_trial() is None
    failed = study.drawn_trials(TrialState.FAIL)
    assert [trial.user_attrs["failure"] for trial in failed] == [f"{kind}: 5 GB" for kind in kinds if kind]
    assert open_study(url, "s").next_trial() is not None, "the cause may be fixed"


def test_report_within_an_epoch_is_no_score(url: str) -> None:
    study = create_study(url, "s", plan_of(sampler="random"), 2)
    for number, score in ((0, 0.9), (1, 0.1)):
        assert study.next_trial() is not None
        assert not study.record(number, {"epoch": 1, "loss": 3.0})
        assert study.record(number, {"epoch": 1, "val/mAP": score}) == (number == 1)
    assert [len(epochs_of(trial.user_attrs)) for trial in study.drawn_trials()] == [1, 1]


def test_failure_after_the_last_epoch_is_ignored(url: str) -> None:
    study = create_study(url, "s", plan_of(), 1)
    run(study)
    study.fail(0, "ActorDiedError", "late")
    assert states(study) == [TrialState.COMPLETE]


def test_invalid_combination_fails_and_the_next_follows(url: str) -> None:
    entries = {"optim.schedule": {"choices": ["cosine", "onecycle"]}, "optim.warmup_epochs": {"choices": [0, 1]}}
    base = plan_of().config.with_overrides({"optim.schedule": "cosine"})
    study = create_study(url, "s", plan_of(sampler="grid", entries=entries, config=base), None)
    points = []
    while (point := study.next_trial()) is not None:
        points.append(point)
    assert len(points) == 3
    (failed,) = study.drawn_trials(TrialState.FAIL)
    assert failed.params == {"optim.schedule": "onecycle", "optim.warmup_epochs": 1}
    assert "optim.warmup_epochs must be 0" in failed.user_attrs["failure"]


@pytest.mark.parametrize("early_stopping", [True, False])
def test_nan_score_is_a_failure(url: str, early_stopping: bool) -> None:
    study = create_study(url, "s", plan_of(early_stopping=early_stopping), 1)
    study.next_trial()
    assert study.record(0, {"epoch": 1, "val/mAP": math.nan})
    (trial,) = study.study.get_trials()
    assert trial.state == TrialState.FAIL
    assert "no image of val" in trial.user_attrs["failure"]
    assert study.best_trial() is None


def test_several_objectives(url: str) -> None:
    objectives = ("val/mAP", "epoch_seconds")
    study = create_study(url, "s", plan_of(objectives=objectives), 3)
    for number, (score, seconds) in enumerate([(0.5, 10.0), (0.7, 30.0), (0.6, 5.0)]):
        assert study.next_trial() is not None
        for epoch in range(1, EPOCHS + 1):
            metrics = {"epoch": epoch, "val/mAP": score if epoch == 2 else 0.1, "epoch_seconds": seconds + (epoch != 2)}
            assert not study.record(number, metrics)
    assert [trial.values for trial in study.study.get_trials()] == [[0.5, 10.0], [0.7, 30.0], [0.6, 5.0]]
    assert {trial.number for trial in study.study.best_trials} == {1, 2}
    best = study.best_trial()
    assert best is not None
    assert best.number == 1


def test_best_config_is_the_trial_under_another_name(url: str) -> None:
    study = create_study(url, "s", plan_of(), 5)
    overrides: dict[int, dict[str, Any]] = {point.number: point.overrides for point in run(study)}
    best = study.best_trial()
    assert best is not None
    assert quality(overrides[best.number]) == max(
        quality(overrides[trial.number]) for trial in study.drawn_trials(TrialState.COMPLETE)
    )
    config = study.config_of(best)
    changes = overrides[best.number] | {"train.storage": "runs", "train.run_name": None}
    assert config == study.plan.config.with_overrides(changes)


def test_other_data_are_refused_with_both(url: str) -> None:
    study = create_study(url, "s", plan_of(), 1)
    study.check_data("a" * 64, "the same, moved")
    with pytest.raises(
        UserError, match=r"study s .*scenes with 50 \+ 13 images \(aaaaaaaaaaaa\).*voc \(bbbbbbbbbbbb\)"
    ):
        study.check_data("b" * 64, "voc")
