"""The house rules that nobody should have to check by hand: who may import whom, how tests are written.

Everything is read from the source with ``ast``, so that imports inside functions count too.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys

import pytest

from tests.house import ROOT, read_imports, read_modules, too_large
from tests.private_names import IN_TESTS, UNAVOIDABLE, foreign_names, own_names

FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(rooms.split())
    for rooms in (
        "context errors files formats jobs models plain sample_model wording __init__",
        "box network",
        "report",
        "transfer",
        "config download spool",
        "store engine",
        "work",
        "studio",
        "appliance local_studio",
        "doctor demo service",
        "gpu_check",
        "cli",
        "__main__",
    )
)
"""A room, which is a package or a module beside the packages, imports only from lines above its own; rooms on
one line do not know each other, but for those of the first, the ground. A new module of a package needs no
entry.
"""

INSIDE = {
    "engine": ("contract parameters", "files pictures sampling", "families", "memory", "loras", "rendering"),
    "studio": ("wire backoff", "http", "session", "link"),
}
"""The order inside packages that have packages of their own. What is not named here joins or serves all."""

STRANGERS = (
    (
        "work.lane",
        {"studio", "store", "spool", "download", "config", "report"},
        "it declares what it needs of them",
    ),
    ("engine", {"store", "download", "spool", "report", "config"}, "it gets files and gives a picture"),
    ("studio", {"store", "download", "box", "config"}, "it gets told the situation"),
    ("download", {"box", "config"}, "progress goes out through a callback"),
    ("store", {"config"}, "it is given folders and policies"),
    (
        "local_studio",
        {"store", "spool", "download", "config", "report", "engine", "work"},
        "it is a program of its own",
    ),
)
"""Rooms, or modules, above others that still do not know them, and why."""

MANY_ARGUMENTS = {"download_file"}
"""What download.py is for: a public function, whose arguments have their defaults."""

LIBRARIES = {
    "torch": {"engine", "gpu_check"},
    "diffusers": {"engine", "gpu_check"},
    "transformers": {"engine", "gpu_check"},
    "accelerate": {"engine"},
    "safetensors": {"engine", "gpu_check"},
    "gguf": {"engine", "gpu_check"},
    "onnxruntime": {"engine"},
    "websockets": {"studio.session"},
    "sdnotify": {"report"},
    "requests": {"network", "transfer", "studio.http", "doctor"},
    "boto3": {"local_studio.pictures"},
    "botocore": {"local_studio.pictures"},
    "starlette": {"local_studio"},
    "uvicorn": {"local_studio"},
    "sqlalchemy": {"local_studio"},
    "alembic": {"local_studio.storage"},
    "typer": {"cli"},
    "rich": {"cli", "demo"},
    "pydantic_settings": {"config"},
    "prometheus_client": {"report", "local_studio"},
}
"""The libraries that only certain rooms (or packages of a room) may use."""


MODULES = list(read_modules())
ALL = [found for each in MODULES for found in read_imports(each.name, each.tree)]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def test_reader_of_imports_sees_every_kind() -> None:
    """The rules below judge all imports: of modules, of names, inside functions and behind guards."""
    source = """
import torch.nn
from studio_worker import __version__
from studio_worker.report import logs
from studio_worker.studio.wire import Claim
if TYPE_CHECKING:
    import diffusers
class A:
    async def f(self):
        with x:
            from studio_worker.store import Store
