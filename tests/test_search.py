"""The search: its space, its trials' configs, its error messages, and two real trials through Tune."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from msrn_ray.config import LEVELS, load_config
from msrn_ray.errors import UserError
from msrn_ray.presets import PRESETS
from tuning.search import LEVEL_SUBSETS, _report, apply, suggest

ROOT = Path(__file__).resolve().parents[1]


def test_every_non_empty_subset_of_levels_is_in_the_space_once() -> None:
    subsets = {frozenset(subset.split(",")) for subset in LEVEL_SUBSETS}
    assert len(subsets) == len(LEVEL_SUBSETS) == 15
    assert set().union(*subsets) == set(LEVELS)


def test_a_sample_of_the_space_is_a_config() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        suggest(trial)
        config = apply(PRESETS["scenes"].config, dict(trial.params))
        assert ",".join(config.model.levels) == trial.params["model.levels"]
        assert config.model.tau == trial.params["model.tau"]
        assert config.optim.lr == trial.params["optim.lr"]


def test_the_best_trial_is_saved_at_the_presets_full_length(tmp_path: Path) -> None:
    def result(score: float, tau: float) -> SimpleNamespace:
        params = {"model.levels": "layer4", "model.tau": tau, "optim.lr": 1e-3, "optim.backbone_lr_factor": 0.5}
        return SimpleNamespace(error=None, metrics={"val/mAP": score}, config=params)

    failed = SimpleNamespace(error=RuntimeError("lost"), metrics=None, config={})
    start = PRESETS["scenes"].config
    path = _report([result(0.2, 0.1), failed, result(0.9, 0.3), result(0.5, 0.6)], start, tmp_path)
    config = load_config(path)
    assert config.model.tau == 0.3
    assert config.model.levels == ("layer4",)
    assert config.train == start.train
    with pytest.raises(UserError, match="none of the 1 trials finished"):
        _report([failed], start, tmp_path)


def search(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tuning" / "search.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def test_a_missing_data_root_is_one_line(tmp_path: Path) -> None:
    result = search("coco2014", "--storage", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith("msrn: error: data.root is needed")
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_two_trials_end_with_a_config_that_runs(tmp_path: Path) -> None:
    from msrn_ray.datasets.scenes import generate_scenes

    root = generate_scenes(tmp_path / "scenes", num_train=32, num_val=8, num_test=4)
    # the generator's own parameters differ from the preset's, so the same images are read as a COCO data set
    result = search(
        "scenes", "--root", str(root), "--dataset", "coco", "--trials", "2", "--epochs", "1", "--storage", str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
    assert "2 of 2 trials finished" in result.stdout
    (best,) = tmp_path.glob("search-*/best_config.yaml")
    config = load_config(best)
    assert config.data.root == str(root)
    assert config.model.tau != PRESETS["scenes"].config.model.tau
