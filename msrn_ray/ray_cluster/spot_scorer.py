"""Makes Ray's autoscaler request spot instances, and where AWS has none left, the same instances on demand.

Ray's own score ignores that AWS refused a node type, and requests it forever. Ray's older autoscaler takes another score from the
environment of the head: `RAY_AUTOSCALER_UTILIZATION_SCORER=msrn_ray.ray_cluster.spot_scorer.score RAY_enable_autoscaler_v2=0`.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

from .private_api import NodeAvailabilitySummary, default_utilization_scorer

SPOT = "_spot"  # ends the name of a spot node type


def score(
    node_resources: dict[str, Real],
    resources: list[dict[str, Real]],
    node_type: str,
    *,
    node_availability_summary: NodeAvailabilitySummary,
) -> tuple[Any, ...] | None:
    """Return how well a node type suits a request: the highest is the best, None does not fit at all.

    Ray's own score decides first. Among equal node types, one that AWS refused within the last half hour comes last, and a spot node type
    comes first.

    Args:
        node_resources: resources of one such node.
        resources: the request, a mapping per worker or task.
        node_type: its name in `available_node_types`.
        node_availability_summary: which node types AWS gave, or refused, recently.
    """
    fits = default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if fits is None:
        return None
    last = node_availability_summary.node_availabilities.get(node_type)
    return (*fits, last is None or last.is_available, node_type.endswith(SPOT))
