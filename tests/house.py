"""What the package looks like, drawn from its imports: ``python -m tests.house``, or ``make house``.

Rooms, which are packages and the modules beside them, stand on floors: one stands right above the highest
that it imports from. Rooms that import each other in a circle share a floor. Below the drawing is what is too
large. ``tests/test_architecture.py`` judges by the same reading. ``python -m tests.house TREE`` draws another
checkout.
"""

from __future__ import annotations

import argparse
import ast
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NAME = "studio_worker"
MOST_LINES = 300
"""Of a module."""
MOST_FUNCTION_LINES = 60
MOST_ARGUMENTS = 6
"""Of a function, its ``self`` not counted. The options of a command are its command line and no arguments."""

Needs = Mapping[str, set[str]]
"""What each imports of the others."""


class Import(NamedTuple):
    """One import: ``module`` (``studio.session``) wants ``target`` (``studio_worker.report.logs``)."""

    module: str
    target: str
    line: int
    in_function: bool
    for_types_only: bool

    @property
    def room(self) -> str:
        return self.module.partition(".")[0]

    def is_in(self, room: str) -> bool:
        """Whether the importing module is in a room, or a package of one, or is it."""
        return f"{self.module}.".startswith(f"{room}.")

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]

    @property
    def target_room(self) -> str | None:
        """The room of ours that is imported, or ``None`` for a library."""
        parts = self.target.split(".")
        return (parts[1] if len(parts) > 1 else "__init__") if parts[0] == NAME else None

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


class Module(NamedTuple):
    """One module, by its name below the package."""

    name: str
    lines: int
    tree: ast.Module


class Function(NamedTuple):
    """One function or method, and where it is."""

    place: str
    lines: int
    arguments: int


# --- reading ---


def read_modules(root: Path = ROOT) -> Iterator[Module]:
    """Every module of the package."""
    for path in sorted((root / NAME).rglob("*.py")):
        parts = path.relative_to(root / NAME).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        text = path.read_text(encoding="utf-8")
        yield Module(name, text.count("\n"), ast.parse(text, str(path)))


def read_imports(
    module: str, tree: ast.AST, root: Path = ROOT, *, inside: bool = False, types: bool = False
) -> Iterator[Import]:
    """Every import of a module, those inside functions and behind guards too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(module, name.name, node.lineno, inside, types)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative imports are not used in this house"
            source = node.module or ""
            for name in node.names:
                whole = f"{source}.{name.name}"  # which may be a module, or a name of one
                target = whole if _is_module(root, whole) else source
                yield Import(module, target, node.lineno, inside, types)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            is_guard = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from read_imports(module, node, root, inside=inside or is_function, types=types or is_guard)


def read_functions(module: str, tree: ast.AST, *, in_class: bool = False) -> Iterator[Function]:
    """Every function of a module, methods and functions inside functions too."""
    for node in ast.iter_child_nodes(tree):
        of_class = isinstance(node, ast.ClassDef) or in_class
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            of_class = False
            given = node.args
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            is_static = any(ast.unparse(each) == "staticmethod" for each in node.decorator_list)
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            arguments = 0 if _is_command(node) else count - (in_class and not is_static)
            yield Function(f"{module}:{node.lineno} {node.name}", lines, arguments)
        yield from read_functions(module, node, in_class=of_class)


def _is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def _is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether typer calls it, with a command line's options."""
    return "typer." in ast.unparse(node.args) or any(
        ".command(" in ast.unparse(d) for d in node.decorator_list
    )


class TooLarge(NamedTuple):
    """What is above the limits, the largest first: how large, and where."""

    modules: list[tuple[int, str]]
    functions: list[tuple[int, str]]
    signatures: list[tuple[int, str]]


