"""cluster/requirements.txt pins what a cluster node installs, and `msrn cluster check` reads it."""

from __future__ import annotations

from importlib.metadata import distribution, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from msrn_ray.ray_cluster.check import check_versions

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    line for line in (ROOT / "cluster/requirements.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"
]
PINS = dict(line.split("==") for line in LINES)


def needed_versions() -> dict[str, str]:
    """Return the installed version of every package that `pip install -e .` needs, directly or not."""
    versions: dict[str, str] = {}
    left = [Requirement("msrn-ray")]
    seen = set()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        versions[name] = distribution(name).version
        left += [
            dependency
            for dependency in map(Requirement, distribution(name).requires or [])
            if dependency.marker is None
            or any(dependency.marker.evaluate({"extra": extra}) for extra in {"", *requirement.extras})
        ]
    del versions["msrn-ray"]
    return versions


def test_each_line_is_a_plain_pin() -> None:
    assert [str(Requirement(line)) for line in LINES] == LINES
    assert [name for name in PINS if canonicalize_name(name) != name] == []
    assert len(PINS) == len(LINES), "each package is pinned once"


def test_project_accepts_each_pin() -> None:
    requirements = [one for one in map(Requirement, requires("msrn-ray") or []) if one.marker is None]
    assert len(requirements) > 15
    for requirement in requirements:
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), requirement


def test_pins_are_the_installed_versions() -> None:
    brought_along = {"setuptools": PINS["setuptools"]}  # a virtual environment of Python 3.11 starts with an older one
    assert needed_versions() | brought_along == PINS, (
        "renew cluster/requirements.txt, or install with -c cluster/requirements.txt"
    )


@pytest.mark.parametrize(
    ("lines", "finding"),
    [
        (LINES, None),
        ([line for line in LINES if not line.startswith("torch==")], "install torch in one version"),
        ([line.replace("numpy==2", "numpy==1.0.") for line in LINES], "numpy==1.0."),
        ([line.replace("ray==2.60", "ray==2.61") for line in LINES], "ray==2.61.0, but `ray up` here is"),
        ([line.replace("pydantic==2", "pydantic==1") for line in LINES], "pydantic==1"),
    ],
)  # fmt: skip
def test_check_reads_the_pins(lines: list[str], finding: str | None, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("\n".join(lines))
    findings = list(check_versions(config_of("~/p/cluster/requirements.txt", tmp_path)))
    assert len(findings) == (finding is not None)
    assert all(str(finding) in line for line in findings)


@pytest.mark.parametrize("target", ["~/p/cluster/other.txt", "~/q/requirements.txt"])
def test_check_names_an_uncopied_pins_file(target: str, tmp_path: Path) -> None:
    (finding,) = check_versions(config_of(target, tmp_path))
    assert f"pip reads {target}, which file_mounts does not copy" in finding


def test_check_reads_only_files_of_pip(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("\n".join(LINES))
    config = config_of("~/p/cluster/requirements.txt && bash -c true", tmp_path)
    config["setup_commands"] += ["cp -r ~/a ~/b", "rm -rf ~/a"]
    assert list(check_versions(config)) == []


def config_of(target: str, folder: Path) -> dict[str, Any]:
    """A cluster file whose nodes install by `target`; their folder ~/p/cluster is a copy of `folder`."""
    return {"setup_commands": [f"pip install -e ~/p -c {target}"], "file_mounts": {"~/p/cluster": str(folder)}}
