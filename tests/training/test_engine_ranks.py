"""The engine over 2 and 3 processes: the numbers are those of one process."""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from msrn_ray.errors import NonFiniteLossError
from msrn_ray.training import distributed
from msrn_ray.training.engine import train_step
from msrn_ray.training.epoch import EpochSchedule
from msrn_ray.training.evaluate import evaluate, gather_scores
from msrn_ray.training.sampling import EvalPlan
from tests.training.engine_parts import (
    CPU,
    NUM_LABELS,
    NUM_ROWS,
    Hooks,
    Toy,
    assert_same_tensors,
    build_msrn,
    eval_batches,
    expected_scores,
    images_and_targets,
    make_learner,
    make_plan,
    plain_loop,
    rows_per_step,
    run_epoch,
    step_batches,
    update_norm,
    whiten_image,
)


def wrap_parallel(model: nn.Module, accumulation: int = 1) -> nn.Module:
    return DistributedDataParallel(model, **distributed.parallel_settings(accumulation))


def run_checks(rank: int, world: int) -> dict[str, Any]:
    """Return everything that one rank contributes to the tests below."""
    result: dict[str, Any] = {"rank": distributed.rank(), "world": distributed.world_size()}
    plan = make_plan(rank, world)
    result["valid"] = [batch.valid.tolist() for batch in step_batches(plan)]

    model = build_msrn()
    hooks = Hooks(num_bad=rank + 1)
    result["stats"], result["progress"] = run_epoch(make_learner(wrap_parallel(model)), step_batches(plan), hooks=hooks)
    result["rows"] = [row for rows in hooks.rows for row in rows]
    result["weights"] = model.state_dict()

    result["saved"] = []
    seconds = 0.0 if rank == 0 else 1e9  # only the first rank's clock counts
    schedule = EpochSchedule(2, save_seconds=seconds)
    hooks = Hooks(on_save=lambda stats: result["saved"].append(stats.steps))
    run_epoch(make_learner(wrap_parallel(Toy())), step_batches(plan, 8), schedule=schedule, hooks=hooks)

    model = build_msrn()
    learner = make_learner(wrap_parallel(model, 2), accumulation=2)
    for step, batch in enumerate(step_batches(plan)):
        train_step(learner, batch, plan.step_rows(step))
    result["accumulated"] = model.state_dict()

    for compress in (False, True):
        model = Toy()
        wrapped = wrap_parallel(model)
        if compress:
            distributed.compress_gradients(wrapped)
        train_step(make_learner(wrapped), step_batches(plan, 8)[0], plan.step_rows(0))
        result["compressed" if compress else "uncompressed"] = {
            name: parameter.grad for name, parameter in model.named_parameters()
        }

    model = Toy()
    model.head.weight.data *= 100
    old_weights = copy.deepcopy(dict(model.named_parameters()))
    learner = make_learner(wrap_parallel(model), 0.5, clip_norm=0.1, group_weight=1e4)
    train_step(learner, step_batches(plan, 8)[0], plan.step_rows(0))
    result["clipped"] = update_norm(old_weights, model).item()

    row = make_plan(1, world).epoch(0)[0][make_plan(1, world).epoch(0)[2][0]]  # the first row of rank 1 in step 1
    result["white row"] = int(row)
    for log_every in (1, 2, 100):
        try:
            batches = whiten_image(step_batches(plan, 8), int(row))
            run_epoch(make_learner(wrap_parallel(Toy())), batches, schedule=EpochSchedule(log_every))
        except NonFiniteLossError as error:
            result[f"error {log_every}"] = str(error)

    model = build_msrn()
    for name, num_rows in (("scores", NUM_ROWS), ("few", 2)):
        local_scores = evaluate(
            model,
            eval_batches(EvalPlan(num_rows, rank, world, 2)),
            device=CPU,
            num_classes=NUM_LABELS,
        )
        result[f"local {name}"] = local_scores.row.tolist()
        result[name] = gather_scores(local_scores)

    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank)
    norm.running_var.copy_(torch.tensor([1.0, 10.0 * rank]))
    norm.num_batches_tracked.fill_(rank)
    norm.weight.data.fill_(rank)
    distributed.average_buffers(norm)
    result["buffers"] = norm.state_dict()
    result["gathered"] = distributed.all_gather({"rank": rank})
    result["sum"] = distributed.all_reduce(torch.tensor([rank, 1.0]), "sum").tolist()
    result["min"] = distributed.all_reduce(torch.tensor([rank, 5.0 - rank]), "min").tolist()
    return result


