"""Searches attention levels, graph threshold and learning rate with Ray Tune and Optuna: `python tuning/search.py [PRESET] [options]`.

Every trial is a normal training run, built by the same `build_trainer` as `msrn train`; a sampled parameter is a dotted config path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import optuna
import ray
import ray.tune
import tyro
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console
from rich.table import Table

from msrn_ray.__main__ import report_errors
from msrn_ray.commands import PresetName
from msrn_ray.config import LEVELS, Dataset, ExperimentConfig
from msrn_ray.errors import UserError
from msrn_ray.materials import Materials, gather_materials
from msrn_ray.presets import PRESETS
from msrn_ray.resources import Allocation, allocate, connect
from msrn_ray.trainer import absolute_paths, build_trainer, run_trainer

METRIC = "val/mAP"
LEVEL_SUBSETS = [",".join(subset) for size in range(1, 5) for subset in combinations(LEVELS, size)]


@dataclass(frozen=True)
class Search:
    """Search levels, tau and learning rates of a preset; the best config is saved and runs with `msrn train --config`."""

    preset: tyro.conf.Positional[PresetName] = "scenes"
    """Experiment that every trial starts from."""
    root: str | None = None
    """Folder of the data set (`data.root`)."""
    dataset: Dataset | None = None
    """Reader of its layout (`data.dataset`), where it is not the preset's."""
    trials: int = 8
    """Number of trials."""
    epochs: int = 3
    """Epochs of each trial."""
    num_workers: int = 1
    """Data-parallel workers of each trial."""
    seed: int = 0
    """Seed of the sampler and of every trial."""
    storage: Path = Path("runs")
    """Where the search folder goes; on a cluster a folder that every node sees."""


def suggest(trial: optuna.Trial) -> None:
    """The search space: every parameter is a dotted path of the config."""
    trial.suggest_categorical("model.levels", LEVEL_SUBSETS)
    trial.suggest_float("model.tau", 0.05, 0.9)
    trial.suggest_float("optim.lr", 3e-4, 1e-2, log=True)
    trial.suggest_float("optim.backbone_lr_factor", 0.05, 1.0, log=True)


def apply(config: ExperimentConfig, params: dict[str, Any]) -> ExperimentConfig:
    """The config of one trial."""
    return config.with_overrides(params | {"model.levels": params["model.levels"].split(",")})


def run_trial(params: dict[str, Any], config: ExperimentConfig, materials: Materials, allocation: Allocation) -> None:
    """One trial: a training run that reports its epochs to Tune."""
    name = f"trial_{ray.tune.get_context().get_trial_id()}"
    trainer = build_trainer(
        apply(config, params), materials, allocation, run_name=name, callbacks=[TuneReportCallback()]
    )
    run_trainer(trainer)


def search(options: Search) -> Path:
    """Runs the search, prints the trials, best first, and saves the best config.

    Returns:
        The path of `best_config.yaml`.

    Raises:
        UserError: for input that the user can mend, and when no trial finished.
    """
    folder = options.storage.expanduser().resolve() / f"search-{options.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = absolute_paths(
        PRESETS[options.preset].config.with_overrides(
            {
                "data.root": options.root,
                "data.dataset": options.dataset or PRESETS[options.preset].config.data.dataset,
                "train.epochs": options.epochs,
                "train.seed": options.seed,
                "train.storage": str(folder),
                "train.checkpoint_every": None,  # Tune takes reports with scores only
                "resources.num_workers": options.num_workers,
                "resources.dashboard": True,  # Tune asks it for the state of workers; without it a stopped trial keeps its CPUs
            }
        )
    )
    gathered = gather_materials(config)
    materials = replace(
        gathered, splits=replace(gathered.splits, test=None)
    )  # test is scored once, by whoever trains the best config
    connect(config.resources)
    allocation = allocate(config.resources)
    # Tune does not count what a trial's workers take; one CPU of each trial is for decoding
    need = allocation.num_workers * allocation.cpus_per_worker + 1
    concurrent = max(1, math.floor(ray.cluster_resources()["CPU"] / need))
    if allocation.use_gpu:
        concurrent = min(concurrent, int(ray.cluster_resources()["GPU"]) // allocation.num_workers)
    folder.mkdir(parents=True)
    trainable = ray.tune.with_parameters(run_trial, config=config, materials=materials, allocation=allocation)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, {"CPU": 0.01}),  # it only waits for its workers; Tune takes no empty request
        tune_config=ray.tune.TuneConfig(
            metric=METRIC,
            mode="max",
            search_alg=OptunaSearch(
                suggest, metric=METRIC, mode="max", sampler=optuna.samplers.TPESampler(seed=options.seed)
            ),
            num_samples=options.trials,
            max_concurrent_trials=concurrent,
        ),
        run_config=ray.tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    results = tuner.fit()
    start = PRESETS[options.preset].config.with_overrides(
        {"data.root": config.data.root, "data.dataset": config.data.dataset, "train.seed": options.seed}
    )
    return _report([results[index] for index in range(len(results))], start, folder)


def _report(results: Sequence[Any], config: ExperimentConfig, folder: Path) -> Path:
    """Prints the trials, best first, and saves the best one's parameters on top of `config`, the preset at its full length."""
    finished = [result for result in results if result.error is None and METRIC in (result.metrics or {})]
    for result in results:
        if result.error is not None:
            print(f"trial failed: {str(result.error).splitlines()[-1]}")
    if not finished:
        raise UserError(f"none of the {len(results)} trials finished; their logs are in {folder}")
    finished.sort(key=lambda result: float(result.metrics[METRIC]), reverse=True)
    table = Table(METRIC, "levels", "tau", "lr", "backbone lr factor")
    for result in finished:
        params = result.config
        table.add_row(
            f"{result.metrics[METRIC]:.4f}",
            params["model.levels"],
            f"{params['model.tau']:.2f}",
            f"{params['optim.lr']:.2g}",
            f"{params['optim.backbone_lr_factor']:.2g}",
        )
    Console(soft_wrap=True).print(table)
    path = folder / "best_config.yaml"
    apply(config, finished[0].config).save(path)
    print(f"{len(finished)} of {len(results)} trials finished; best {METRIC} {finished[0].metrics[METRIC]:.4f}")
    print(f"train it: msrn train --config {path}")
    return path


def main() -> None:
    """Command line of the search."""
    with report_errors():
        search(tyro.cli(Search, description=Search.__doc__))


if __name__ == "__main__":
    main()
