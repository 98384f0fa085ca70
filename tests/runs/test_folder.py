"""The run folder that a run opens."""

from __future__ import annotations

from pathlib import Path

from msrn_ray.config import ExperimentConfig
from msrn_ray.io.files import atomic_write
from msrn_ray.runs.folder import CONFIG_FILE, DATA_FILE, FAILURE_FILE, open_folder


def test_resume_removes_partial_files_of_killed_processes(tmp_path: Path) -> None:
    """A killed process leaves the file that `atomic_write` had not renamed yet. Other hidden files stay, and so do subfolders."""
    with atomic_write(tmp_path / "best.txt") as partial:
        partial.write_text("epoch_0001_5f\n")
    kept = (
        ".checkpoint_manager_snapshot.json",
        ".driver",
        ".notes.1.txt",
        "best.txt",
        "metrics.jsonl.12.partial",
        ".events.12",
    )
    left = (partial.name, ".state.json.1.partial", "..checkpoint_manager_snapshot.json.4194304.partial", FAILURE_FILE)
    (tmp_path / ".epoch_0002_60.7.partial").mkdir()
    for name in (*kept, *left, ".epoch_0002_60.7.partial/.model.pt.12.partial"):
        (tmp_path / name).touch()
    open_folder(tmp_path, ExperimentConfig(), {"data": "", "fingerprint": ""}, fresh=False)
    expected = {*kept, CONFIG_FILE, DATA_FILE, ".epoch_0002_60.7.partial"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert (tmp_path / ".epoch_0002_60.7.partial" / ".model.pt.12.partial").exists()
