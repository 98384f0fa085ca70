"""MSRN for multi-label image classification, trained, evaluated and searched on Ray.

Names load at their first use, so that `import msrn_ray` is quick and does not import Ray.
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

_MODULES = {
    "ExperimentConfig": "config",
    "MSRNOutput": "types",
    "MultiLabelMetrics": "training.metrics",
    "Predictor": "inference.predictor",
    "TrainResult": "ray_train.driver",
    "UserError": "errors",
    "load_config": "config",
    "load_model": "inference.predictor",
    "train": "ray_train.driver",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    if name in {"model", "official"}:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
