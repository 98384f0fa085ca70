"""The rules of the layout: allowed imports, use of Ray, size limits, and side effects of imports."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

import msrn_ray

PACKAGE = Path(msrn_ray.__file__).parent
ROOT = PACKAGE.parent
LAZY = msrn_ray._MODULES  # names that `msrn_ray` loads from its modules at their first use
TOP_LEVEL = {"msrn_ray", "cluster", "tuning", "tests", "pyproject.toml", "README.md"}

# From the ground up: a room may import only from earlier rings
RINGS = (
    {"types", "errors", "import_path"},
    {"io"},
    {"settings"},
    {"data_settings"},
    {"config"},
    {"presets", "labels"},
    {"model", "datasets"},
    {"training", "doctor"},
    {"runs"},
    {"inference", "official"},
    {"ray_cluster"},
    {"ray_data"},
    {"ray_train"},
    {"tuning"},
    {"cli"},
    {"__main__", "tuning/search"},
)

RAY_ROOMS = {"ray_cluster", "ray_data", "ray_train", "tuning", "tuning/search"}
RAY_FREE = {  # modules of these rooms that do not import Ray themselves
    *("ray_cluster", "ray_cluster.cluster_yaml", "ray_cluster.private_api", "ray_cluster.spot_scorer"),
    *("ray_data", "ray_train", "ray_train.object_store"),
}
DATA_TABLES = {"msrn_ray.datasets.scenes.sprites"}  # longer than 300 lines: one drawing per object

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 60, 6
MAX_CLASS_LINES = {"msrn_ray.ray_train.worker.Worker": 150}


def modules() -> dict[str, Path]:
    """Return the file of every module of the product by its dotted name. A package goes by its name alone."""
    found = {}
    for package in (PACKAGE, ROOT / "tuning"):
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    """Return the room of a module: the package or file below msrn_ray, `tuning`, or the script of `tuning`."""
    if module == "tuning.search":
        return "tuning/search"
    parts = module.split(".")
    return "tuning" if parts[0] == "tuning" else (parts[1] if len(parts) > 1 else "")


def imports(node: ast.AST, *, in_functions: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements that can run: none under TYPE_CHECKING, and those in functions if wanted."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not in_functions:
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            for statement in child.orelse:
                yield from imports(ast.Module([statement], []), in_functions=in_functions)
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        else:
            yield from imports(child, in_functions=in_functions)


def targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> list[str]:
    """Return the absolute dotted names of the modules, or of names in modules, that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = module.split(".") if is_package else module.split(".")[:-1]
        parents = package[: len(package) - node.level + 1]
        base = ".".join([*parents, *filter(None, [base])])
    return [f"{base}.{alias.name}" for alias in node.names]


def imported(module: str, tree: ast.AST, is_package: bool, *, in_functions: bool = True) -> set[str]:
    """Return everything that a module imports, as dotted names."""
    nodes = imports(tree, in_functions=in_functions)
    return {target for node in nodes for target in targets(node, module, is_package)}


def module_of(target: str) -> str:
    """Return the module that holds an imported name. A lazy name of `msrn_ray` lies in another module."""
    package, _, name = target.rpartition(".")
    if package == "msrn_ray" and name in LAZY:
        return f"msrn_ray.{LAZY[name]}"
    return target if target in MODULES else package


