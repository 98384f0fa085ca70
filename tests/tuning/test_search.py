"""The search around its study: room on a cluster, error messages, results, and a real search that is killed and resumed."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import ray.exceptions
import ray.train
import torch
import yaml
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from rich.console import Console

from msrn_ray.cli.app import _parse
from msrn_ray.config import ResourceSettings, load_config
from msrn_ray.errors import NonFiniteLossError, UserError
from msrn_ray.presets import PRESETS
from msrn_ray.ray_cluster.allocation import Allocation, own_machine_runs, share
from msrn_ray.ray_cluster.private_api import WorkerHealthCheckFailedError, train_storage
from msrn_ray.ray_train.failures import describe_failure
from msrn_ray.runs.checkpoint import find_model_file
from msrn_ray.runs.log import METRICS_FILE
from tests.tuning.test_study import plan_of, quality, run
from tuning.driver import search
from tuning.live_table import SearchView, study_table, trial_line
from tuning.mlflow_logger import open_mlflow
from tuning.options import Search
from tuning.report import cost, level_rows, page, write_results
from tuning.study import SearchStudy
from tuning.study_actor import DeskClient
from tuning.study_storage import create_study
from tuning.trial import StoppedEarlyError
from tuning.trial_callback import TrialReports
from tuning.tune_adapters import SearchProgress, SearchStopper, StudySearcher

ROOT = Path(__file__).resolve().parents[2]


def nodes(*machines: tuple[int, int]) -> list[dict[str, Any]]:
    """As `ray.nodes()` gives machines of so many CPUs and GPUs."""
    return [
        {"Alive": True, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}
        for cpus, gpus in machines
    ]


@pytest.mark.parametrize(
    ("cpus", "gpus", "allocation", "asked", "expected"),
    [
        (4, 0, Allocation(1, False, 1), None, 2),
        (4, 0, Allocation(1, False, 1), 1, 1),
        (16, 0, Allocation(2, False, 1), None, 5),
        (16, 0, Allocation(2, False, 3), 2, 2),
        (36, 4, Allocation(1, True, 1), None, 4),
        (36, 4, Allocation(2, True, 1), None, 2),
        (36, 2, Allocation(1, True, 1, gpus_per_worker=0.3), None, 6),
        (9, 8, Allocation(1, True, 1), None, 4),
        (4, 2, Allocation(1, True, 1, gpus_per_worker=0.5), 2, 2),
    ],
)
def test_trials_at_a_time(cpus: int, gpus: int, allocation: Allocation, asked: int | None, expected: int) -> None:
    shared = share(allocation, asked, nodes((cpus, gpus)))
    assert shared == replace(allocation, runs=expected)
    assert expected * (allocation.num_workers * allocation.cpus_per_worker + 1) <= cpus, "each can decode"
    assert not allocation.use_gpu or expected * allocation.num_workers * allocation.gpus_per_worker <= gpus


@pytest.mark.parametrize(
    ("cores", "gpus", "settings", "expected"),
    [
        (2, 0, {"num_workers": 1}, 2),
        (2, 0, {"num_workers": 2}, 1),
        (1, 0, {"num_workers": 2}, 1),
        (16, 0, {"num_workers": 2, "cpus_per_worker": 3}, 2),
        (16, 2, {"num_workers": 1}, 2),
        (16, 2, {"num_workers": 1, "gpus_per_worker": 0.1}, 16),
        (16, 2, {"num_workers": 1, "use_gpu": False}, 16),
    ],
)
def test_trials_at_a_time_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, settings: dict[str, Any], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert own_machine_runs(ResourceSettings(**settings)) == expected


def test_no_room_says_what_a_trial_takes_and_what_there_is() -> None:
    with pytest.raises(UserError, match=r"--max-concurrent 3 .*2 CPUs for workers, 1 for decoding.* 8 CPUs.*for 2"):
        share(Allocation(2, False, 1), 3, nodes((8, 0)))
    with pytest.raises(UserError, match=r"--max-concurrent 3 .*1 GPUs; the cluster has 64 CPUs and 2 GPUs"):
        share(Allocation(1, True, 1), 3, nodes((64, 2)))


@pytest.mark.parametrize(
    ("machines", "allocation", "expected"),
    [
        ([(8, 0)] * 4, Allocation(1, False, 5), 4),  # three CPUs of each are left over
        ([(8, 0)] * 4, Allocation(2, False, 4), 3),
        ([(2, 0), (8, 2)], Allocation(1, True, 1, gpus_per_worker=0.4), 4),  # two shares a GPU
        ([(8, 2)], Allocation(1, True, 1, gpus_per_worker=0.6), 2),
        ([(64, 0), (4, 1), (4, 1)], Allocation(2, True, 2), 1),
    ],
)
def test_no_worker_goes_over_two_machines_or_gpus(
    machines: list[tuple[int, int]], allocation: Allocation, expected: int
) -> None:
    assert share(allocation, None, nodes(*machines)).runs == expected
    gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    assert share(allocation, None, [*nodes(*machines), gone]).runs == expected
    wide = replace(allocation, cpus_per_worker=65)
    with pytest.raises(UserError, match="enough for 0"):
        share(wide, None, nodes(*machines))


def test_mlflow_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package mlflow; install it with: pip install 'msrn-ray\[mlflow\]'"):
        open_mlflow("http://127.0.0.1:5000", "my-search")


def parse(*argv: str) -> Search:
    command = _parse(["search", *argv])
    assert isinstance(command, Search)
    return command


def test_the_default_search_is_small_and_one_of_a_preset_is_the_preset() -> None:
    small = parse().experiment
    assert (small.data.image_size, small.train.epochs, small.resources.num_workers) == (64, 5, 1)
    assert parse("--train.epochs", "6").experiment.train.epochs == 6
    coco = parse("coco2014", "--data.root", "x").experiment
    assert coco == PRESETS["coco2014"].config.with_overrides({"data.root": "x", "resources.num_workers": 1})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("coco2014",), r"data\.root is needed"),
        (("--trials", "0"), "--trials 0: must be at least 1"),
        (("--max-concurrent", "0"), "--max-concurrent 0"),
        (("--time-budget", "0"), "--time-budget 0: must be more than 0 minutes"),
        (("--resources.num-workers", "1..2"), r"num-workers 1\.\.2: .*give a number"),
        (("--protocol", "paper"), "published test split; search with honest"),
        (("scenes", "--objectives", "val/mAP", "val/mAP"), "--objectives: name at least one, each once"),
        (("--space", "nowhere.yaml"), r"--space nowhere\.yaml: cannot be read"),
        (
            ("--study-storage", "sqlite:////nowhere/study.db"),
            "--study-storage sqlite:.*: cannot be used .*unable to open",
        ),
    ],
)
def test_what_a_user_can_get_wrong_is_said_before_anything_is_written(
    tmp_path: Path, argv: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        search(parse(*argv, "--train.storage", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_the_script_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tuning" / "search.py"), "coco2014", "--train.storage", str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 2
    assert result.stderr.startswith("msrn: error: data.root is needed")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_taken_or_holds_no_study(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine exists already; .*--resume"):
        search(parse("--train.storage", str(tmp_path), "--train.run-name", "mine"))
    with pytest.raises(UserError, match="not a run folder"):
        parse("--resume", str(tmp_path / "mine"))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchStudy, Path]:
    """Nine trials without Ray, one of which failed."""
    folder = tmp_path_factory.mktemp("searched")
    study = create_study(f"sqlite:///{folder}/study.db", "searched", plan_of(sampler="random"), 9)
    run(study, 4)
    drawn = study.next_trial()
    assert drawn is not None
    study.fail(drawn[0], "OutOfMemoryError", "<b>5 GB</b>")
    run(study)
    return study, folder


def test_the_results_are_the_studys(searched: tuple[SearchStudy, Path]) -> None:
    study, folder = searched
    out = StringIO()
    write_results(study, folder, Console(file=out, soft_wrap=True, highlight=False))
    best = study.best()
    assert best is not None
    assert f"msrn train --config {folder / 'best_config.yaml'}" in out.getvalue()
    assert load_config(folder / "best_config.yaml") == study.config_of(best)

    table = pq.read_table(folder / "trials.parquet")
    assert sorted(table["trial"].to_pylist()) == list(range(9))
    assert table["trial"][0].as_py() == best.number
    scores = [score for score in table["val/mAP"].to_pylist() if score is not None]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 8
    for row in table.to_pylist():
        trial = study.study.get_trials()[row["trial"]]
        assert row["model.tau"] == trial.params["model.tau"]
        assert row["loss.clip"] == trial.params.get("loss.clip")
        assert row["model.levels"] == trial.params["model.levels"]
        assert row["failure"] == ("<b>5 GB</b>" if trial.state == TrialState.FAIL else None)
    assert pyarrow.csv.read_csv(folder / "trials.csv").num_rows == 9
    assert pa.types.is_floating(table.schema.field("optim.lr").type)


def test_levels_and_cost_by_hand(searched: tuple[SearchStudy, Path]) -> None:
    study, _ = searched
    reached: dict[str, list[float]] = {}
    epochs = 0
    for trial in study.study.get_trials():
        own = [values["val/mAP"] for name, values in trial.user_attrs.items() if name.startswith("epoch ")]
        epochs += len(own)
        if own:
            reached.setdefault(trial.params["model.levels"], []).append(max(own))
    assert {row.levels: (row.trials, row.best) for row in level_rows(study)} == {
        levels: (len(scores), max(scores)) for levels, scores in reached.items()
    }
    assert cost(study) == (epochs, 8 * study.epochs)
    assert epochs < 8 * study.epochs


def test_the_page_stands_alone_and_runs_nothing(searched: tuple[SearchStudy, Path]) -> None:
    study, _ = searched
    text = page(study)
    assert "&lt;b&gt;5 GB&lt;/b&gt;" in text
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    for title in ("History", "What matters", "tau x learning rate", "All trials at once", "by levels", "All trials<"):
        assert title in text
    assert text.count("data:image/svg+xml;base64,") == 4


def test_a_page_of_one_trial_says_what_it_lacks(tmp_path: Path) -> None:
    study = create_study(f"sqlite:///{tmp_path}/study.db", "s", plan_of(), 1)
    run(study)
    assert "It needs at least 4 trials" in page(study)


def test_a_search_for_two_objectives_shows_the_front(tmp_path: Path) -> None:
    objectives = ("val/mAP", "train/images_per_second")
    study = create_study(f"sqlite:///{tmp_path}/study.db", "s", plan_of(objectives=objectives), 4)
    run(study)
    assert "Both objectives" in page(study)


def test_the_table_and_the_lines_show_each_trial(searched: tuple[SearchStudy, Path]) -> None:
    study, _ = searched
    out = StringIO()
    Console(file=out, width=160).print(study_table(study))
    lines = [line for line in out.getvalue().splitlines() if re.match(r"│ \d", line)]
    assert len(lines) == 9
    failed = next(line for line in lines if "failed: <b>5 GB</b>" in line)
    assert "0/3" in failed
    best = study.best()
    assert best is not None
    assert lines[0].startswith(f"│ {best.number} ")
    line = trial_line(study, best)
    assert (
        f"trial {best.number}  done  epoch 3/3  val/mAP {quality(study.space.overrides(best.params)) / 3:.4f}" in line
    )
    assert "90 img/s" in line
    assert f"best so far {quality(study.space.overrides(best.params)) / 3:.4f}" in line
    out = StringIO()
    view = SearchView(study, Console(file=out))
    for _ in range(2):
        view.update(4)
    assert out.getvalue().count("trial 4  failed") == 1


def test_a_long_table_keeps_what_is_running(tmp_path: Path) -> None:
    study = create_study(f"sqlite:///{tmp_path}/study.db", "s", plan_of(sampler="random", early_stopping=False), 9)
    run(study, 5)
    for _ in range(2):
        study.next_trial()
    table = study_table(study, rows=4)
    assert list(table.columns[0].cells)[2:] == ["5", "6"]
    assert table.row_count == 4


def failed_trial(point: dict[str, Any], error: Exception, folder: Path) -> Trial:
    """A trial of Tune's that has just failed: as it was written, before it is copied to the storage."""
    trial = Trial("run_trial", stub=True, config=point, storage=train_storage.StorageContext(str(folder), "tune"))
    trial.init_local_path()
    trial.handle_error(error)
    return trial


