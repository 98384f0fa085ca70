"""What a worker decides without Ray: its precision, its kernels and where it resumes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray.train
import torch
from torch import nn

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError
from msrn_ray.model import build_model, choose_attention_kernels
from msrn_ray.ray_train.checkpoints import StartPoint, load_start
from msrn_ray.ray_train.worker import BLOCK_ROWS, Worker
from msrn_ray.ray_train.worker_input import StoredSplit
from msrn_ray.runs.checkpoint import TrainState, capture, get_rng, restore, save_train_state
from msrn_ray.runs.events import BadImagesFound, Event
from msrn_ray.settings import ModelSettings
from msrn_ray.training.bad_images import RECALLED, BadImage, BadImages
from msrn_ray.training.epoch import EpochStats
from msrn_ray.training.learner import Learner, amp_dtype
from msrn_ray.training.row_ledger import Account
from msrn_ray.training.sampling import TrainPlan
from msrn_ray.types import SampleTable

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, None),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, None),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_precision_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert amp_dtype("auto", CPU) == expected
    assert (amp_dtype("bf16", CPU), amp_dtype("fp16", CPU), amp_dtype("off", CPU)) == (
        torch.bfloat16,
        torch.float16,
        None,
    )


def test_torch_without_cpu_capabilities_means_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert amp_dtype("auto", CPU) is None


def test_kernels_follow_the_settings() -> None:
    settings = ModelSettings(backbone="resnet10", pretrained=None, head="elementwise", embed_dim=8, compile="off")
    vectors, mask = torch.randn(3, 4), torch.eye(3, dtype=torch.bool)
    assert (
        choose_attention_kernels(build_model(settings, vectors, mask), settings, CPU, 0)
        == "attention kernels tile by tile"
    )
    gap = settings.model_copy(update={"name": "gap"})
    assert choose_attention_kernels(build_model(gap, vectors, mask), gap, CPU, 0) == ""


NUM_ROWS = 10
ResumeFunction = Callable[[TrainState], tuple[Learner, StartPoint]]
PLAN = TrainPlan(NUM_ROWS, 4, 0, 1, 0, 0, 3, BLOCK_ROWS)


def make_learner() -> Learner:
    network = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    return Learner(network, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False), None, None, None, 1, 0.0)


def make_state(account: Account, step: int) -> TrainState:
    """Return the state after `step` steps of the second epoch of 10 rows in batches of 4."""
    torch.manual_seed(5)
    learner = make_learner()
    states = (learner.network.state_dict(), learner.optimizer.state_dict(), learner.scheduler.state_dict(), {}, None)
    stats = asdict(EpochStats(steps=step, images=7)) if step else {}
    return TrainState(*states, 1, "same", step, account.pack() if step else {}, stats, 1, [get_rng(CPU)])


@pytest.fixture
def resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResumeFunction:
    """Return a function that resumes a new learner from a state, without a run."""

    def resume_from(state: TrainState, plan: TrainPlan = PLAN) -> tuple[Learner, StartPoint]:
        save_train_state(tmp_path / "saved", state)
        latest = SimpleNamespace(path="saved", as_directory=lambda: nullcontext(tmp_path / "saved"))
        monkeypatch.setattr(ray.train, "get_checkpoint", lambda: latest)
        learner = make_learner()
        torch.manual_seed(77)
        return learner, load_start(learner, plan, "same")

    return resume_from


def make_account(step: int) -> Account:
    """Return the account of the rows before a step of the second epoch. The first of them could not be decoded."""
    rows = PLAN.rows_before(1, step)
    account = Account.empty(NUM_ROWS)
    account.trained[rows[1:]] = account.unreadable[rows[:1]] = True
    return account


def test_worker_resumes_within_an_epoch(resume: ResumeFunction) -> None:
    account = make_account(2)
    state = make_state(account, 2)
    learner, start = resume(state)
    assert (start.epoch, start.stats) == (1, EpochStats(steps=2, images=7))
    np.testing.assert_array_equal(start.account.trained, account.trained)
    np.testing.assert_array_equal(start.account.unreadable, account.unreadable)
    assert torch.equal(learner.network.state_dict()["weight"], state.model["weight"])
    assert torch.equal(torch.get_rng_state(), state.rng[0]["cpu"])
    resume(state, replace(PLAN, rank=5, world_size=6))
    assert torch.equal(torch.get_rng_state(), state.rng[0]["cpu"]), "more ranks than before reuse the saved states"


def test_recalled_bad_images_are_reported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver may not have listed them. Once a worker reads such an image again, its reason is known."""
    account = make_account(2)
    (row,) = np.flatnonzero(account.unreadable).tolist()
    uris = [f"/{number}.jpg" for number in range(NUM_ROWS)]
    table = SampleTable.from_columns(uris, uris, np.zeros((NUM_ROWS, 1), np.int8), ("x",), "made").table
    worker = object.__new__(Worker)
    worker.config = ExperimentConfig().with_overrides({"data.max_bad_fraction": 0.1})
    worker.splits = {"train": StoredSplit(table, NUM_ROWS)}
    worker.bad = {"train": BadImages()}
    worker.bad["train"].recall(account.unreadable, table["uri"])
    assert [(image.row, image.uri) for image in worker.bad["train"].seen.values()] == [(row, f"/{row}.jpg")]
    sent: list[Event] = []
    monkeypatch.setattr(worker, "send", sent.append)
    assert (worker.check_bad_images("train"), worker.check_bad_images("train")) == (1, 1)
    assert sent == [BadImagesFound("train", ((f"/{row}.jpg", RECALLED),))]
    worker.bad["train"].add(BadImage(row, f"/{row}.jpg", "the file is empty"))
    assert worker.check_bad_images("train") == 1
    assert sent[1:] == [BadImagesFound("train", ((f"/{row}.jpg", "the file is empty"),))]


def test_worker_resumes_after_an_epoch(resume: ResumeFunction) -> None:
    _, start = resume(make_state(Account.empty(NUM_ROWS), 0))
    assert (start.epoch, start.stats) == (1, EpochStats())
    assert not start.account.trained.any()


def test_checkpoint_of_another_order_is_refused(resume: ResumeFunction) -> None:
    """The done rows differ from the plan's rows before the step. Some would be trained twice and some never."""
    account = make_account(2)
    done_row, remaining_row = (
        int(np.flatnonzero(account.trained)[0]),
        int(np.flatnonzero(~account.trained & ~account.unreadable)[0]),
    )
    account.trained[[done_row, remaining_row]] = False, True
    with pytest.raises(UserError) as caught:
        resume(make_state(account, 2))
    assert (
        f"order of epoch 2 (trained on before their turn: {remaining_row}; passed over: {done_row}); another version of numpy"
        in str(caught.value)
    )


def test_checkpoint_of_other_data_is_refused(resume: ResumeFunction) -> None:
    with pytest.raises(UserError, match=r"checkpoint saved belongs to other images or labels than data\.root holds"):
        resume(replace(make_state(Account.empty(NUM_ROWS), 0), data="other"))


@pytest.mark.parametrize(("rank", "seed"), [(0, 1), (1, 2), (2, 1)])
def test_each_rank_gets_its_random_state(rank: int, seed: int) -> None:
    """An additional rank shares the state of a saved one."""
    learner, saved = make_learner(), []
    for saved_seed in (1, 2):
        torch.manual_seed(saved_seed)
        saved.append(get_rng(torch.device("cpu")))
    restore(learner, replace(capture(learner, epoch=1, data="d"), rng=saved), rank)
    drawn = torch.rand(1)
    torch.manual_seed(seed)
    assert torch.equal(drawn, torch.rand(1))
