"""Studies of short searches without Ray: a plan, made-up scores, and a loop that runs trials."""

from __future__ import annotations

from typing import Any

from optuna.trial import TrialState

from msrn_ray.presets import PRESETS
from tuning.options import SearchPlan
from tuning.study import SearchStudy
from tuning.trial_point import TrialPoint

ENTRIES = {
    "model.levels": {"subsets": ["layer1", "layer2", "layer3", "layer4"]},
    "model.tau": {"low": 0.05, "high": 0.9},
    "optim.lr": {"times": [0.1, 10]},
    "loss.name": {"choices": ["soft_margin", "asl"]},
    "loss.clip": {"low": 0, "high": 0.2, "when": {"loss.name": "asl"}},
}
EPOCHS = 3


def plan_of(epochs: int = EPOCHS, **change: Any) -> SearchPlan:
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
    return SearchPlan(**(fields | change))


def quality(overrides: dict[str, Any]) -> float:
    """Best at tau 0.3 and three levels; between 0 and 1."""
    levels = overrides.get("model.levels", [])
    return 0.9 - 0.5 * abs(overrides["model.tau"] - 0.3) - 0.1 * abs(len(levels) - 3) + overrides.get("optim.lr", 0.0)


def epoch_of(overrides: dict[str, Any], epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "val/mAP": quality(overrides) * epoch / 9, "train/images_per_second": 90.0}


def run(study: SearchStudy, most: int = 1000) -> list[TrialPoint]:
    """Run up to `most` trials one after the other, each to its end."""
    points = []
    while len(points) < most and (point := study.next_trial()) is not None:
        points.append(point)
        for epoch in range(1, study.epochs + 1):
            if study.record(point.number, epoch_of(point.overrides, epoch)):
                break
    return points


def next_point(study: SearchStudy) -> TrialPoint:
    """Return the next trial, which must exist."""
    point = study.next_trial()
    assert point is not None
    return point


def states(study: SearchStudy) -> list[TrialState]:
    return [trial.state for trial in study.study.get_trials()]
