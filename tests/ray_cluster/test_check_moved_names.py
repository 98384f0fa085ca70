"""`msrn cluster check` on a cluster file of an older version of this project."""

from __future__ import annotations

from pathlib import Path

import pytest

from msrn_ray.ray_cluster.check import PLACEHOLDER, check_cluster

ROOT = Path(__file__).resolve().parents[2]
NEW, OLD = "msrn_ray.ray_cluster.spot_scorer.score", "msrn_ray.spot_first.score"


def test_check_names_the_new_place_of_the_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (ROOT / "cluster/gpu.yaml").read_text(encoding="utf-8").replace(f"-{PLACEHOLDER}", "-0abc")
    assert NEW in text
    (tmp_path / "gpu.yaml").write_text(text)
    assert check_cluster(tmp_path / "gpu.yaml") == []
    (tmp_path / "old.yaml").write_text(text.replace(f"={NEW}", f"={OLD}"))
    assert check_cluster(tmp_path / "old.yaml") == [f"head_start_ray_commands: {OLD} has moved; write {NEW}"]
