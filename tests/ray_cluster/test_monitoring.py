"""`cluster/monitoring` with a real Prometheus that watches a real run: every panel shows its figures."""

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


def test_panels_and_gauges_match() -> None:
    shown = {name for expression in EXPRESSIONS.values() for name in re.findall(r"ray_msrn_\w+", expression)}
    assert shown == NAMES
    assert [panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in DASHBOARD["panels"]] == [True] * len(
        EXPRESSIONS
    )
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(EXPRESSIONS) == len(DASHBOARD["panels"])
    (run,) = [variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "run"]
    assert run["query"]["query"] == "label_values(ray_msrn_epoch, run)"


@dataclass(frozen=True)
class Watched:
    """A run of two ranks on CPUs, and the Prometheus server that watched it.

    Attributes:
        url: of the server.
        lines: the run's metrics.jsonl.
        start: of the run, seconds since 1970.
    """

    url: str
    lines: list[dict[str, float]]
    start: float

    def ask(self, path: str, **query: str) -> Any:
        """Return an answer of the server."""
        with urllib.request.urlopen(f"{self.url}/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def panel(self, title: str, run: str = ".+") -> dict[tuple[str | None, str | None], set[float]]:
        """Return what a panel draws since the run's start: the distinct values of each line, by run and rank."""
        expression = EXPRESSIONS[title].replace("$run", run)
        times = {"start": str(self.start), "end": str(time.time()), "step": "1"}
        return {
            (line["metric"].get("run"), line["metric"].get("rank")): {float(value) for _, value in line["values"]}
            for line in self.ask("query_range", query=expression, **times)["result"]
        }


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Ray keeps its files in a separate folder, with the list of nodes that its dashboard writes for Prometheus."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    generate_scenes(folder / "scenes", num_train=50, num_val=13, num_test=10)
    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:  # a short name: Ray makes sockets in it
        url, server = start_prometheus(folder, Path(temporary))
        try:
            start = time.time()
            completed = subprocess.run(
                [
                    sys.executable, "-m", "msrn_ray", "train", "scenes", "--data.dataset", "coco", "--data.root", folder / "scenes",
                    "--data.image-size", "64", "--model.embed-dim", "32", "--model.compile", "off", "--train.amp", "off",
                    "--train.epochs", "3", "--train.batch-size", "10", "--train.log-every", "1", "--train.storage", folder / "runs",
                    "--train.run-name", "watched", "--resources.num-workers", "2", "--resources.dashboard", "--resources.use-gpu", "False",
                ],
                env=os.environ | {"RAY_TMPDIR": temporary, "RAY_metrics_report_interval_ms": "1000"},
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert completed.returncode == 0, completed.stdout
            lines = (folder / "runs/watched/metrics.jsonl").read_text(encoding="utf-8").splitlines()
            yield Watched(url, list(map(json.loads, lines)), start)
        finally:
            server.terminate()
            server.wait(timeout=30)


def start_prometheus(folder: Path, temporary: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """Start a server with the project's file, and Ray's temporary folder in place of /tmp; return its URL and process."""
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


# metrics that all ranks share; times differ from rank to rank
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
def test_panel_draws_the_run(watched: Watched, title: str) -> None:
    """A panel draws only what the run recorded itself."""
    lines = watched.panel(title)
    (name,) = re.findall(r"ray_\w+", EXPRESSIONS[title])
    if name == "ray_msrn_gpu_memory_bytes":
        assert lines == {}, "there is no GPU"
        return
    if name == "ray_node_cpu_utilization":
        (drawn,) = lines.values()  # of the only node
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
            assert all(any(value == pytest.approx(recorded, rel=1e-4) for recorded in known) for value in drawn), (
                drawn,
                known,
            )
        elif metric == "bad_images":
            assert drawn == {0.0}
        elif metric == "data_wait_fraction":
            assert all(0 <= value <= 1 for value in drawn), drawn
        elif metric == "loss":  # of a step; the recorded losses are means over epochs
            means = [line["train/loss"] for line in watched.lines]
            assert all(min(means) / 2 < value < 2 * max(means) for value in drawn), (drawn, means)
        else:
            assert all(value > 0 for value in drawn)


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.ray
def test_runs_to_choose_from(watched: Watched) -> None:
    """The dashboard lists the run; another choice hides it."""
    assert watched.ask("label/run/values", **{"match[]": "ray_msrn_epoch"}) == ["watched"]
    assert set(watched.panel("val mAP", "watched")) == {("watched", None)}
    assert watched.panel("val mAP", "another") == {}