def import_graph(*, in_functions: bool = True) -> dict[str, set[str]]:
    """Return the modules of the product that every module imports. The lazy names of `msrn_ray` count for who imports them."""
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        wanted = imported(name, TREES[name], path.name == "__init__.py", in_functions=in_functions)
        graph[name] = {module_of(target) for target in wanted} & set(MODULES)
    graph["msrn_ray"] = set()
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the names of a cycle, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for neighbour in sorted(graph.get(name, set())):
            if cycle := visit(neighbour, [*path, name]):
                return cycle
        done.add(name)
        return []

    return next((cycle for name in graph if (cycle := visit(name, []))), [])


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports from a room of the same or a later ring."""
    ring = {room: number for number, rooms in enumerate(RINGS) for room in rooms}
    return [
        f"{module} -> {target}"
        for module, wanted in graph.items()
        for target in sorted(wanted)
        if module != "msrn_ray" and target != "msrn_ray"
        if (source := room_of(module)) != (sink := room_of(target))
        if ring[sink] >= ring[source]
    ]


def test_every_room_has_a_ring() -> None:
    rooms = {room_of(name) for name in MODULES} - {""}
    assert rooms == set(chain.from_iterable(RINGS))


def test_no_room_imports_upward() -> None:
    graph = import_graph()
    assert "msrn_ray.types" in graph["msrn_ray.datasets.protocol"]
    assert "msrn_ray.training.distributed" in graph["msrn_ray.training.engine"], "the graph has `from . import name`"
    assert "msrn_ray.ray_train.driver" in graph["msrn_ray.cli.app"], "the graph has imports inside functions"
    assert upward_imports(graph) == []


def test_readers_and_networks_import_only_what_lies_below_them() -> None:
    allowed = {"datasets": {"errors", "io", "types"}, "model": {"errors", "io", "settings", "types"}}
    above = {
        "msrn_ray.datasets.protocol",
        "msrn_ray.datasets.registry",
    }  # these choose and split data sets by the config
    for name, wanted in import_graph().items():
        room = room_of(name)
        if room in allowed and name not in above:
            assert {room_of(target) for target in wanted} - {room, ""} <= allowed[room], name


def test_upward_import_would_be_found() -> None:
    graph = {"msrn_ray.io.storage": {"msrn_ray.ray_train.driver"}, "msrn_ray.cli.app": {"msrn_ray.io.storage"}}
    assert upward_imports(graph) == ["msrn_ray.io.storage -> msrn_ray.ray_train.driver"]


def test_lazy_name_is_an_import_of_its_module() -> None:
    wanted = imported("msrn_ray.io.storage", ast.parse("from .. import train"), False)
    assert {module_of(target) for target in wanted} == {"msrn_ray.ray_train.driver"}
    assert module_of("msrn_ray.model") == "msrn_ray.model"
    assert module_of("msrn_ray.errors.UserError") == "msrn_ray.errors"


def test_no_import_cycle() -> None:
    assert find_cycle(import_graph()) == []
    rooms: dict[str, set[str]] = {}
    for module, wanted in import_graph().items():
        inside = {room_of(target) for target in wanted} - {room_of(module), ""}
        rooms.setdefault(room_of(module), set()).update(inside)
    assert find_cycle(rooms) == []


def test_cycle_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert find_cycle(graph) == ["a", "b", "c", "a"]
    assert find_cycle(graph | {"c": set()}) == []


def test_imports_in_functions_and_type_checking_differ() -> None:
    tree = ast.parse(
        "if TYPE_CHECKING:\n    import a\nelse:\n    import e\ntry:\n    import b\nfinally:\n    pass\ndef f():\n    from . import c\n"
    )
    assert imported("pack.module", tree, False) == {"b", "e", "pack.c"}
    assert imported("pack.module", tree, False, in_functions=False) == {"b", "e"}
    assert imported("pack.inner", ast.parse("from ..low import d"), True) == {"pack.low.d"}


def modules_with_ray(trees: dict[str, ast.Module]) -> set[str]:
    """Return the modules that import Ray."""
    return {
        name
        for name, tree in trees.items()
        if any(target.split(".")[0] == "ray" for target in imported(name, tree, MODULES[name].name == "__init__.py"))
    }


def test_only_ray_rooms_import_ray() -> None:
    importing = modules_with_ray(TREES)
    assert {room_of(name) for name in importing} <= RAY_ROOMS
    in_rooms = {name for name in MODULES if name.startswith("msrn_ray.") and room_of(name) in RAY_ROOMS}
    assert {name.removeprefix("msrn_ray.") for name in in_rooms - importing} == RAY_FREE
    assert "tuning.driver" in importing
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"msrn_ray/ray_*/*.py" = ["TID251"]' in settings, "the linter has the same list"


@pytest.mark.parametrize("statement", ["import ray.train", "from ray import data", "import torch, ray as r"])
def test_ray_in_another_room_would_be_found(statement: str) -> None:
    offence = ast.parse(f"def fit():\n    {statement}")
    harmless = ast.parse("from ..ray_train.driver import train\nfrom . import ray\nimport raylib")
    assert modules_with_ray({"msrn_ray.io.storage": offence, "msrn_ray.cli.app": harmless}) == {"msrn_ray.io.storage"}


def oversized(module: str, text: str) -> list[str]:
    """Return what is larger than the limits in the source of a module."""
    too_large = []
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES and module not in DATA_TABLES:
        too_large.append(f"{module}: {lines} lines")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        name, length = f"{module}.{node.name}", (node.end_lineno or 0) - node.lineno + 1
        is_class = isinstance(node, ast.ClassDef)
        if length > (MAX_CLASS_LINES.get(name, length) if is_class else MAX_FUNCTION_LINES):
            too_large.append(f"{name}: {length} lines")
        if not isinstance(node, ast.ClassDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            parameters = len(arguments) - (bool(arguments) and arguments[0].arg in ("self", "cls"))
            if parameters > MAX_PARAMETERS:
                too_large.append(f"{name}: {parameters} parameters")
    return too_large


def test_files_functions_parameters_and_worker_stay_small() -> None:
    found = chain.from_iterable(oversized(name, path.read_text(encoding="utf-8")) for name, path in MODULES.items())
    assert list(found) == []
    assert "class Worker:" in MODULES["msrn_ray.ray_train.worker"].read_text(encoding="utf-8")


def test_oversize_would_be_found() -> None:
    function = "def f(self, a, b, /, c, d, *, e, {}):\n" + 59 * "    a()\n"
    assert oversized("m", function.format("f")) == []
    assert oversized("m", function.format("f, g")) == ["m.f: 7 parameters"]
    assert oversized("m", f"class C:\n    async {function.format('f').replace(chr(10), chr(10) + '    ')}    a()") == [
        "m.f: 61 lines"
    ]
    worker = "msrn_ray.ray_train.worker"
    assert oversized(worker, "class Worker:\n" + 149 * "    a = 1\n") == []
    assert oversized(worker, "class Worker:\n" + 150 * "    a = 1\n") == [f"{worker}.Worker: 151 lines"]
    assert oversized("m", 300 * "a = 1\n") == []
    assert oversized("m", 301 * "a = 1\n") == ["m: 301 lines"]
    assert oversized("msrn_ray.datasets.scenes.sprites", 301 * "a = 1\n") == []


def in_fresh_process(code: str, folder: Path) -> dict[str, object]:
    """Run code in a new interpreter with an empty home; return the JSON on the last line of its output."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    content: dict[str, object] = json.loads(process.stdout.splitlines()[-1])
    return content


