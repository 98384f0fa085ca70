"""What `cluster/monitoring` offers, against a real Prometheus that watches a real run: every panel has its figures."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from msrn_ray.datasets.scenes.generate import generate_scenes
from msrn_ray.ray_train.gauges import EPOCH_GAUGES, GAUGES

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "cluster/monitoring"
DASHBOARD = json.loads((MONITORING / "grafana.json").read_text(encoding="utf-8"))
EXPRESSIONS = {panel["title"]: target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
NAMES = {f"ray_{name}" for name, _ in (GAUGES | EPOCH_GAUGES).values()}


def test_every_gauge_has_a_panel_and_no_panel_shows_what_does_not_exist() -> None:
    shown = {name for expression in EXPRESSIONS.values() for name in re.findall(r"ray_msrn_\w+", expression)}
    assert shown == NAMES
    assert [panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in DASHBOARD["panels"]] == [True] * len(
        EXPRESSIONS
    )
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(EXPRESSIONS) == len(DASHBOARD["panels"])
    (run,) = [one for one in DASHBOARD["templating"]["list"] if one["name"] == "run"]
    assert run["query"]["query"] == "label_values(ray_msrn_epoch, run)"


@dataclass(frozen=True)
class Watched:
    """A run of two ranks on CPUs, and the server that watched it.

    Attributes:
        url: of the server.
        lines: the run's metrics.jsonl.
        start: of the run, seconds since 1970.
    """

    url: str
    lines: list[dict[str, float]]
    start: float

    def ask(self, path: str, **query: str) -> Any:
        """An answer of the server."""
        with urllib.request.urlopen(f"{self.url}/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def panel(self, title: str, run: str = ".+") -> dict[tuple[str | None, str | None], set[float]]:
        """What a panel draws from the run's start until now: the different values of each line, by run and rank."""
        expression = EXPRESSIONS[title].replace("$run", run)
        times = {"start": str(self.start), "end": str(time.time()), "step": "1"}
        return {
            (line["metric"].get("run"), line["metric"].get("rank")): {float(value) for _, value in line["values"]}
            for line in self.ask("query_range", query=expression, **times)["result"]
        }


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Ray, with the list of machines that its dashboard writes for Prometheus, in a folder of its own."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    generate_scenes(folder / "scenes", num_train=50, num_val=13, num_test=10)
    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:  # a short name: Ray makes sockets below it
        url, server = start_prometheus(folder, Path(temporary))
        try:
            start = time.time()
            done = subprocess.run(
                [
                    sys.executable, "-m", "msrn_ray", "train", "scenes", "--data.dataset", "coco", "--data.root", folder / "scenes",
                    "--data.image-size", "64", "--model.embed-dim", "32", "--model.compile", "off", "--train.amp", "off",
                    "--train.epochs", "3", "--train.batch-size", "10", "--train.log-every", "1", "--train.storage", folder / "runs",
                    "--train.run-name", "watched", "--resources.num-workers", "2", "--resources.dashboard", "--resources.use-gpu", "False",
                ],
                env=os.environ | {"RAY_TMPDIR": temporary, "RAY_metrics_report_interval_ms": "1000"},
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            lines = (folder / "runs/watched/metrics.jsonl").read_text(encoding="utf-8").splitlines()
            yield Watched(url, list(map(json.loads, lines)), start)
        finally:
            server.terminate()
            server.wait(timeout=30)


def start_prometheus(folder: Path, temporary: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """A server that has read the project's file, with Ray's folder for temporary files in place of /tmp; its URL."""
    text = (MONITORING / "prometheus.yml").read_text(encoding="utf-8")
    place = "[/tmp/ray/prom_metrics_service_discovery.json]"
    assert place in text
    text = text.replace(place, f"[{temporary}/ray/prom_metrics_service_discovery.json]").replace(": 10s", ": 1s")
    (folder / "prometheus.yml").write_text(text, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = [
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/db",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        return f"http://{address}/api/v1", subprocess.Popen(["prometheus", *options], stdout=log, stderr=log)


# times are each rank's own
EXACT = (
    "epoch",
    "val/mAP",
    "train/object_store_peak_bytes",
    "train/object_store_spilled_bytes",
)


@pytest.mark.parametrize("title", EXPRESSIONS)
@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.ray
def test_a_panel_draws_the_run(watched: Watched, title: str) -> None:
    """Nothing but what the run has written down for itself."""
    lines = watched.panel(title)
    (name,) = re.findall(r"ray_\w+", EXPRESSIONS[title])
    if name == "ray_msrn_gpu_memory_bytes":
        assert lines == {}, "there is no GPU"
        return
    if name == "ray_node_cpu_utilization":
        (drawn,) = lines.values()  # of the one machine
        assert drawn
        assert all(value >= 0 for value in drawn)
        return
    metric = next(metric for metric, (gauge, _) in (GAUGES | EPOCH_GAUGES).items() if f"ray_{gauge}" == name)
    ranks = ("0", "1") if "rank" in EXPRESSIONS[title] else (None,)
    assert set(lines) == {("watched", rank) for rank in ranks}
    known = {line[metric] for line in watched.lines if metric in line}
    for drawn in lines.values():
        assert drawn
        if metric in EXACT:
            assert all(any(value == pytest.approx(one, rel=1e-4) for one in known) for value in drawn), (drawn, known)
        elif metric == "bad_images":
            assert drawn == {0.0}
        elif metric == "data_wait_fraction":
            assert all(0 <= value <= 1 for value in drawn), drawn
        elif metric == "loss":  # of a step; the epochs' are means
            means = [line["train/loss"] for line in watched.lines]
            assert all(min(means) / 2 < value < 2 * max(means) for value in drawn), (drawn, means)
        else:
            assert all(value > 0 for value in drawn)


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.ray
def test_the_runs_to_choose_from(watched: Watched) -> None:
    """The dashboard's list of runs, and a run that is not chosen."""
    assert watched.ask("label/run/values", **{"match[]": "ray_msrn_epoch"}) == ["watched"]
    assert set(watched.panel("val mAP", "watched")) == {("watched", None)}
    assert watched.panel("val mAP", "another") == {}