"""
    found = [
        (each.target, each.target_room, each.in_function, each.for_types_only)
        for each in read_imports("x", ast.parse(source))
    ]
    assert found == [
        ("torch.nn", None, False, False),
        ("studio_worker", "__init__", False, False),
        ("studio_worker.report.logs", "report", False, False),
        ("studio_worker.studio.wire", "studio", False, False),
        ("diffusers", None, False, True),
        ("studio_worker.store", "store", True, False),
    ]


def test_every_room_has_its_place() -> None:
    """A new package, or a module beside the packages, is given a floor before it is used."""
    assert {name.partition(".")[0] for name, _, _ in MODULES} == FLOOR.keys()
    assert sum(map(len, FLOORS)) == len(FLOOR), "a room stands on two floors"


def test_imports_run_one_way() -> None:
    """A room imports only rooms below it, so that each can be read and changed by itself."""
    wrong = [
        str(found)
        for found in ALL
        if found.target_room is not None
        and found.target_room != found.room
        and not FLOOR[found.target_room] < FLOOR[found.room]
        and not FLOOR[found.target_room] == FLOOR[found.room] == 0
    ]
    assert wrong == []


@pytest.mark.parametrize("room", INSIDE)
def test_imports_run_one_way_inside(room: str) -> None:
    """Inside the large packages imports run one way too."""
    floor = {name: number for number, names in enumerate(INSIDE[room]) for name in names.split()}
    wrong = []
    for found in ALL:
        source, target = (*found.module.split("."), ""), (*found.target.split(".")[1:], "", "")
        if source[0] == target[0] == room and source[1] in floor and target[1] in floor:
            is_down = floor[target[1]] < floor[source[1]] or target[1] == source[1]
            if not is_down and not (floor[target[1]] == floor[source[1]] == 0):
                wrong.append(str(found))
    assert wrong == []


def test_no_module_needs_itself() -> None:
    """There is no circle of imports, not even inside a package."""
    needs: dict[str, set[str]] = {}
    for found in ALL:
        target = found.target.removeprefix("studio_worker.")
        if found.target_room is not None and target != found.module:
            needs.setdefault(found.module, set()).add(target)
    graphlib.TopologicalSorter(needs).prepare()


@pytest.mark.parametrize(("room", "strangers", "why"), STRANGERS, ids=[room for room, _, _ in STRANGERS])
def test_rooms_do_not_know_each_other(room: str, strangers: set[str], why: str) -> None:
    """The worker, the source, the files and the engine are joined in the service and nowhere else."""
    wrong = [str(found) for found in ALL if found.is_in(room) and found.target_room in strangers]
    assert wrong == [], why


def test_local_studio_shares_only_the_wire_with_the_worker() -> None:
    """The local studio knows of the worker's studio room nothing but the frames and bodies."""
    shared = {f.target for f in ALL if f.room == "local_studio" and f.target_room == "studio"}
    assert {target.split(".")[:3][-1] for target in shared} <= {"studio", "wire"}
    names = {
        name.name
        for module, _, tree in MODULES
        if module.startswith("local_studio")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "studio_worker.studio"
        for name in node.names
    }
    assert names <= {"wire"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_stays_in_its_rooms(library: str) -> None:
    """torch is the engine's, the WebSocket is the session's, and so on: each library has its rooms."""
    allowed = LIBRARIES[library]
    users = [found for found in ALL if found.library == library]
    if library in {"torch", "websockets", "sdnotify"}:
        assert users, "nobody uses it: this rule is out of date"
    assert [str(found) for found in users if not any(map(found.is_in, allowed))] == []


def test_imports_inside_functions_are_for_what_is_heavy() -> None:
    """Only the commands and the engine import late; elsewhere a missing library shows at once."""
    wrong = [str(f) for f in ALL if f.in_function and f.room not in {"engine", "cli"}]
    assert wrong == []


def test_imports_for_types_only_hide_no_cycle() -> None:
    """Nothing of our own is imported for type checking only: such an import hides a cycle."""
    assert [str(f) for f in ALL if f.for_types_only and f.target_room is not None] == []


@pytest.mark.parametrize("module", ["service", "engine", "cli", "studio.session.session", "local_studio"])
def test_importing_what_starts_loads_no_torch(module: str) -> None:
    """The service, its session and its commands start without torch: it is loaded for the first job."""
    assert not loaded_with(module) & {"torch", "diffusers", "transformers", "numpy", "gguf", "onnxruntime"}


def test_importing_the_commands_loads_no_http() -> None:
    """A command that only reads files answers soon: libraries for HTTP come with their first use."""
    assert not loaded_with("cli") & {"requests", "urllib3", "websockets", "starlette", "uvicorn", "rich"}


def loaded_with(module: str) -> set[str]:
    """The libraries that are loaded where ``module`` of ours is imported alone."""
    script = f"import sys, studio_worker.{module}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "studio_worker" in loaded
    return loaded


def test_private_names_of_libraries_are_used_only_where_they_must_be() -> None:
    """A library's private name goes without notice: each in use is listed, with its reason, and no other."""
    own = own_names(tree for _, _, tree in MODULES)
    used = {(name, module) for module, _, tree in MODULES for name, _ in foreign_names(tree, own)}
    assert used == {(each.name, user) for each in UNAVOIDABLE for user in each.users}


def test_tests_use_no_private_name_of_a_library_that_the_package_does_not() -> None:
    """A test rests on no library's private name either, but on those that the package cannot do without."""
    paths = [path for room in ("tests", "packaging") for path in (ROOT / room).rglob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    own = own_names([*trees.values(), *(tree for _, _, tree in MODULES)])
    known = {each.name for each in UNAVOIDABLE}
    known_in = {(each.name, user) for each in IN_TESTS for user in each.users}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, tree in trees.items()
        if "tests" in path.relative_to(ROOT).parts
        and path.name != "test_private_names.py"  # which has examples
        for name, line in foreign_names(tree, own)
        if name not in known and (name, path.stem) not in known_in
    ]
    assert wrong == []


def test_importing_does_nothing() -> None:
    """No module does anything when it is imported: environment, memory, collections and signals are settled
    by whoever starts a process. Only the commands put themselves together then.
    """
    wrong = [
        f"{name}:{statement.lineno}"
        for name, _, tree in MODULES
        for statement in tree.body
        if name not in {"cli.app", "__main__"}
        and (
            (isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant))
            or isinstance(statement, ast.For | ast.While | ast.With | ast.Try | ast.Delete | ast.AugAssign)
            or (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Subscript))
        )
    ]
    assert wrong == []


def test_nothing_is_too_large() -> None:
    """No module has more than 300 lines, no function more than 60, and none takes more than 6 arguments, but
    for the one that others call by the names of its arguments.
    """
    large = too_large(MODULES)
    assert (large.modules, large.functions) == ([], [])
    assert [place for _, place in large.signatures if place.split(" ")[-1] not in MANY_ARGUMENTS] == []


def test_every_module_says_what_it_owns() -> None:
    """Each module that holds anything opens with a docstring."""
    assert [name for name, _, tree in MODULES if tree.body and not ast.get_docstring(tree)] == []


# --- the tests themselves ---


def test_every_test_states_its_promise() -> None:
    """Each test has a docstring of one sentence, so that the tests can be read as the manual."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("test") and not (ast.get_docstring(node) or "").endswith((".", "?", "!")):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert wrong == []


def test_every_test_file_is_run() -> None:
    """A file with tests in it is named so that pytest finds it."""
    wrong = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if not path.name.startswith("test_")
        and any(
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
            for node in ast.parse(path.read_text(encoding="utf-8")).body
        )
    ]
    assert wrong == []