def run_process(rank: int, folder: str) -> None:
    """Run one of three processes. All three form a group, then the first two form another."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank < world:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/group{world}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=60),  # ranks whose collectives do not match fail soon
            )
            torch.save(run_checks(rank, world), f"{folder}/{world}_{rank}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Return the results of each rank, by the number of ranks."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload([__name__])  # so that torch is imported once, not per process
    multiprocessing.start_processes(run_process, (str(folder),), nprocs=3, start_method="forkserver")
    return {
        world: [torch.load(folder / f"{world}_{rank}.pt", weights_only=False) for rank in range(world)]
        for world in (2, 3)
    }


WORLDS = pytest.mark.parametrize("world", [2, 3])


@WORLDS
def test_ranks_know_each_other(results: Any, world: int) -> None:
    assert [(result["rank"], result["world"]) for result in results[world]] == [(rank, world) for rank in range(world)]
    for result in results[world]:
        assert result["gathered"] == [{"rank": rank} for rank in range(world)]
        assert result["sum"] == [sum(range(world)), world]
        assert result["min"] == [0, 5 - (world - 1)]


@WORLDS
@pytest.mark.parametrize("name", ["weights", "accumulated"])
def test_ranks_train_like_one_process(results: Any, world: int, name: str) -> None:
    """Steps have 4, 4 and 2 rows. In the last step, the third of three ranks has only a filler."""
    if world == 3:
        assert results[3][2]["valid"] == [[True], [True], [False]]
    model = build_msrn()
    initial = copy.deepcopy(model.state_dict())
    plain_loop(model, rows_per_step())
    expected = model.state_dict()
    assert max((expected[key] - initial[key]).abs().max() for key in expected if "weight" in key) > 1e-3
    for result in results[world]:
        assert_same_tensors(result[name], expected)


@WORLDS
def test_ranks_report_losses_of_the_whole_batch(results: Any, world: int) -> None:
    expected = torch.tensor(plain_loop(build_msrn(), rows_per_step()), dtype=torch.float64)
    ranks = results[world]
    assert [len(result["rows"]) for result in ranks] == {2: [5, 5], 3: [5, 3, 2]}[world]
    assert sorted(row for result in ranks for row in result["rows"]) == list(range(NUM_ROWS))
    for result in ranks:
        stats, progress = result["stats"], result["progress"]
        assert stats["steps"] == 3
        assert stats["images"] == NUM_ROWS
        assert stats["classification_sum"] == pytest.approx(expected[:, 0].sum().item(), rel=1e-5)
        assert stats["group_sum"] == pytest.approx(expected[:, 1].sum().item(), rel=1e-5)
        assert [report["step"] for report in progress] == [2, 3]
        assert [report["bad_reports"] for report in progress] == [world * (world + 1) // 2] * 2
        assert progress[0]["loss"] == pytest.approx(expected[:2].sum().item() / 2, rel=1e-5)
        assert progress[1]["loss"] == pytest.approx(expected[2].sum().item(), rel=1e-5)
        windows = [images / report["images_per_second"] for images, report in zip((8, 2), progress, strict=True)]
        assert 0.5 * stats["seconds"] < sum(windows) <= 1.01 * stats["seconds"], (
            "the rate counts the images of all ranks"
        )
        assert all(0 <= report["data_wait_fraction"] < 1 for report in progress)


@WORLDS
def test_ranks_save_by_the_first_ranks_clock(results: Any, world: int) -> None:
    """They save at a check of the losses. The end of the epoch needs no save: it has its checkpoint anyway."""
    assert [result["saved"] for result in results[world]] == [[2]] * world


def test_gradients_exist_once_and_buffers_stay_local() -> None:
    whole, accumulated = distributed.parallel_settings(1), distributed.parallel_settings(3)
    assert whole["gradient_as_bucket_view"]
    assert [value for name, value in whole.items() if "buffers" in name] == [False], (
        "buffers are not broadcast; torch versions name the setting differently"
    )
    assert (whole["static_graph"], accumulated["static_graph"]) == (True, False)


@WORLDS
def test_compressed_gradients_differ_by_bf16_rounding(results: Any, world: int) -> None:
    for result in results[world]:
        largest = 0.0
        for name, uncompressed in result["uncompressed"].items():
            compressed = result["compressed"][name]
            assert torch.equal(compressed, results[world][0]["compressed"][name]), "all ranks have the same gradient"
            assert torch.equal(compressed, compressed.bfloat16().float())
            torch.testing.assert_close(
                compressed, uncompressed, rtol=0, atol=world * 2**-8 * float(uncompressed.abs().max())
            )
            largest = max(largest, float((compressed - uncompressed).abs().max() / uncompressed.abs().max()))
        assert largest > 1e-5, "bf16 rounded some values"


@WORLDS
def test_ranks_clip_the_averaged_gradient(results: Any, world: int) -> None:
    for result in results[world]:
        assert result["clipped"] == pytest.approx(0.05, rel=1e-4)


@WORLDS
@pytest.mark.parametrize("log_every", [1, 2, 100])
def test_non_finite_loss_stops_all_ranks_together(results: Any, world: int, log_every: int) -> None:
    """One rank has the bad image. Every rank names that rank's step and images, and no others."""
    plan = make_plan(1, world)
    rows, _, sizes = plan.epoch(0)
    faulty_rows = rows[sizes[0] : sizes[0] + sizes[1]].tolist()
    for result in results[world]:
        assert result["white row"] == faulty_rows[0]
        message = result[f"error {log_every}"]
        assert "not finite at step 1 of the epoch" in message
        named = [int(part.split("-")[1].rstrip(",;")) for part in message.split() if part.startswith("image-")]
        assert named == sorted(faulty_rows)


