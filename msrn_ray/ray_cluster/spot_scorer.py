"""Which kind of machine Ray's autoscaler asks for: a spot one, and where AWS has none left, the same machine on demand.

Ray's own choice ignores that a kind could not be had and asks for it for ever. Its older autoscaler takes another rule from the
environment of the head: `RAY_AUTOSCALER_UTILIZATION_SCORER=msrn_ray.ray_cluster.spot_scorer.score RAY_enable_autoscaler_v2=0`.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

from .private_api import NodeAvailabilitySummary, default_utilization_scorer

SPOT = "_spot"  # ends the name of a kind of machine


def score(
    node_resources: dict[str, Real],
    resources: list[dict[str, Real]],
    node_type: str,
    *,
    node_availability_summary: NodeAvailabilitySummary,
) -> tuple[Any, ...] | None:
    """How well a machine suits what is asked for, the best one highest; None: not at all.

    Ray's own score decides first. Of machines that are alike, one whose kind was refused within the last half hour comes last, a spot one
    first.

    Args:
        node_resources: of one such machine.
        resources: what is asked for, a mapping for each worker or task.
        node_type: its name in `available_node_types`.
        node_availability_summary: which kinds AWS gave, or refused, lately.
    """
    fits = default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if fits is None:
        return None
    last = node_availability_summary.node_availabilities.get(node_type)
    return (*fits, last is None or last.is_available, node_type.endswith(SPOT))
