"""MSRN for multi-label image classification, trained, evaluated and searched on Ray.

The names below are loaded at their first use, so that `import msrn_ray` is quick and takes no Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import model, official
    from .config import ExperimentConfig, load_config
    from .errors import UserError
    from .inference.predictor import Predictor, load_model
    from .ray_train.driver import TrainResult, train
    from .training.metrics import MultiLabelMetrics
    from .types import MSRNOutput

__all__ = [
    "ExperimentConfig",
    "MSRNOutput",
    "MultiLabelMetrics",
    "Predictor",
    "TrainResult",
    "UserError",
    "load_config",
    "load_model",
    "model",
    "official",
    "train",
]

_HOME = {
    "ExperimentConfig": "config",
    "MSRNOutput": "types",
    "MultiLabelMetrics": "metrics",
    "Predictor": "predictor",
    "TrainResult": "trainer",
    "UserError": "errors",
    "load_config": "config",
    "load_model": "predictor",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in {"model", "official"}:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
