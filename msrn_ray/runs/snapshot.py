"""Captures the state of training into a `TrainState` and restores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UserError
from ..training import distributed
from ..training.learner import Learner
from .checkpoint import TrainState


def capture(learner: Learner, device: torch.device, *, epoch: int, data: str, **within: Any) -> TrainState:
    """All that going on needs; ranks must all call it.

    Args:
        learner: what is trained.
        device: where it is.
        epoch: finished epochs.
        data: fingerprint of train and val.
        within: `step`, `account` and `stats` of a `TrainState`, within an epoch.
    """
    return TrainState(
        learner.network.state_dict(),
        learner.optimizer.state_dict(),
        learner.scheduler.state_dict(),
        learner.scaler.state_dict(),
        learner.ema.state_dict() if learner.ema is not None else None,
        epoch,
        data,
        world_size=distributed.world_size(),
        rng=distributed.all_gather(get_rng(device)),
        **within,
    )


def restore(learner: Learner, state: TrainState, rank: int, device: torch.device) -> None:
    """The reverse of `capture`, on each rank; ranks that there were not share the random states of those that there were.

    Raises:
        UserError: if the label graph is another than the run was trained with.
    """
    check_graph(state.model, learner.network.state_dict())
    learner.network.load_state_dict(state.model)
    learner.optimizer.load_state_dict(dict(state.optimizer))
    learner.scheduler.load_state_dict(dict(state.scheduler))
    learner.scaler.load_state_dict(dict(state.scaler))
    if learner.ema is not None and state.ema is not None:
        learner.ema.load_state_dict(dict(state.ema))
    if state.rng:
        set_rng(state.rng[rank % len(state.rng)], device)


def get_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """States of torch's generators, the only ones that training draws from: augmentation is seeded by epoch and row."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """The reverse of `get_rng`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "device" in state:
        torch.cuda.set_rng_state(state["device"], device)


def check_graph(saved: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> None:
    """Refuses to go on with another label graph than the run was trained with; both are state dicts of the network.

    Raises:
        UserError: if their masks differ.
    """
    key = "label_semantics.attend_mask"
    if key in saved and not torch.equal(saved[key].cpu(), now[key].cpu()):
        raise UserError(
            "data.label_counts: gives another label graph than the run was trained with; give the file that it started with"
        )