def test_importing_the_core_avoids_ray_and_side_effects(tmp_path: Path) -> None:
    without_ray = {"msrn_ray.ray_cluster.cluster_yaml"}
    core = [name for name in MODULES if room_of(name) not in RAY_ROOMS or name in without_ray]
    assert len(core) > 30
    libraries_and_modules = {
        target if isinstance(node, ast.Import) else target.rpartition(".")[0]
        for name in core
        for node in imports(TREES[name], in_functions=False)
        for target in targets(node, name, MODULES[name].name == "__init__.py")
    }
    libraries = sorted(
        name for name in libraries_and_modules if name.split(".")[0] not in {"msrn_ray", "tuning", "__future__"}
    )
    assert {"torch", "tyro", "pydantic", "PIL"} <= {library.split(".")[0] for library in libraries}
    code = f"""
import importlib, json, logging, os, signal, sys, threading, warnings
from pathlib import Path
for name in {libraries}:  # effects of importing the libraries do not count
    importlib.import_module(name)
files = lambda: sorted(map(str, Path().rglob("*")))
state = lambda: [dict(os.environ), logging.root.handlers[:], logging.root.level, os.getcwd(), threading.active_count(),
                 warnings.filters[:], signal.getsignal(signal.SIGINT), sys.excepthook, __import__("torch").initial_seed(),
                 __import__("torch").get_num_threads()]
old_state, old_files = state(), files()
offender = None
for name in {core}:
    importlib.import_module(name)
    if offender is None and "ray" in sys.modules:
        offender = name
same = [a == b for a, b in zip(old_state, state())]
print(json.dumps({{"offender": offender, "same": same, "new": sorted(set(files()) - set(old_files))}}))
"""
    result = in_fresh_process(code, tmp_path)
    assert result["offender"] is None
    assert result["new"] == []
    assert result["same"] == [True] * 10


def test_package_imports_lazily_only_training_imports_ray(tmp_path: Path) -> None:
    ray_modules = sorted(name for name in MODULES if room_of(name) in RAY_ROOMS and not name.startswith("tuning"))
    code = f"""
import importlib, json, os, sys
from pathlib import Path
import msrn_ray
heavy = [name for name in ("torch", "ray", "numpy", "pydantic") if name in sys.modules]
for name in msrn_ray.__all__:
    if name not in ("train", "TrainResult"):
        getattr(msrn_ray, name)
early = "ray" in sys.modules
import ray.train.torch, ray.util.queue, matplotlib.figure, pycocotools.coco  # effects of importing the libraries do not count
files = lambda: sorted(map(str, Path().rglob("*")))
old_environment, old_files = dict(os.environ), files()
for name in {ray_modules}:
    importlib.import_module(name)
kinds = {{name: type(getattr(msrn_ray, name)).__name__ for name in msrn_ray.__all__}}
print(json.dumps({{"heavy": heavy, "early": early, "kinds": kinds, "up": ray.is_initialized(),
                  "same": dict(os.environ) == old_environment, "new": sorted(set(files()) - set(old_files))}}))
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


@pytest.mark.parametrize("module", ["msrn_ray.ray_train.failures", "tuning.trial_callback"])
def test_ray_trains_controller_starts_without_torch(module: str, tmp_path: Path) -> None:
    """These modules run in Ray Train's controller. Importing torch would add seconds to every start."""
    code = f"import json, sys, {module}; print(json.dumps({{'torch': 'torch' in sys.modules}}))"
    assert in_fresh_process(code, tmp_path) == {"torch": False}


def test_only_byte_ranges_builds_its_addresses() -> None:
    marks = ("#bytes=", "#parquet=")
    writing = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Call, ast.JoinedStr))
        for text in ast.iter_child_nodes(node)
        if isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value.startswith(marks)
    }
    assert writing == {"msrn_ray.io.byte_ranges"}


def test_top_level_holds_only_agreed_entries() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    visible = {line.split("/")[0] for line in listed.splitlines() if not line.startswith(".")}
    assert "msrn_ray" in visible
    assert visible <= TOP_LEVEL


def test_everything_public_has_a_docstring() -> None:
    missing = []
    for name, tree in TREES.items():
        if tree.body and not ast.get_docstring(tree):
            missing.append(name)
        for node in tree.body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
                continue
            if name.endswith(".sprites") and node.name.startswith("draw_"):
                continue  # draw_sun(pen, rng) draws a sun
            if not ast.get_docstring(node):
                missing.append(f"{name}.{node.name}")
    assert missing == []
