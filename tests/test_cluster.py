"""The cluster files pass Ray's own checks."""

from __future__ import annotations

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

GPU_YAML = Path(__file__).resolve().parents[1] / "cluster" / "gpu.yaml"


def test_gpu_yaml_passes_rays_schema() -> None:
    config = prepare_config(yaml.safe_load(GPU_YAML.read_text()))
    validate_config(config)
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}


def test_a_misspelt_key_would_be_found() -> None:
    import jsonschema
    import pytest

    config = prepare_config(yaml.safe_load(GPU_YAML.read_text()) | {"max_worker": 3})
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(config)
