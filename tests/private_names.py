"""Names that libraries keep to themselves: where this package uses one all the same, and why it must.

Everything else with a leading underscore is ours. Private names go away without notice: one that the CUDA
build of torch lacks kept every box with a GPU from becoming ready. So each is listed with code that fails
where the installed library has it no longer; that public names are there is seen from the source itself.
``python tests/private_names.py`` does both in whatever environment its interpreter belongs to, and needs
nothing of this package or of pytest.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class PrivateName(NamedTuple):
    """A library's private name that cannot be done without.

    Args:
        name: the name itself.
        users: the modules of this package that use it.
        proof: code that runs where the library has it.
        why: what no public name does.
    """

    name: str
    users: tuple[str, ...]
    proof: str
    why: str


_COMPILERS = (
    "import os; os.environ |= {'TORCHDYNAMO_SUPPRESS_ERRORS': '1', 'TORCHINDUCTOR_COMPILE_THREADS': '1'}"
)
"""Read when either is imported, which the other may do."""

UNAVOIDABLE = (
    PrivateName(
        "torch._dynamo",
        ("engine.rendering.compiling",),
        f"{_COMPILERS}; import torch._dynamo.config as c; assert c.suppress_errors",
        "torch has the logger of what cannot be compiled under this name alone",
    ),
    PrivateName(
        "torch._inductor",
        ("engine.rendering.compiling",),
        f"{_COMPILERS}; import torch._inductor.config as c; assert c.compile_threads == 1",
        "torch has the logger of what its compiler says under this name alone",
    ),
    PrivateName(
        "_keep_in_fp32_modules",
        ("engine.loading",),
        "import diffusers, transformers\n"
        "diffusers.ModelMixin._keep_in_fp32_modules\n"
        "assert transformers.T5EncoderModel._keep_in_fp32_modules == ['wo']",
        "a class says only here which of its weights half precision spoils",
    ),
    PrivateName(
        "HTTPConnection._new_conn",
        ("network.connecting",),
        "from urllib3.connection import HTTPConnection; HTTPConnection('h')._new_conn",
        "an address can be checked before it is connected to nowhere else",
    ),
    PrivateName(
        "_dns_host",
        ("network.connecting",),
        "from urllib3.connection import HTTPConnection; assert HTTPConnection('h')._dns_host == 'h'",
        "the address to connect to, apart from the name that the certificate is for",
    ),
)

IN_TESTS = (
    PrivateName(
        "_python_dispatch",
        ("played_gpu", "live_memory", "test_waiting"),
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "torch documents TorchDispatchMode, which sees every operation, under this name alone",
    ),
    PrivateName(
        "_local_scalar_dense",
        ("live_memory",),
        "import torch; torch.ops.aten._local_scalar_dense",
        "the operation behind item(), which the meta device cannot do",
    ),
    PrivateName(
        "_to_copy",
        ("live_memory",),
        "import torch; torch.ops.aten._to_copy",
        "the operation behind to(), which the meta device cannot do for another device",
    ),
)
"""Those that only tests use, by their modules."""

_LIBRARY = re.compile(
    r"(?:torch|diffusers|transformers|accelerate|safetensors|gguf|onnxruntime|urllib3)(?:\.\w+)+"
)
"""A string that is a dotted name inside one of them: a logger's, or one to import or replace."""

LIBRARIES = {"torch", "diffusers", "transformers", "accelerate", "safetensors", "gguf", "onnxruntime"}

PACKAGE = Path(__file__).parents[1] / "studio_worker"

_PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit"}
"""Documented names of named tuples and of ``os``."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_" and name not in _PUBLIC


def own_names(trees: Iterable[ast.AST]) -> set[str]:
    """The private names that ``trees`` define: functions, classes, variables, and attributes of ``self``."""
    own: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        for target in _targets(node):
            if isinstance(target, ast.Name):
                own.add(target.id)
            elif isinstance(target, ast.Attribute) and ast.unparse(target.value) in {"self", "cls"}:
                own.add(target.attr)
    return {name for name in own if is_private(name)}


def _targets(node: ast.AST) -> Iterator[ast.expr]:
    # Not "self._x += 1", which needs one that is there already: in a subclass, the library's.
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign | ast.NamedExpr):
        targets = [node.target]
    for target in targets:
        yield from target.elts if isinstance(target, ast.Tuple) else [target]


def foreign_names(tree: ast.AST, own: set[str]) -> Iterator[tuple[str, int]]:
    """The private names of libraries that ``tree`` uses, each with its line.

    Args:
        own: private names that are not any library's.
    """
    imported = {
        (name.asname or name.name).partition(".")[0]: name.name
        if isinstance(node, ast.Import)
        else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    libraries = {name for name, source in imported.items() if not _is_own_module(source or "")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for whole in _imported(node):
                if (found := _first_private(whole)) and not _is_own_module(whole):
                    yield found, node.lineno
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            path = ast.unparse(node)
            root = path.partition(".")[0]
            if root in libraries:
                yield _first_private(path) or node.attr, node.lineno
            elif node.attr not in own or root == "super()":
                yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        }:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own:
                yield str(name.value), node.lineno
        elif isinstance(node, ast.Constant) and (found := _in_text(str(node.value))):
            yield found, node.lineno


def _in_text(text: str) -> str:
    return _first_private(text) if _LIBRARY.fullmatch(text) else ""


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    source = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    return [f"{source}{name.name}" for name in node.names]


def _is_own_module(name: str) -> bool:
    return name.partition(".")[0] in {"studio_worker", "tests", "__future__"}


def _first_private(path: str) -> str:
    """``torch._C`` of ``torch._C._cuda_init``, ``_x`` of ``diffusers.loaders._x``; empty where none is."""
    parts = path.split(".")
    at = next((index for index, part in enumerate(parts) if is_private(part)), None)
    if at is None:
        return ""
    return f"{parts[0]}.{parts[at]}" if at == 1 else parts[at]


def missing(names: Iterable[PrivateName] = (*UNAVOIDABLE, *IN_TESTS)) -> dict[str, str]:
    """Those of ``names`` that the installed libraries do not have, and how that shows."""
    found = {}
    for name in names:
        try:
            exec(name.proof, {})
        except Exception as error:
            found[name.name] = f"{type(error).__name__}: {error}"
    return found


def used_names(tree: ast.AST) -> set[str]:
    """The dotted names of ``LIBRARIES`` that ``tree`` uses, e.g. ``torch.cuda.mem_get_info``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_of_library(node.module or ""):
            names.update(_imported(node))
        elif isinstance(node, ast.Attribute) and _is_of_library(path := ast.unparse(node)):
            names.update(re.findall(r"^[\w.]+$", path))
    return names


def unknown(names: Iterable[str]) -> dict[str, str]:
    """Those of ``names`` that the installed libraries do not have, and how that shows."""
    found = {}
    for name in names:
        module, *rest = name.split(".")
        try:
            value = importlib.import_module(module)
            for index, part in enumerate(rest):
                if value is None:  # torch.version.cuda, where there is none
                    break
                if not hasattr(value, part) and inspect.ismodule(value):
                    importlib.import_module(".".join((module, *rest[: index + 1])))
                value = getattr(value, part)
        except (ImportError, AttributeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _is_of_library(path: str) -> bool:
    return path.partition(".")[0] in LIBRARIES


def all_used() -> set[str]:
    """What the whole package uses."""
    texts = (path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    return set().union(*(used_names(ast.parse(text)) for text in texts))


def main() -> int:
    names = all_used()
    gone = missing() | unknown(names)
    for name, problem in gone.items():
        print(f"{name}: {problem}")
    print(f"{len(UNAVOIDABLE)} private and {len(names)} public names, {len(gone)} missing")
    return bool(gone)


if __name__ == "__main__":
    sys.exit(main())
