"""A checkpoint becomes a network and a predictor of probabilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from msrn_ray.datasets.transforms import decode, normalize, resize
from msrn_ray.errors import UserError
from msrn_ray.inference.predictor import Predictor, load_model
from msrn_ray.runs.checkpoint import load_checkpoint, save_checkpoint
from msrn_ray.types import MSRNOutput
from tests.tiny import make_photo, make_tiny_checkpoint


def test_load_model_returns_network_in_eval_mode(folder: Path) -> None:
    model = load_model(str(folder))
    assert not any(module.training for module in model.modules())
    state = torch.random.get_rng_state()
    output = model(torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(output, MSRNOutput)
    assert output.logits.shape == (2, 3)
    assert output.label_embedding is not None
    assert output.group_embedding is not None
    assert output.assignment is not None
    assert output.label_embedding.shape == (3, 16)
    assert output.group_embedding.shape == (2, 16)
    assert output.assignment.shape == (3, 2)
    torch.testing.assert_close(output.assignment.sum(1), torch.ones(3))
    saved = load_checkpoint(folder).weights
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def test_graph_comes_from_checkpoint(folder: Path) -> None:
    mask = load_model(folder).get_buffer("label_semantics.attend_mask")
    assert mask.tolist() == [[True, True, False], [False, True, False], [False, False, True]]


@pytest.mark.parametrize("name", ["gap", "gmp"])
def test_load_model_loads_baselines(tmp_path: Path, name: str) -> None:
    model = load_model(make_tiny_checkpoint(tmp_path, 4, name))  # type: ignore[arg-type]  # parametrize gives text
    output = model(torch.randn(2, 3, 64, 64))
    assert output.logits.shape == (2, 4)
    assert output[1:] == (None, None, None)


def test_predictor_takes_a_single_image(predictor: Predictor, photos: list[Path]) -> None:
    expected = predictor([photos[0]])
    with Image.open(photos[0]) as opened:
        for image in (photos[0], str(photos[0]), photos[0].read_bytes(), opened):
            assert torch.equal(predictor(image), expected)


def test_probabilities_equal_the_models(folder: Path, predictor: Predictor, photos: list[Path]) -> None:
    views = torch.stack([resize(decode(path.read_bytes(), max_pixels=10**6), 64) for path in photos])
    with torch.no_grad():
        expected = load_model(folder)(normalize(views)).logits.sigmoid()
    scores = predictor(photos)
    assert scores.shape == (7, 3)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    spread = (scores.amax(0) - scores.amin(0)).min()
    assert spread > 0.01, "scores that do not differ would test nothing"


def test_mean_and_std_come_from_checkpoint(folder: Path, tmp_path: Path, photos: list[Path]) -> None:
    changed = replace(load_checkpoint(folder), mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7))
    save_checkpoint(tmp_path, changed)
    views = torch.stack([resize(decode(path.read_bytes(), max_pixels=10**6), 64) for path in photos[:2]])
    with torch.no_grad():
        expected = load_model(folder)(normalize(views, changed.mean, changed.std)).logits.sigmoid()
    torch.testing.assert_close(Predictor.from_checkpoint(tmp_path)(photos[:2]), expected, rtol=0, atol=1e-6)


def test_paths_bytes_and_pillow_images_score_equally(predictor: Predictor, photos: list[Path]) -> None:
    paths = [path for path in photos if path.suffix == ".png"]
    expected = predictor(paths)
    assert torch.equal(predictor([str(path) for path in paths]), expected)
    assert torch.equal(predictor([path.read_bytes() for path in paths]), expected)
    assert torch.equal(predictor([Image.open(path) for path in paths]), expected)
    mixed = predictor([paths[0], paths[1].read_bytes(), Image.open(paths[2])])
    assert torch.equal(mixed, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 6, 7, 100])
def test_batch_size_does_not_change_scores(predictor: Predictor, photos: list[Path], batch_size: int) -> None:
    torch.testing.assert_close(predictor(photos, batch_size), predictor(photos), rtol=0, atol=1e-6)


def test_no_images_give_no_rows(predictor: Predictor) -> None:
    assert predictor([]).shape == (0, 3)


def test_predictor_has_names_thresholds_and_metrics(predictor: Predictor) -> None:
    assert predictor.label_names == ("label 0", "label 1", "label 2")
    torch.testing.assert_close(predictor.thresholds, torch.tensor([0.3, 0.3 + 0.4 / 3, 0.3 + 0.8 / 3]))
    assert predictor.checkpoint.metrics["val/mAP"] == 0.25


def test_predictor_refuses_unreadable_and_large_images(predictor: Predictor, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        predictor([b""])
    with pytest.raises(FileNotFoundError):
        predictor([tmp_path / "none.jpg"])
    settings = load_checkpoint(folder).config.with_overrides({"data.max_pixels": 100})
    small = Predictor(replace(load_checkpoint(folder), config=settings))
    with pytest.raises(UserError, match="max_pixels=100"):
        small([make_photo(tmp_path / "a.png")])