class LocalDesk(DeskClient):
    """A desk in this process."""

    def __init__(self, study: SearchStudy) -> None:
        super().__init__(SimpleNamespace())
        for name in ("next_trial", "record", "fail"):
            setattr(self._actor, name, getattr(study, name))
        self._actor.stopped_because = lambda: study.stopped_because

    @staticmethod
    def _ask(method: Any, *arguments: Any) -> Any:
        return method(*arguments)


def test_tune_gets_its_trials_from_the_study_and_tells_it_of_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_storage, "_get_ray_train_session_dir", lambda: str(tmp_path / "session"))
    study = create_study(f"sqlite:///{tmp_path}/study.db", "s", plan_of(sampler="random"), 5)
    desk, stopper = LocalDesk(study), SearchStopper(None)
    searcher = StudySearcher(desk)
    progress = SearchProgress(desk, SearchView(study, Console(file=StringIO())), stopper)
    for number in range(3):
        assert not stopper.stop_all()
        point = searcher.suggest("id")
        assert isinstance(point, dict)
        assert point["number"] == number
        error = wrapped(NonFiniteLossError(f"the loss is not finite at step {number}"))
        progress.on_trial_error(1, [], failed_trial(point, error, tmp_path))
    assert [trial.user_attrs["failure"] for trial in study.frozen(TrialState.FAIL)] == [
        f"NonFiniteLossError: the loss is not finite at step {number}" for number in range(3)
    ]
    assert stopper.stop_all()
    assert searcher.suggest("id") == "FINISHED"


