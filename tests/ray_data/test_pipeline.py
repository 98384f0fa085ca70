"""From a sample table through Ray Data to batches: every row once, in plan order, without the bad images, which are named."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from msrn_ray.data_settings import DataSettings
from msrn_ray.ray_data import pipeline
from msrn_ray.ray_data.pipeline import Paced, decode_rows, eval_batches, limit_ray_data, train_epochs
from msrn_ray.training.bad_images import BadImages
from msrn_ray.training.sampling import EvalPlan, TrainPlan
from msrn_ray.types import SampleTable

SETTINGS = DataSettings(image_size=64, crop_scales=(1.0, 0.9, 0.8, 0.7, 0.6))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> SampleTable:
    """11 gray images whose brightness is 20 times their row; row 4 is not an image."""
    folder = tmp_path_factory.mktemp("images")
    uris = []
    for row in range(11):
        path = folder / f"{row}.png"
        if row == 4:
            path.write_bytes(b"not an image")
        else:
            Image.new("RGB", (80 + row, 70), (20 * row,) * 3).save(path)
        uris.append(str(path))
    targets = (np.arange(11)[:, None] % [2, 3, 5] == 0).astype(np.int8)
    return SampleTable.from_columns([f"id{row}" for row in range(11)], uris, targets, ("two", "three", "five"), "made")


@pytest.mark.ray
def test_train_epochs_follow_the_plan(local_ray: None, table: SampleTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 uses one execution of Ray Data, rank 1 executions that end within epochs. Blocks exceed Ray Data's target size."""
    limit_ray_data(2)
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 10_000)
    reference = ray.put(table.table)
    for rank in range(2):
        if rank == 1:
            monkeypatch.setattr(pipeline, "_EXECUTION_BLOCKS", 2)
        plan = TrainPlan(11, 4, rank, 2, seed=3, first_epoch=1, epochs=3, block_size=2)
        bad = BadImages()
        epochs = [list(batches) for batches in train_epochs(reference, plan, SETTINGS, bad)]
        assert len(epochs) == 2
        for epoch, batches in enumerate(epochs, start=1):
            rows, valid, sizes = plan.epoch(epoch)
            assert len(batches) == plan.num_steps == len(sizes)
            rows_seen = np.concatenate([batch.row[batch.valid].numpy() for batch in batches])
            expected = rows[valid & (rows != 4)]
            np.testing.assert_array_equal(rows_seen, expected)
            for batch in batches:
                for image, target, row, sound in zip(*batch, strict=True):
                    np.testing.assert_array_equal(target.numpy(), table.targets[row])
                    if sound:  # the image belongs to the row
                        assert abs(int(image.float().mean()) - 20 * int(row)) <= 1
        met = 4 in np.concatenate([plan.epoch(epoch)[0] for epoch in (1, 2)])
        assert [(image.row, image.reason) for image in bad.seen.values()] == (
            [(4, "not an image of a known format")] if met else []
        )


@pytest.mark.ray
def test_epoch_can_stop_in_the_middle(local_ray: None, table: SampleTable) -> None:
    """As when training stops on an error: nothing is left running, and the next reader starts from the beginning."""
    limit_ray_data(2)
    plan = TrainPlan(11, 2, 0, 1, seed=3, first_epoch=0, epochs=50, block_size=2)
    for _ in range(2):
        epochs = train_epochs(ray.put(table.table), plan, SETTINGS, BadImages())
        first = next(next(epochs))
        assert first.row.tolist() == plan.epoch(0)[0][:2].tolist()
        del epochs


@pytest.mark.ray
def test_ray_data_idles_behind_a_slow_consumer(
    local_ray: None, table: SampleTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the object store has no room for another decoded block, Ray Data's loop would spin beside the training."""
    limit_ray_data(2)
    steps, paced = [], Paced.on_execution_step

    def counted(self: Paced, executor: object) -> None:
        steps.append(1)
        paced(self, executor)

    monkeypatch.setattr(Paced, "on_execution_step", counted)
    plan = TrainPlan(11, 2, 0, 1, seed=3, first_epoch=0, epochs=50, block_size=2)
    epochs = train_epochs(ray.put(table.table), plan, SETTINGS, BadImages())
    next(next(epochs))
    time.sleep(1)  # until the object store is full
    before = len(steps)
    time.sleep(1)
    assert 0 < len(steps) - before <= 21
    del epochs


@pytest.mark.ray
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_yields_each_sound_row_once(local_ray: None, table: SampleTable, world_size: int) -> None:
    limit_ray_data(2)
    reference = ray.put(table.table)
    seen, bad = [], BadImages()
    for rank in range(world_size):
        for batch in eval_batches(reference, EvalPlan(11, rank, world_size, 2), SETTINGS, bad):
            seen += batch.row[batch.valid].tolist()
    assert sorted(seen) == [row for row in range(11) if row != 4]
    assert list(bad.seen) == [4]


def test_seed_epoch_and_row_determine_augmentation(table: SampleTable) -> None:
    textured = table.table.slice(0, 0)
    folder = Path(table.table["uri"][0].as_py()).parent
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    textured = SampleTable.from_columns(
        ["a", "b"], [str(folder / "noise.png")] * 2, np.zeros((2, 1), np.int8), ("x",), "made"
    ).table

    def image(row: int, epoch: int, seed: int) -> np.ndarray:
        return decode_rows(textured, np.array([row]), [epoch], SETTINGS, seed)["image"][0]

    together = decode_rows(textured, np.array([1, 0, 1]), [5, 0, 6], SETTINGS, 0)["image"]
    np.testing.assert_array_equal(together[0], image(1, 5, 0))
    np.testing.assert_array_equal(together[1], image(0, 0, 0))
    different = {image(row, epoch, seed).tobytes() for row in (0, 1) for epoch in range(3) for seed in (0, 1)}
    assert len(different) >= 11  # two of the draws may fall on the same crop


def test_missing_file_is_a_bad_image(tmp_path: Path) -> None:
    gone = SampleTable.from_columns(["a"], [str(tmp_path / "gone.jpg")], np.zeros((1, 1), np.int8), ("x",), "made")
    columns = decode_rows(gone.table, np.array([0]), [None], SETTINGS, 0)
    assert "No such file" in columns["error"][0]
    assert not columns["image"].any()
