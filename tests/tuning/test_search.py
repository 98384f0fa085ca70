"""`msrn search`: its options and errors, and a real search that is killed and resumed."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from msrn_ray.cli.app import COMMANDS
from msrn_ray.cli.parser import parse
from msrn_ray.cli.search import Search
from msrn_ray.config import load_config
from msrn_ray.errors import UserError
from msrn_ray.presets import PRESETS
from msrn_ray.runs.checkpoint import find_model_file
from msrn_ray.runs.log import METRICS_FILE
from msrn_ray.runs.resume import SEARCH_FILES
from tuning.driver import search
from tuning.mlflow_logger import open_mlflow
from tuning.search_folder import STUDY_FILE

ROOT = Path(__file__).resolve().parents[2]


def parse_search(*argv: str) -> Search:
    command = parse(COMMANDS, ["search", *argv])
    assert isinstance(command, Search)
    return command


def test_default_search_is_small_and_presets_are_unchanged() -> None:
    small = parse_search().experiment
    assert (small.data.image_size, small.train.epochs, small.resources.num_workers) == (64, 5, 1)
    assert parse_search("--train.epochs", "6").experiment.train.epochs == 6
    coco = parse_search("coco2014", "--data.root", "x").experiment
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
def test_user_errors_come_before_anything_is_written(tmp_path: Path, argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        search(parse_search(*argv, "--train.storage", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_missing_mlflow_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package mlflow; install it with: pip install 'msrn-ray\[mlflow\]'"):
        open_mlflow("http://127.0.0.1:5000", "my-search")


def test_script_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tuning" / "search.py"), "coco2014", "--train.storage", str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 2
    assert result.stderr.startswith("msrn: error: data.root is needed")
    assert not list(tmp_path.iterdir())


def test_commands_of_the_readme_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    # runs and configs that the README only names are replaced by a preset
    monkeypatch.setattr("msrn_ray.cli.parser.starting_config", lambda argv: PRESETS["scenes"].config)
    readme = (ROOT / "tuning" / "README.md").read_text(encoding="utf-8")
    commands = [line.split("  #")[0] for line in re.findall(r"^ *`?(msrn [^`\n]+)", readme, re.M)]
    commands += re.findall(r"`(msrn [^`\n]+)`", readme)
    assert sum(command.startswith("msrn search") for command in commands) > 3
    for command in commands:
        parse(COMMANDS, shlex.split(command)[1:])


def test_taken_folder_and_folder_without_study_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine exists already; .*--resume"):
        search(parse_search("--train.storage", str(tmp_path), "--train.run-name", "mine"))
    with pytest.raises(UserError, match="not a run folder"):
        parse_search("--resume", str(tmp_path / "mine"))


def start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start `msrn search` as a process; its output goes to a file."""
    command = [sys.executable, "-m", "msrn_ray", "search", *arguments]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """Return the trials of a running search, none before Tune has started: opening a study that is being created creates it too."""
    if not list(folder.glob("tune-*")):
        return []
    return optuna.load_study(storage=f"sqlite:///{folder / 'study.db'}", study_name=folder.name).get_trials()


def test_training_refuses_the_folder_of_a_search() -> None:
    assert STUDY_FILE in SEARCH_FILES


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.timeout(
    900
)  # two searches, each with its own start of Ray: 200 s on two cores that other tests use as well
def test_killed_search_resumes_and_repeats_nothing(tmp_path: Path) -> None:
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

    resumed = start(log, "--resume", str(folder))
    deadline = time.monotonic() + 400
    while resumed.poll() is None:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(1)
    assert resumed.returncode == 0, log.read_text()
    after = trials_of(folder)
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * 2
    assert after[0] == before[0]
    assert (after[1].params, after[1].datetime_start) == (before[1].params, before[1].datetime_start)
    assert after[1].user_attrs["epoch 0001"] == before[1].user_attrs["epoch 0001"]
    reported = {}  # trial -> epochs that the second process got
    (_, again) = sorted(folder.glob("tune-*"))
    for results in again.glob("*/result.json"):
        assert '"test/' not in results.read_text(), "trials never score test"
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        reported[lines[0]["config"]["number"]] = [line["epoch"] for line in lines]
    assert set(reported) == {1}
    assert reported[1][0] == 2, "it resumed from its checkpoint"
    best = max(after, key=lambda trial: trial.value or 0.0)
    assert load_config(folder / "best_config.yaml").model.tau == best.params["model.tau"]
    assert f"best val/mAP {best.value:.4f} (trial {best.number})" in log.read_text()
    assert (folder / "report.html").stat().st_size > 10_000
    assert list(again.glob("*/events.out.tfevents*")), "TensorBoard reads the trials"
    with (folder / ".driver").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being searched by another process"):
            search(parse_search("--resume", str(folder)))
    trial_folder = folder / "trial_0001"
    assert load_config(trial_folder / "config.yaml").model.tau == after[1].params["model.tau"]
    assert find_model_file(trial_folder).parent.parent == trial_folder, "a trial is a run that can be used"
    assert [line["epoch"] for line in map(json.loads, (trial_folder / METRICS_FILE).read_text().splitlines())] == [1, 2]
    with pytest.raises(UserError, match=r"a resumed search keeps its settings \(optim\.lr was 0\.0005, now 0\.1\)"):
        search(parse_search("--resume", str(folder), "--optim.lr", "0.1"))
    with pytest.raises(UserError, match=r"keeps its settings \(--sampler\)"):
        search(parse_search("--resume", str(folder), "--sampler", "random"))
