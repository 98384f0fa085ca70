"""A study that is opened again, after a kill at any point; and storages that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from msrn_ray.errors import UserError
from tests.tuning.studies import EPOCHS, epoch_of, next_point, plan_of, run, states
from tuning.options import SearchOptions
from tuning.search_folder import SearchFolder, reopen_study
from tuning.study import SearchStudy, epochs_of
from tuning.study_storage import create_study, open_study
from tuning.trial_point import TrialPoint


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[TrialPoint]:
    """The trials of a search of 7, of which 3 are drawn at random."""
    return run(create_study(f"sqlite:///{tmp_path_factory.mktemp('study')}/study.db", "s", plan_of(), 7))


@pytest.mark.parametrize("ended", [0, 2, 5])
def test_kill_between_trials_changes_no_draw(url: str, undisturbed: list[TrialPoint], ended: int) -> None:
    first = run(create_study(url, "s", plan_of(), 7), ended)
    assert first + run(open_study(url, "s")) == undisturbed
    points = {str(point.overrides) for point in undisturbed}
    assert len(points) == 7, "a sampler seeded anew at each start would repeat its first points"


def test_unfinished_trials_resume_and_ended_ones_do_not(url: str) -> None:
    study = create_study(url, "s", plan_of(early_stopping=False), 6)
    run(study, 2)
    third, fourth = next_point(study), next_point(study)
    for epoch in (1, 2):
        study.record(third.number, epoch_of(third.overrides, epoch))
    params = [trial.params for trial in study.study.get_trials()]

    again = open_study(url, "s")
    assert again.num_unfinished == 4
    assert again.next_trial() == third
    assert again.next_trial() == fourth
    for point in (third, fourth):
        # epoch 2 comes a second time: the kill was after its report and before the next checkpoint
        for epoch in range(2 if point.number == third.number else 1, EPOCHS + 1):
            assert not again.record(point.number, epoch_of(point.overrides, epoch))
    assert [point.number for point in run(again)] == [4, 5]
    assert states(again) == [TrialState.COMPLETE] * 6
    assert [trial.params for trial in again.study.get_trials()][:4] == params
    assert all(len(epochs_of(trial.user_attrs)) == EPOCHS for trial in again.drawn_trials())
    assert open_study(url, "s").next_trial() is None


class Killed(BaseException):
    """Stands for SIGKILL."""


# those that Optuna's cache calls
WRITES = (
    *("_create_new_trial", "_set_trial_param", "set_trial_state_values", "set_trial_user_attr"),
    *("set_trial_intermediate_value", "set_trial_system_attr"),
)


def run_killed(study: SearchStudy, write: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a study until its write number `write`, which does not happen; return whether it came to that."""
    real: dict[str, Callable[..., Any]] = {name: getattr(RDBStorage, name) for name in WRITES}
    left = write

    def count(name: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real[name](*arguments, **named)

        return counted

    with monkeypatch.context() as patch:
        for name in WRITES:
            patch.setattr(RDBStorage, name, count(name))
        try:
            run(study)
        except Killed:
            return True
    return False


def test_kill_at_any_write_loses_and_repeats_nothing(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends at the n-th write to the storage, for each n; the search is then opened and run to its end."""
    straight = run(create_study(url, "s", plan_of(), 3))
    killed = True
    write = 0
    while killed:
        killed_url = f"sqlite:///{tmp_path}/killed{write}.db"
        create_study(killed_url, "s", plan_of(), 3)
        killed = run_killed(open_study(killed_url, "s"), write, monkeypatch)
        resumed = open_study(killed_url, "s")
        run(resumed)
        trials = resumed.study.get_trials()
        assert [trial.number for trial in trials] == [0, 1, 2]
        assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
        assert [resumed.space.overrides(trial.params) for trial in trials] == [point.overrides for point in straight]
        write += 2  # every other write, so that the test stays short
    assert write > 16


def test_grid_runs_once_across_a_restart(url: str) -> None:
    entries = {"model.tau": {"low": 0.1, "high": 0.9}, "model.levels": {"subsets": ["layer3", "layer4"]}}
    study = create_study(url, "s", plan_of(sampler="grid", entries=entries, early_stopping=False), None)
    assert study.num_trials == 9
    config = study.plan.config
    points = [*run(study, 4), *run(open_study(url, "s"))]
    models = [config.with_overrides(point.overrides).model for point in points]
    assert len({(model.levels, model.tau) for model in models}) == 9
    ordered = sorted(models, key=lambda model: (model.tau, model.levels))
    assert models != ordered, "a shortened grid would miss one side"


def test_resumed_search_takes_more_trials(url: str) -> None:
    run(create_study(url, "s", plan_of(), 2))
    study = open_study(url, "s")
    with pytest.raises(UserError, match="--trials 1: 2 were drawn already"):
        study.set_num_trials(1)
    study.set_num_trials(5)
    assert [point.number for point in run(open_study(url, "s"))] == [2, 3, 4]
    assert open_study(url, "s").num_trials == 5


def test_failed_points_run_again_once(url: str) -> None:
    study = create_study(url, "s", plan_of(sampler="random", early_stopping=False), 3)
    overrides = []
    for _ in range(2):
        point = next_point(study)
        overrides.append(point.overrides)
        study.fail(point.number, "OSError", "the disk is full")
    again = open_study(url, "s")
    assert again.retry_failed() == 2
    assert again.retry_failed() == 0
    assert again.num_trials == 5
    assert [point.overrides for point in run(again)][:2] == overrides
    assert states(again) == [TrialState.FAIL] * 2 + [TrialState.COMPLETE] * 3


def test_taken_and_unknown_names_are_refused(url: str) -> None:
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
def test_unusable_storage_is_named_without_its_password(storage: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        create_study(storage, "s", plan_of(), 1)
    assert "--study-storage" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resumed_search_keeps_its_epochs(tmp_path: Path) -> None:
    """A run may grow when it is resumed, but trials of different lengths do not compare."""
    url, plan = f"sqlite:///{tmp_path}/study.db", plan_of()
    create_study(url, tmp_path.name, plan, 2)
    folder, options = SearchFolder(tmp_path, url, ""), SearchOptions(resume=tmp_path)
    assert reopen_study(folder, options, plan.config).num_trials == 2
    with pytest.raises(UserError, match=r"keeps its settings \(train\.epochs was 3, now 9\)"):
        reopen_study(folder, options, plan.config.with_overrides({"train.epochs": 9}))
