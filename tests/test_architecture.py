"""What may import what, and what importing must not do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import msrn_ray

PACKAGE = Path(msrn_ray.__file__).parent
ROOT = PACKAGE.parent
RAY_MODULES = {
    "cluster_check",
    "fitting",
    "listening",
    "spot_first",
    "inspection",
    "pipeline",
    "prepare",
    "resources",
    "saving",
    "scoring",
    "telemetry",
    "trainer",
    "watchdog",
    "worker",
    "evaluation",
    "failures",
}
TOP_LEVEL = {"msrn_ray", "cluster", "tuning", "tests", "pyproject.toml", "README.md"}


def module_names(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def at_import(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        else:
            yield from at_import(child)


def targets(node: ast.Import | ast.ImportFrom, module: str, path: Path) -> list[str]:
    """Dotted names of the modules, or of names in modules, that a statement imports; relative ones made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, *filter(None, [base])])
    return [f"{base}.{alias.name}" for alias in node.names]


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module -> the package's own modules that it imports when it is imported."""
    modules = module_names(package)
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        wanted = [target for node in at_import(ast.parse(path.read_text())) for target in targets(node, name, path)]
        graph[name] = {
            target if target in modules else target.rpartition(".")[0]
            for target in wanted
            if target.split(".")[0] == package.name
        }
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if cycle := visit(other, [*path, name]):
                return cycle
        done.add(name)
        return []

    return next((cycle for name in graph if (cycle := visit(name, []))), [])


def in_fresh_process(code: str, folder: Path) -> dict[str, object]:
    """Runs code in a new interpreter with an empty home; the JSON on the last line of its output."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    content: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return content


def test_only_these_files_import_ray() -> None:
    importing = {
        name.removeprefix("msrn_ray.")
        for name, path in module_names(PACKAGE).items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and any(target.split(".")[0] == "ray" for target in targets(node, name, path))
    }
    assert importing == RAY_MODULES


def test_importing_the_core_brings_no_ray_writes_nothing_and_changes_nothing(tmp_path: Path) -> None:
    modules = module_names(PACKAGE)
    core = [name for name in modules if name.removeprefix("msrn_ray.") not in RAY_MODULES]
    assert len(core) > 30
    others = {
        target if isinstance(node, ast.Import) else target.rpartition(".")[0]
        for name in core
        for node in at_import(ast.parse(modules[name].read_text()))
        for target in targets(node, name, modules[name])
    }
    libraries = sorted(other for other in others if other.split(".")[0] not in {"msrn_ray", "__future__"})
    assert {"torch", "tyro", "pydantic", "PIL"} <= {library.split(".")[0] for library in libraries}
    code = f"""
import importlib, json, logging, os, signal, sys, threading, warnings
from pathlib import Path
for name in {libraries}:  # what these do at import is not ours
    importlib.import_module(name)
files = lambda: sorted(map(str, Path().rglob("*")))
state = lambda: [dict(os.environ), logging.root.handlers[:], logging.root.level, os.getcwd(), threading.active_count(),
                 warnings.filters[:], signal.getsignal(signal.SIGINT), sys.excepthook, __import__("torch").initial_seed(),
                 __import__("torch").get_num_threads()]
before, there = state(), files()
offender = None
for name in {core}:
    importlib.import_module(name)
    if offender is None and "ray" in sys.modules:
        offender = name
print(json.dumps({{"offender": offender, "same": [a == b for a, b in zip(before, state())], "new": sorted(set(files()) - set(there))}}))
"""
    result = in_fresh_process(code, tmp_path)
    assert result["offender"] is None
    assert result["new"] == []
    assert result["same"] == [True] * 10


def test_the_package_is_quick_to_import_and_ray_comes_with_training_alone(tmp_path: Path) -> None:
    code = """