@WORLDS
def test_ranks_score_every_row_once(results: Any, world: int) -> None:
    model = build_msrn()
    probabilities, losses = expected_scores(model, range(NUM_ROWS))
    assert sorted(row for result in results[world] for row in result["local scores"]) == list(range(NUM_ROWS))
    assert results[3][2]["local few"] == [], "the third rank has no row"
    for result in results[world]:
        for name, num_rows in (("scores", NUM_ROWS), ("few", 2)):
            scores = result[name]
            assert scores.row.tolist() == list(range(num_rows))
            np.testing.assert_allclose(scores.scores, probabilities[:num_rows].numpy(), rtol=0, atol=1e-6)
            np.testing.assert_allclose(scores.loss, losses[:num_rows], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(scores.target, images_and_targets()[1][:num_rows].numpy())


@WORLDS
def test_ranks_average_float_buffers(results: Any, world: int) -> None:
    mean = sum(range(world)) / world
    for rank, result in enumerate(results[world]):
        buffers = result["buffers"]
        assert buffers["running_mean"].tolist() == [mean, mean]
        assert buffers["running_var"].tolist() == pytest.approx([1, 10 * mean])
        assert buffers["num_batches_tracked"] == rank, "counts are not averaged"
        assert buffers["weight"].tolist() == [rank, rank], "weights are not buffers"