def too_large(modules: Iterable[Module]) -> TooLarge:
    """What should be taken apart."""
    modules = list(modules)
    functions = [found for each in modules for found in read_functions(each.name, each.tree)]

    def over(most: int, found: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
        return sorted((each for each in found if each[0] > most), reverse=True)

    return TooLarge(
        over(MOST_LINES, ((each.lines, each.name) for each in modules)),
        over(MOST_FUNCTION_LINES, ((each.lines, each.place) for each in functions)),
        over(MOST_ARGUMENTS, ((each.arguments, each.place) for each in functions)),
    )


# --- drawing ---


def needs(imports: Iterable[Import], below: str = "") -> dict[str, set[str]]:
    """What the rooms import of each other: of the package, or ``below`` one of its packages."""
    found: dict[str, set[str]] = {}
    start = f"{below}." if below else ""
    for each in imports:
        target = each.target.removeprefix(f"{NAME}.")
        if each.target_room in {None, "__init__"} or not f"{each.module}.".startswith(start):
            continue
        room, wanted = (f"{name}."[len(start) :].partition(".")[0] for name in (each.module, target))
        wants = found.setdefault(room, set()) if room else set()
        if wanted and wanted != room and f"{target}.".startswith(start):
            wants.add(wanted)
            found.setdefault(wanted, set())
    return found


def floors(wants: Needs) -> list[list[list[str]]]:
    """The floors from the ground up, each with its rooms; those of one circle together."""
    reached = {room: _reachable(room, wants) for room in wants}
    circles = {
        room: frozenset({room} | {each for each in reached[room] if room in reached[each]}) for room in wants
    }
    height: dict[frozenset[str], int] = {}

    def rise(circle: frozenset[str]) -> int:
        if circle not in height:
            below = {circles[each] for room in circle for each in wants[room]} - {circle}
            height[circle] = 1 + max(map(rise, below), default=-1)
        return height[circle]

    for circle in circles.values():
        rise(circle)
    levels: list[list[list[str]]] = [[] for _ in range(max(height.values(), default=-1) + 1)]
    for circle, level in height.items():
        levels[level].append(sorted(circle))
    return [sorted(level) for level in levels]


def longest_chain(wants: Needs) -> list[str]:
    """One of the longest ways down, from the top."""
    levels = floors(wants)
    chain: list[str] = []
    for level in reversed(levels):
        rooms = [room for circle in level for room in circle]
        below = wants[chain[-1]] if chain else rooms
        chain += [room for room in sorted(rooms) if room in below][:1]
    return chain


def _reachable(room: str, wants: Needs) -> set[str]:
    seen: set[str] = set()
    ahead = [room]
    while ahead:
        new = wants[ahead.pop()] - seen
        seen |= new
        ahead += new
    return seen


def draw(wants: Needs) -> Iterator[str]:
    """The floors from the top, one line a room and what it imports."""
    levels = floors(wants)
    width = max(map(len, wants), default=0)
    for number, level in reversed(list(enumerate(levels))):
        for circle in level:
            for room in circle:
                start = f"{number:>2}  {room:<{width}}{' @' if len(circle) > 1 else '  '}"
                text = f"{start} → {' '.join(sorted(wants[room]))}" if wants[room] else start.rstrip()
                yield from textwrap.wrap(text, 118, subsequent_indent=" " * (len(start) + 3)) or [text]


def _table(title: str, over: Sequence[tuple[int, str]]) -> Iterator[str]:
    yield f"{title}: {len(over)}"
    yield from (f"  {size:>4}  {what}" for size, what in over)


def report(root: Path) -> Iterator[str]:
    """Everything, line by line."""
    modules = list(read_modules(root))
    imports = [found for each in modules for found in read_imports(each.name, each.tree, root)]
    rooms = needs(imports)
    yield "The house, from its imports (@: in a circle)"
    yield from draw(rooms)
    packages = {each.name.rpartition(".")[0] for each in modules if each.name.count(".") >= 2}
    for package in sorted({each.rpartition(".")[0] or each for each in packages}):
        yield f"\nInside {package}/"
        yield from draw(needs(imports, package))
    yield ""
    yield f"modules: {len(modules)}, lines: {sum(each.lines for each in modules)}"
    yield f"rooms: {len(rooms)}, floors: {len(floors(rooms))}, arrows between rooms: {_arrows(rooms)}"
    yield f"longest chain: {' → '.join(longest_chain(rooms))}"
    large = too_large(modules)
    yield from _table(f"modules over {MOST_LINES} lines", large.modules)
    yield from _table(f"functions over {MOST_FUNCTION_LINES} lines", large.functions)
    yield from _table(f"signatures over {MOST_ARGUMENTS} arguments", large.signatures)


def _arrows(wants: Needs) -> int:
    return sum(map(len, wants.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", nargs="?", type=Path, default=ROOT, metavar="TREE", help="a checkout")
    print("\n".join(report(parser.parse_args().tree)))
