"""The results of a search: files, page, table and lines."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from optuna.trial import TrialState
from rich.console import Console

from msrn_ray.config import load_config
from tests.tuning.studies import next_point, plan_of, quality, run
from tuning.live_table import LiveTable, study_table, trial_line
from tuning.report import cost, level_rows, page, write_results
from tuning.study import SearchStudy
from tuning.study_storage import create_study


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchStudy, Path]:
    """Nine trials without Ray, one of which failed."""
    folder = tmp_path_factory.mktemp("searched")
    study = create_study(f"sqlite:///{folder}/study.db", "searched", plan_of(sampler="random"), 9)
    run(study, 4)
    study.fail(next_point(study).number, "OutOfMemoryError", "<b>5 GB</b>")
    run(study)
    return study, folder


def test_result_files_hold_the_study(searched: tuple[SearchStudy, Path]) -> None:
    study, folder = searched
    out = StringIO()
    write_results(study, folder, Console(file=out, soft_wrap=True, highlight=False))
    best = study.best_trial()
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
        scores = [values["val/mAP"] for name, values in trial.user_attrs.items() if name.startswith("epoch ")]
        epochs += len(scores)
        if scores:
            reached.setdefault(trial.params["model.levels"], []).append(max(scores))
    assert {row.levels: (row.trials, row.best) for row in level_rows(study)} == {
        levels: (len(scores), max(scores)) for levels, scores in reached.items()
    }
    assert cost(study) == (epochs, 8 * study.epochs)
    assert epochs < 8 * study.epochs


def test_page_needs_no_file_and_runs_nothing(searched: tuple[SearchStudy, Path]) -> None:
    study, _ = searched
    text = page(study)
    assert "&lt;b&gt;5 GB&lt;/b&gt;" in text
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    for title in ("History", "What matters", "tau x learning rate", "All trials at once", "by levels", "All trials<"):
        assert title in text
    assert text.count("data:image/svg+xml;base64,") == 4


def test_page_of_one_trial_says_what_it_lacks(url: str) -> None:
    study = create_study(url, "s", plan_of(), 1)
    run(study)
    assert "It needs at least 4 trials" in page(study)


def test_page_of_two_objectives_shows_the_front(url: str) -> None:
    objectives = ("val/mAP", "train/images_per_second")
    study = create_study(url, "s", plan_of(objectives=objectives), 4)
    run(study)
    assert "Both objectives" in page(study)


def test_table_and_lines_show_every_trial(searched: tuple[SearchStudy, Path]) -> None:
    study, _ = searched
    out = StringIO()
    Console(file=out, width=160).print(study_table(study))
    lines = [line for line in out.getvalue().splitlines() if re.match(r"│ \d", line)]
    assert len(lines) == 9
    failed = next(line for line in lines if "failed: <b>5 GB</b>" in line)
    assert "0/3" in failed
    best = study.best_trial()
    assert best is not None
    assert lines[0].startswith(f"│ {best.number} ")
    line = trial_line(study, best)
    score = f"{quality(study.space.overrides(best.params)) / 3:.4f}"
    assert f"trial {best.number}  done  epoch 3/3  val/mAP {score}" in line
    assert "90 img/s" in line
    assert f"best so far {score}" in line
    out = StringIO()
    table = LiveTable(study, Console(file=out))
    for _ in range(2):
        table.update(4)
    assert out.getvalue().count("trial 4  failed") == 1


def test_shortened_table_keeps_the_running_trials(url: str) -> None:
    study = create_study(url, "s", plan_of(sampler="random", early_stopping=False), 9)
    run(study, 5)
    for _ in range(2):
        study.next_trial()
    table = study_table(study, rows=4)
    assert list(table.columns[0].cells)[2:] == ["5", "6"]
    assert table.row_count == 4