def test_a_trial_ends_itself_where_the_study_says_so(tmp_path: Path) -> None:
    study = create_study(f"sqlite:///{tmp_path}/study.db", "s", plan_of(sampler="random"), 2)
    for number, score in ((0, 0.9), (1, 0.1)):
        study.next_trial()
        told: list[Any] = []
        tune = SimpleNamespace(after_report=lambda run, metrics, checkpoint, told=told: told.append(metrics[0]))
        reports = TrialReports(LocalDesk(study), number, tune)
        reports.after_report(None, [{"epoch": 1, "loss": 1.0}], None)
        with pytest.raises(StoppedEarlyError) if number else nullcontext():
            reports.after_report(None, [{"epoch": 1, "val/mAP": score}, {"val/mAP": 1.0}], None)
        assert told == [{"epoch": 1, "val/mAP": score}], "Tune hears of the epoch that ends a trial too"
    assert [trial.state for trial in study.study.get_trials()] == [TrialState.RUNNING, TrialState.PRUNED]


def test_the_search_stops_when_its_time_is_up() -> None:
    assert not SearchStopper(None).stop_all()
    assert not SearchStopper(1000).stop_all()
    assert SearchStopper(0).stop_all()


def wrapped(cause: Exception) -> Exception:
    """As Ray hands on what a worker's function raised."""
    return ray.exceptions.RayTaskError("run_trial", f"Traceback ...\n{type(cause).__name__}: {cause}", cause)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (NonFiniteLossError("not finite at step 4"), "NonFiniteLossError", "NonFiniteLossError: not finite at step 4"),
        (wrapped(MemoryError("12 GB")), "OutOfMemoryError", "OutOfMemoryError: 12 GB"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 8 GB"),
            "OutOfMemoryError",
            "DefaultCPUAllocator: can't allocate memory: 8 GB",
        ),
        (
            UserError("rank 1 hangs for 12 min"),
            "UserError: rank 0 hangs for 0 min",
            "UserError: rank 1 hangs for 12 min",
        ),
        (
            wrapped(
                ray.train.WorkerGroupError(
                    "2 of 2 failed",
                    {
                        0: RuntimeError("Connection closed by peer"),
                        1: WorkerHealthCheckFailedError("lost", ray.exceptions.WorkerCrashedError()),
                    },
                )
            ),
            "WorkerCrashedError",
            "The worker died unexpectedly",
        ),
        (ray.exceptions.OutOfMemoryError("killed"), "OutOfMemoryError", "killed"),
        (RuntimeError(""), "RuntimeError: ", "RuntimeError"),
        (
            wrapped(ray.train.WorkerGroupError("2 of 2 failed", {1: ray.exceptions.NodeDiedError("the node is lost")})),
            "NodeDiedError",
            "the node is lost",
        ),
        (ray.train.ControllerError(KeyError("no rendezvous")), "KeyError", "KeyError: 'no rendezvous'"),
    ],
)
def test_a_failure_is_told_by_its_cause(error: BaseException, kind: str, reason: str) -> None:
    assert describe_failure(error)[0] == kind
    assert reason in describe_failure(error)[1]
    assert "\n" not in describe_failure(error)[1]


