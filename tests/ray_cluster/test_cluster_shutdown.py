"""`ray down` on a made cluster; the last file of the cluster, which it ends."""

from __future__ import annotations

import time

import pytest

from tests.made_cluster import FILE, Cluster, has_ray

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_ray_down_leaves_no_process(cluster: Cluster) -> None:
    """The worker node notices within a minute that the head is gone."""
    cluster.wait_for_nodes()
    cluster.on_laptop(f"ray down -y {FILE}")
    cluster.wait_for_no_ray(cluster.head, cluster.worker)
    time.sleep(30)
    assert [has_ray(cluster.head), has_ray(cluster.worker)] == [False, False], "nothing starts it again"
