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
    """Return everything that a resume needs; all ranks must call this.

    Args:
        learner: network, optimizer and the rest of what a step changes.
        device: where the learner is.
        epoch: finished epochs.
        data: fingerprint of train and val.
        within: `step`, `account` and `stats` of the `TrainState`, if the epoch is not finished.
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
    """Reverse `capture` on each rank; additional ranks share the random states of the saved ranks.

    Raises:
        UserError: if the run was trained with another label graph.
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
    """Return the states of torch's generators, the only ones that training draws from: epoch and row seed the augmentation."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states that `get_rng` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "device" in state:
        torch.cuda.set_rng_state(state["device"], device)


def check_graph(saved: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor]) -> None:
    """Refuse to resume with another label graph than the run was trained with.

    Args:
        saved, current: state dicts of the network.

    Raises:
        UserError: if their masks differ.
    """
    key = "label_semantics.attend_mask"
    if key in saved and not torch.equal(saved[key].cpu(), current[key].cpu()):
        raise UserError(
            "data.label_counts: gives another label graph than the run was trained with; give the file that the run started with"
        )