import json, os, sys
from pathlib import Path
import msrn_ray
heavy = [name for name in ("torch", "ray", "numpy", "pydantic") if name in sys.modules]
for name in msrn_ray.__all__:
    if name not in ("train", "TrainResult"):
        getattr(msrn_ray, name)
early = "ray" in sys.modules
import ray.train.torch, ray.util.queue, matplotlib.figure, pycocotools.coco  # what these do at import is not ours
files = lambda: sorted(map(str, Path().rglob("*")))
before, there = dict(os.environ), files()
import msrn_ray.evaluation, msrn_ray.pipeline, msrn_ray.resources, msrn_ray.trainer, msrn_ray.worker
kinds = {name: type(getattr(msrn_ray, name)).__name__ for name in msrn_ray.__all__}
print(json.dumps({"heavy": heavy, "early": early, "kinds": kinds, "up": ray.is_initialized(),
                  "same": dict(os.environ) == before, "new": sorted(set(files()) - set(there))}))
"""
    result = in_fresh_process(code, tmp_path)
    assert result.pop("kinds") == {
        "ExperimentConfig": "ModelMetaclass",
        "MSRNOutput": "type",
        "MultiLabelMetrics": "type",
        "Predictor": "type",
        "TrainResult": "type",
        "UserError": "type",
        "load_config": "function",
        "load_model": "function",
        "model": "module",
        "official": "module",
        "train": "function",
    }
    assert result == {"heavy": [], "early": False, "up": False, "same": True, "new": []}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = msrn_ray.nonsense


def test_no_import_cycle() -> None:
    graph = import_graph(PACKAGE)
    assert "msrn_ray.types" in graph["msrn_ray.splits"]
    assert "msrn_ray.distributed" in graph["msrn_ray.engine"], "`from . import name` is seen"
    assert "msrn_ray.config" in graph["msrn_ray.model.msrn"], "`from ..name import` is seen"
    assert find_cycle(graph) == []


def test_a_cycle_would_be_found(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner/__init__.py").write_text("from ..low import thing\n")
    (package / "low.py").write_text("def late():\n    from . import high\n")
    (package / "high.py").write_text("if TYPE_CHECKING:\n    from . import low\nfrom . import inner\n")
    assert find_cycle(import_graph(package)) == []
    (package / "low.py").write_text("try:\n    from . import high\nexcept ImportError:\n    pass\n")
    assert set(find_cycle(import_graph(package))) == {"pack.low", "pack.high", "pack.inner"}


def test_readers_and_networks_import_only_what_lies_below_them() -> None:
    for name, wanted in import_graph(PACKAGE).items():
        below = {"msrn_ray.errors", "msrn_ray.storage", "msrn_ray.types"}
        for part in ("datasets", "model"):
            if name.startswith(f"msrn_ray.{part}"):
                allowed = below | ({"msrn_ray.config"} if part == "model" else {"msrn_ray.storage"})
                assert {other for other in wanted if not other.startswith(f"msrn_ray.{part}.")} <= allowed, name


def test_addresses_of_parts_of_files_are_written_in_one_place() -> None:
    marks = ("#bytes=", "#parquet=")
    writing = {
        path.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Call, ast.JoinedStr))
        for text in ast.iter_child_nodes(node)
        if isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value.startswith(marks)
    }
    assert writing == {"storage.py"}


def test_the_top_level_holds_only_what_is_agreed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    visible = {line.split("/")[0] for line in listed.splitlines() if not line.startswith(".")}
    assert "msrn_ray" in visible
    assert visible <= TOP_LEVEL


def test_everything_public_has_a_docstring() -> None:
    without = []
    for name, path in module_names(PACKAGE).items():
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            without.append(name)
        for node in tree.body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
                continue
            if name.endswith(".scenes_drawing") and node.name.startswith("draw_"):
                continue  # draw_sun(pen, rng) draws a sun
            if not ast.get_docstring(node):
                without.append(f"{name}.{node.name}")
    assert without == []
