"""What a worker decides without Ray: precision, kernels, what it goes on from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import ray.train
import torch
from torch import nn

from msrn_ray.config import ExperimentConfig, ModelSettings
from msrn_ray.errors import UserError
from msrn_ray.model import build_model, choose_attention_kernels
from msrn_ray.ray_train.worker import Worker
from msrn_ray.runs.checkpoint import TrainState, save_train_state
from msrn_ray.runs.snapshot import get_rng
from msrn_ray.training.bad_images import RECALLED, BadImage, BadImages
from msrn_ray.training.build import amp_dtype
from msrn_ray.training.engine import EpochStats
from msrn_ray.training.learner import Learner
from msrn_ray.training.row_ledger import Account
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
def test_precision_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert amp_dtype("auto", CPU) == expected
    assert (amp_dtype("bf16", CPU), amp_dtype("fp16", CPU), amp_dtype("off", CPU)) == (
        torch.bfloat16,
        torch.float16,
        None,
    )


def test_a_torch_that_does_not_tell_what_the_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
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
Resume = Callable[[TrainState], tuple[Worker, object]]


def learner() -> Learner:
    network = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    return Learner(network, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False), None, None, None, 1, 0.0)


def state_of(account: Account, step: int) -> TrainState:
    """After `step` steps of the second epoch of 10 rows in batches of 4."""
    torch.manual_seed(5)
    one = learner()
    states = (one.network.state_dict(), one.optimizer.state_dict(), one.scheduler.state_dict(), {}, None)
    stats = asdict(EpochStats(steps=step, images=7)) if step else {}
    return TrainState(*states, 1, "same", step, account.pack() if step else {}, stats, 1, [get_rng(CPU)])


@pytest.fixture
def resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resume:
    """A worker without a run around it takes up a state."""

    def resume_from(state: TrainState) -> tuple[Worker, object]:
        save_train_state(tmp_path / "saved", state)
        latest = SimpleNamespace(path="saved", as_directory=lambda: nullcontext(tmp_path / "saved"))
        monkeypatch.setattr(ray.train, "get_checkpoint", lambda: latest)
        monkeypatch.setattr(ray, "get", lambda table: table)
        worker = object.__new__(Worker)
        uris = [f"/{row}.jpg" for row in range(NUM_ROWS)]
        table = SampleTable.from_columns(uris, uris, np.zeros((NUM_ROWS, 1), np.int8), ("x",), "made").table
        worker.loop = {"sizes": {"train": NUM_ROWS}, "fingerprint": "same", "tables": {"train": table}}
        worker.config = ExperimentConfig().with_overrides(
            {"train.batch_size": 4, "train.epochs": 3, "data.max_bad_fraction": 0.1}
        )
        worker.rank, worker.world, worker.device = 0, 1, CPU
        worker.learner = learner()
        worker.bad, worker.told = {"train": BadImages()}, {"train": {}}
        torch.manual_seed(77)
        return worker, worker.resume()

    return resume_from


def account_of(step: int, resume: Resume) -> Account:
    """What the plan has before a step of the second epoch; its first row could not be decoded."""
    worker, _ = resume(state_of(Account.empty(NUM_ROWS), 0))
    rows = worker.plan(1, 0).rows_before(1, step)
    account = Account.empty(NUM_ROWS)
    account.trained[rows[1:]] = account.unreadable[rows[:1]] = True
    return account


def test_a_worker_goes_on_within_an_epoch(resume: Resume) -> None:
    account = account_of(2, resume)
    state = state_of(account, 2)
    worker, start = resume(state)
    assert (start.epoch, start.stats) == (1, EpochStats(steps=2, images=7))
    np.testing.assert_array_equal(start.account.trained, account.trained)
    assert torch.equal(worker.learner.network.state_dict()["weight"], state.model["weight"])
    assert torch.equal(torch.get_rng_state(), state.rng[0]["cpu"])
    (row,) = np.flatnonzero(account.unreadable).tolist()
    assert [(image.row, image.uri) for image in worker.bad["train"].seen.values()] == [(row, f"/{row}.jpg")]
    sent: list[dict[str, object]] = []
    worker.send = lambda kind, **content: sent.append({"kind": kind, **content})  # type: ignore[method-assign]
    told = {"kind": "bad", "split": "train", "images": [(f"/{row}.jpg", RECALLED)]}
    assert (worker.collect_bad("train"), worker.collect_bad("train")) == (1, 1)
    assert sent == [told], "the driver may not know of it"
    worker.bad["train"].add(BadImage(row, f"/{row}.jpg", "the file is empty"))
    assert worker.collect_bad("train") == 1
    assert sent == [told, told | {"images": [(f"/{row}.jpg", "the file is empty")]}], "and not why"
    worker.rank = 5
    worker.resume()
    assert torch.equal(torch.get_rng_state(), state.rng[0]["cpu"]), "more ranks than there were share the states"


def test_a_worker_goes_on_after_an_epoch(resume: Resume) -> None:
    _, start = resume(state_of(Account.empty(NUM_ROWS), 0))
    assert (start.epoch, start.stats) == (1, EpochStats())
    assert not start.account.trained.any()


def test_a_checkpoint_of_another_order_is_refused(resume: Resume) -> None:
    """Rows of other steps are done than the plan has: going on would train on some twice and on others never."""
    account = account_of(2, resume)
    done, left = int(np.flatnonzero(account.trained)[0]), int(np.flatnonzero(~account.trained & ~account.unreadable)[0])
    account.trained[[done, left]] = False, True
    with pytest.raises(UserError) as caught:
        resume(state_of(account, 2))
    assert (
        f"order of epoch 2 (trained on before their turn: {left}; passed over: {done}); another version of numpy"
        in str(caught.value)
    )


def test_a_checkpoint_of_other_data_is_refused(resume: Resume) -> None:
    with pytest.raises(UserError, match=r"checkpoint saved is of other images or labels than data\.root holds"):
        resume(replace(state_of(Account.empty(NUM_ROWS), 0), data="other"))