def start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`msrn search` as a process of its own; its output goes to a file."""
    command = [sys.executable, "-m", "msrn_ray", "search", *arguments]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials of a search that is running, none before Tune has begun: whoever opens a study that is being made makes it too."""
    if not list(folder.glob("tune-*")):
        return []
    return optuna.load_study(storage=f"sqlite:///{folder / 'study.db'}", study_name=folder.name).get_trials()


@pytest.mark.ray
@pytest.mark.faults
def test_a_search_that_is_killed_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    from msrn_ray.datasets.scenes.generate import generate_scenes

    root = generate_scenes(tmp_path / "scenes", num_train=32, num_val=8, num_test=4)
    # the generator's own parameters differ from the preset's, so the same images are read as a COCO data set
    fixed = {"data.root": str(root), "data.dataset": "coco", "data.image_size": 64, "model.embed_dim": 16}
    fixed |= {"model.compile": "off", "train.epochs": 2, "resources.num_workers": 1}
    PRESETS["scenes"].config.with_overrides(fixed).save(tmp_path / "experiment.yaml")
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"model.tau": {"low": 0.05, "high": 0.9}, "optim.lr": {"times": [0.1, 10]}}))
    folder, log = tmp_path / "mine", tmp_path / "log"
    first = start(
        log,
        *("--config", str(tmp_path / "experiment.yaml"), "--train.storage", str(tmp_path), "--train.run-name", "mine"),
        *("--space", str(space), "--trials", "2", "--max-concurrent", "1", "--no-early-stopping"),
    )
    while not (len(before := trials_of(folder)) > 1 and "epoch 0001" in before[1].user_attrs):
        assert first.poll() is None, log.read_text()
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = trials_of(folder)
    assert [trial.state for trial in before] == [TrialState.COMPLETE, TrialState.RUNNING]
    assert "epoch 0002" not in before[1].user_attrs

    assert start(log, "--resume", str(folder)).wait(240) == 0, log.read_text()
    after = trials_of(folder)
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * 2
    assert after[0] == before[0]
    assert (after[1].params, after[1].datetime_start) == (before[1].params, before[1].datetime_start)
    assert after[1].user_attrs["epoch 0001"] == before[1].user_attrs["epoch 0001"]
    told = {}  # trial -> epochs that the second process heard of
    (_, again) = sorted(folder.glob("tune-*"))
    for results in again.glob("*/result.json"):
        assert '"test/' not in results.read_text(), "test is no trial's business"
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        told[lines[0]["config"]["number"]] = [line["epoch"] for line in lines]
    assert set(told) == {1}
    assert told[1][0] == 2, "it went on from its checkpoint"
    best = max(after, key=lambda trial: trial.value or 0.0)
    assert load_config(folder / "best_config.yaml").model.tau == best.params["model.tau"]
    assert f"best val/mAP {best.value:.4f} (trial {best.number})" in log.read_text()
    assert (folder / "report.html").stat().st_size > 10_000
    assert list(again.glob("*/events.out.tfevents*")), "TensorBoard reads the trials"
    with (folder / ".driver").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being searched by another process"):
            search(parse("--resume", str(folder)))
    trial_folder = folder / "trial_0001"
    assert load_config(trial_folder / "config.yaml").model.tau == after[1].params["model.tau"]
    assert find_model_file(trial_folder).parent.parent == trial_folder, "a trial is a run that can be used"
    assert [line["epoch"] for line in map(json.loads, (trial_folder / METRICS_FILE).read_text().splitlines())] == [1, 2]
    with pytest.raises(UserError, match=r"a search goes on as it was \(optim\.lr was 0\.0005, now 0\.1\)"):
        search(parse("--resume", str(folder), "--optim.lr", "0.1"))
    with pytest.raises(UserError, match=r"goes on as it was \(--sampler\)"):
        search(parse("--resume", str(folder), "--sampler", "random"))
