"""The presets are valid configs, and those of the benchmarks follow the paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from msrn_ray.config import config_from_dict, load_config
from msrn_ray.presets import PRESETS

BENCHMARKS = ("voc2007", "coco2014", "nuswide", "apparel")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_complete(tmp_path: Path, name: str) -> None:
    config, about, expected, *_ = PRESETS[name]
    assert config.preset == name
    assert about
    assert expected
    assert config_from_dict(config.to_dict()) == config
    config.save(tmp_path / "preset.yaml")
    assert load_config(tmp_path / "preset.yaml") == config


@pytest.mark.parametrize(
    ("name", "dataset", "group_ratio"),
    [("voc2007", "voc", 0.2), ("coco2014", "coco", 0.05), ("nuswide", "nuswide", 0.05), ("apparel", "apparel", 0.2)],
)
def test_benchmarks_follow_the_paper(name: str, dataset: str, group_ratio: float) -> None:
    config = PRESETS[name].config
    assert config.data.dataset == dataset
    assert config.data.image_size == 448
    assert config.data.crop_scales == (1.0, 0.9, 0.8, 0.7, 0.6)
    assert config.data.flip
    model = config.model
    assert (model.name, model.backbone, model.pretrained) == ("msrn", "resnet101", "IMAGENET1K_V1")
    assert (model.head, model.levels) == ("mlp", ("layer2", "layer3", "layer4"))
    assert (model.embed_dim, model.label_hidden_dim, model.graph_hidden_dim, model.mlp_hidden_dim) == (
        512,
        256,
        300,
        2048,
    )
    assert (model.group_ratio, model.tau, model.prior_bias) == (group_ratio, 0.4, False)
    assert (model.frozen_stages, model.frozen_batchnorm) == (0, False)
    optim = config.optim
    assert (optim.name, optim.lr, optim.backbone_lr_factor) == ("sgd", 0.1, 0.1)
    assert (optim.momentum, optim.weight_decay) == (0.9, 1e-4)
    assert (optim.schedule, optim.step_epochs, optim.step_factor, optim.warmup_epochs) == ("step", (30,), 0.1, 0)
    assert (optim.accumulation, optim.ema_decay) == (1, 0)
    assert config.train.batch_size == 16
    assert config.train.epochs > 30
    assert config.loss.group_weight == 1e-4


def test_expected_figures_are_published() -> None:
    figures = {"voc2007": "96.0", "coco2014": "83.4", "nuswide": "61.5"}
    assert {name: figure for name, figure in figures.items() if figure not in PRESETS[name].expected} == {}
    assert set(PRESETS) == {"scenes", "manifest", "folders", "huggingface", "webdataset", *BENCHMARKS}


def test_scenes_preset_needs_no_downloads() -> None:
    config = PRESETS["scenes"].config
    assert config.data.root is None
    assert config.model.pretrained is None
    assert config.data.word_vectors is None
