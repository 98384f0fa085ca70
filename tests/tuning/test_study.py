"""The study of a search without Ray: what is given out, what is kept, what a search that is opened again does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from msrn_ray.errors import UserError
from msrn_ray.presets import PRESETS
from tuning.search_plan import Plan
from tuning.study import SearchStudy, best_epoch, epochs_of
from tuning.study_storage import create_study, open_study

ENTRIES = {
    "model.levels": {"subsets": ["layer1", "layer2", "layer3", "layer4"]},
    "model.tau": {"low": 0.05, "high": 0.9},
    "optim.lr": {"times": [0.1, 10]},
    "loss.name": {"choices": ["soft_margin", "asl"]},
    "loss.clip": {"low": 0, "high": 0.2, "when": {"loss.name": "asl"}},
}
EPOCHS = 3


def plan_of(epochs: int = EPOCHS, **change: Any) -> Plan:
    config = PRESETS["scenes"].config.with_overrides({"train.epochs": epochs})
    fields: dict[str, Any] = {
        "config": config,
        "entries": ENTRIES,
        "sampler": "tpe",
        "objectives": ("val/mAP",),
        "early_stopping": True,
        "data": "a" * 64,
        "source": "scenes with 50 + 13 images",
    }
    return Plan(**(fields | change))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


def quality(overrides: dict[str, Any]) -> float:
    """Best at tau 0.3 and three levels; between 0 and 1."""
    levels = overrides.get("model.levels", [])
    return 0.9 - 0.5 * abs(overrides["model.tau"] - 0.3) - 0.1 * abs(len(levels) - 3) + overrides.get("optim.lr", 0.0)


def epoch_of(overrides: dict[str, Any], epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "val/mAP": quality(overrides) * epoch / 9, "train/images_per_second": 90.0}


def run(study: SearchStudy, most: int = 1000) -> list[tuple[int, dict[str, Any]]]:
    """Runs up to `most` trials one after the other, each until its end."""
    given = []
    while len(given) < most and (drawn := study.next_trial()) is not None:
        number, overrides = drawn
        given.append(drawn)
        for epoch in range(1, study.epochs + 1):
            if study.record(number, epoch_of(overrides, epoch)):
                break
    return given


def drawn_of(study: SearchStudy) -> tuple[int, dict[str, Any]]:
    """The next trial, which there must be."""
    drawn = study.next_trial()
    assert drawn is not None
    return drawn


def states(study: SearchStudy) -> list[TrialState]:
    return [trial.state for trial in study.study.get_trials()]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_first_trial_is_the_preset_itself(url: str, sampler: str) -> None:
    study = create_study(url, "s", plan_of(sampler=sampler), 4)
    drawn = study.next_trial()
    assert drawn is not None
    number, overrides = drawn
    assert number == 0
    assert study.plan.config.with_overrides(overrides) == study.plan.config
    assert overrides["model.tau"] == 0.4


@pytest.mark.parametrize(("epochs", "rungs"), [(9, (1, 3)), (10, (2, 6))])
def test_early_stopping_keeps_the_better_third_and_saves_epochs(url: str, epochs: int, rungs: tuple[int, int]) -> None:
    study = create_study(url, "s", plan_of(epochs=epochs, sampler="random"), 14)
    given = run(study)
    assert [number for number, _ in given] == list(range(14))
    by_number = dict(given)
    assert {len(epochs_of(trial.user_attrs)) for trial in study.frozen()} == {*rungs, epochs}
    for rung in rungs:  # as a loop over what each trial met there, in the order of trials
        met: list[float] = []
        for trial in study.frozen():
            reached = len(epochs_of(trial.user_attrs))
            if reached < rung:
                continue
            met.append(quality(by_number[trial.number]))
            goes_on = met[-1] in sorted(met)[-max(1, len(met) // 3) :]
            assert (reached > rung) == goes_on, (trial.number, rung)
            assert (trial.state == TrialState.PRUNED) or reached == epochs
    assert sum(len(epochs_of(trial.user_attrs)) for trial in study.frozen()) < 0.5 * 14 * epochs


def test_without_early_stopping_all_run_to_their_end(url: str) -> None:
    study = create_study(url, "s", plan_of(early_stopping=False), 4)
    run(study)
    assert states(study) == [TrialState.COMPLETE] * 4


def test_a_trial_is_as_good_as_its_best_epoch(url: str) -> None:
    study = create_study(url, "s", plan_of(early_stopping=False), 1)
    drawn = study.next_trial()
    assert drawn is not None
    for epoch in range(1, EPOCHS + 1):
        score = {1: 0.8, 2: 0.8, 3: 0.7}[epoch]
        study.record(0, {"epoch": epoch, "val/mAP": score, "val/OF1": float(epoch)})
    (trial,) = study.study.get_trials()
    assert trial.value == 0.8
    assert best_epoch(trial.user_attrs, "val/mAP") == {"epoch": 2, "val/mAP": 0.8, "val/OF1": 2.0}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, dict[str, Any]]]:
    """The trials of a search of 7, of which 3 are drawn at random."""
    return run(create_study(f"sqlite:///{tmp_path_factory.mktemp('study')}/study.db", "s", plan_of(), 7))


@pytest.mark.parametrize("ended", [0, 2, 5])
def test_a_search_that_was_killed_between_trials_draws_what_it_would_have_drawn(
    url: str, undisturbed: list[tuple[int, dict[str, Any]]], ended: int
) -> None:
    first = run(create_study(url, "s", plan_of(), 7), ended)
    assert first + run(open_study(url, "s")) == undisturbed
    points = {str(overrides) for _, overrides in undisturbed}
    assert len(points) == 7, "a sampler seeded anew at each start would repeat its first points"


def test_what_was_running_goes_on_and_what_has_ended_does_not_run_again(url: str) -> None:
    study = create_study(url, "s", plan_of(early_stopping=False), 6)
    run(study, 2)
    third, fourth = study.next_trial(), study.next_trial()
    assert third is not None
    assert fourth is not None
    for epoch in (1, 2):
        study.record(third[0], epoch_of(third[1], epoch))
    params = [trial.params for trial in study.study.get_trials()]

    again = open_study(url, "s")
    assert again.unfinished == 4
    assert again.next_trial() == third
    assert again.next_trial() == fourth
    for number, overrides in (third, fourth):
        # epoch 2 comes a second time: the kill was after its report and before the next checkpoint
        for epoch in range(2 if number == third[0] else 1, EPOCHS + 1):
            assert not again.record(number, epoch_of(overrides, epoch))
    assert [number for number, _ in run(again)] == [4, 5]
    assert states(again) == [TrialState.COMPLETE] * 6
    assert [trial.params for trial in again.study.get_trials()][:4] == params
    assert all(len(epochs_of(trial.user_attrs)) == EPOCHS for trial in again.frozen())
    assert open_study(url, "s").next_trial() is None


def test_a_kill_at_any_write_loses_no_point_and_repeats_none(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends at the n-th write to the storage, for each n; the search is then opened and run to its end."""

    class Killed(BaseException):
        pass

    straight = run(create_study(url, "s", plan_of(), 3))
    from optuna.storages import RDBStorage

    # those that Optuna's cache calls
    writes = ("_create_new_trial", "_set_trial_param", "set_trial_state_values", "set_trial_user_attr")
    writes += ("set_trial_intermediate_value", "set_trial_system_attr")
    real: dict[str, Callable[..., Any]] = {name: getattr(RDBStorage, name) for name in writes}
    killed = True
    step = 0
    while killed:
        other = f"sqlite:///{tmp_path}/killed{step}.db"
        create_study(other, "s", plan_of(), 3)
        left = step

        def count(name: str) -> Callable[..., Any]:
            def write(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real[name](*arguments, **named)

            return write

        study = open_study(other, "s")
        killed = False
        with monkeypatch.context() as patch:
            for name in writes:
                patch.setattr(RDBStorage, name, count(name))
            try:
                run(study)
            except Killed:
                killed = True
        resumed = open_study(other, "s")
        run(resumed)
        trials = resumed.study.get_trials()
        assert [trial.number for trial in trials] == [0, 1, 2]
        assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
        assert [resumed.space.overrides(trial.params) for trial in trials] == [overrides for _, overrides in straight]
        step += 2  # every other write, so that the test stays short
    assert step > 16


def test_a_grid_is_given_out_once_across_a_restart(url: str) -> None:
    entries = {"model.tau": {"low": 0.1, "high": 0.9}, "model.levels": {"subsets": ["layer3", "layer4"]}}
    study = create_study(url, "s", plan_of(sampler="grid", entries=entries, early_stopping=False), None)
    assert study.trials == 9
    config = study.plan.config
    full = [config.with_overrides(overrides).model for _, overrides in [*run(study, 4), *run(open_study(url, "s"))]]
    assert len({(model.levels, model.tau) for model in full}) == 9
    assert full != sorted(full, key=lambda model: (model.tau, model.levels)), "a grid cut short would miss one side"


def test_more_trials_can_be_asked_for_when_a_search_goes_on(url: str) -> None:
    run(create_study(url, "s", plan_of(), 2))
    study = open_study(url, "s")
    with pytest.raises(UserError, match="--trials 1: 2 were drawn already"):
        study.set_trials(1)
    study.set_trials(5)
    assert [number for number, _ in run(open_study(url, "s"))] == [2, 3, 4]
    assert open_study(url, "s").trials == 5


def test_a_grid_has_no_more_trials_than_points(url: str) -> None:
    plan = plan_of(sampler="grid", entries={"model.tau": {"low": 0.1, "high": 0.9}})
    study = create_study(url, "s", plan, 100)
    assert study.trials == 3
    with pytest.raises(UserError, match="--trials 4: the grid has 3 points"):
        study.set_trials(4)


def test_failed_points_are_tried_again_once(url: str) -> None:
    study = create_study(url, "s", plan_of(sampler="random", early_stopping=False), 3)
    points = []
    for _ in range(2):
        number, overrides = drawn_of(study)
        points.append(overrides)
        study.fail(number, "OSError", "the disk is full")
    again = open_study(url, "s")
    assert again.retry_failed() == 2
    assert again.retry_failed() == 0
    assert again.trials == 5
    assert [overrides for _, overrides in run(again)][:2] == points
    assert states(again) == [TrialState.FAIL] * 2 + [TrialState.COMPLETE] * 3


def test_three_failures_of_a_kind_in_a_row_stop_the_search_with_the_cause(url: str) -> None:
    study = create_study(url, "s", plan_of(early_stopping=False), 20)
    beside = drawn_of(study)
    fates = ["OutOfMemoryError", "NonFiniteLossError", "OutOfMemoryError", "OutOfMemoryError"]
    fates += ["", *["OutOfMemoryError"] * 3]
    for fate in fates:
        assert study.stopped_because is None
        if fate:
            study.fail(drawn_of(study)[0], fate, f"{fate}: 5 GB")
        else:  # a trial that was running all the time
            study.record(beside[0], epoch_of(beside[1], 1))
    assert study.stopped_because is not None
    assert "3 trials in a row failed alike; the last one: OutOfMemoryError: 5 GB" in study.stopped_because
    assert "5 GB" in study.stopped_because
    assert study.next_trial() is None
    failed = study.frozen(TrialState.FAIL)
    assert [trial.user_attrs["failure"] for trial in failed] == [f"{fate}: 5 GB" for fate in fates if fate]
    assert open_study(url, "s").next_trial() is not None, "the cause may be mended"


def test_a_report_within_an_epoch_is_no_score(url: str) -> None:
    study = create_study(url, "s", plan_of(sampler="random"), 2)
    for number, score in ((0, 0.9), (1, 0.1)):
        assert study.next_trial() is not None
        assert not study.record(number, {"epoch": 1, "loss": 3.0})
        assert study.record(number, {"epoch": 1, "val/mAP": score}) == (number == 1)
    assert [len(epochs_of(trial.user_attrs)) for trial in study.frozen()] == [1, 1]


def test_a_failure_after_the_last_epoch_changes_nothing(url: str) -> None:
    study = create_study(url, "s", plan_of(), 1)
    run(study)
    study.fail(0, "ActorDiedError", "late")
    assert states(study) == [TrialState.COMPLETE]


def test_values_that_do_not_go_together_fail_the_trial_and_the_next_is_given_out(url: str) -> None:
    entries = {"optim.schedule": {"choices": ["cosine", "onecycle"]}, "optim.warmup_epochs": {"choices": [0, 1]}}
    base = plan_of().config.with_overrides({"optim.schedule": "cosine"})
    study = create_study(url, "s", plan_of(sampler="grid", entries=entries, config=base), None)
    given = []
    while (drawn := study.next_trial()) is not None:
        given.append(drawn[1])
    assert len(given) == 3
    (failed,) = study.frozen(TrialState.FAIL)
    assert failed.params == {"optim.schedule": "onecycle", "optim.warmup_epochs": 1}
    assert "optim.warmup_epochs must be 0" in failed.user_attrs["failure"]


@pytest.mark.parametrize("early_stopping", [True, False])
def test_a_score_that_is_no_number_is_a_failure(url: str, early_stopping: bool) -> None:
    study = create_study(url, "s", plan_of(early_stopping=early_stopping), 1)
    study.next_trial()
    assert study.record(0, {"epoch": 1, "val/mAP": math.nan})
    (trial,) = study.study.get_trials()
    assert trial.state == TrialState.FAIL
    assert "no image of val" in trial.user_attrs["failure"]
    assert study.best() is None


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
    best = study.best()
    assert best is not None
    assert best.number == 1


def test_the_best_trials_config_is_the_trial_itself_in_a_place_of_its_own(url: str) -> None:
    study = create_study(url, "s", plan_of(), 5)
    given = dict(run(study))
    best = study.best()
    assert best is not None
    assert quality(given[best.number]) == max(
        quality(given[trial.number]) for trial in study.frozen(TrialState.COMPLETE)
    )
    config = study.config_of(best)
    expected = study.plan.config.with_overrides(given[best.number] | {"train.storage": "runs", "train.run_name": None})
    assert config == expected


def test_another_data_set_is_refused_with_both(url: str) -> None:
    study = create_study(url, "s", plan_of(), 1)
    study.check_data("a" * 64, "the same, moved")
    with pytest.raises(
        UserError, match=r"study s .*scenes with 50 \+ 13 images \(aaaaaaaaaaaa\).*voc \(bbbbbbbbbbbb\)"
    ):
        study.check_data("b" * 64, "voc")


def test_a_name_that_is_taken_and_one_that_is_not_there(url: str) -> None:
    create_study(url, "s", plan_of(), 1)
    with pytest.raises(UserError, match="has a study s already"):
        create_study(url, "s", plan_of(), 1)
    with pytest.raises(UserError, match="has no study t"):
        open_study(url, "t")


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("sqlite:////proc/nowhere/study.db", r"cannot be used \(unable to open database file"),
        ("nonsense", r"cannot be used"),
        ("postgresql+nodriver://me:secret@host/db", r"cannot be used"),
        ("mysql://me:secret@host/db", r"database driver"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named_without_its_password(storage: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        create_study(storage, "s", plan_of(), 1)
    assert "--study-storage" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
