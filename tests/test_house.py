"""The drawing of the house says what its imports are."""

from __future__ import annotations

from pathlib import Path

from tests.house import report

GROUND = "def small(a, b, c, d, e, f): ...\n"
UPPER = """
from studio_worker import ground, tower
from studio_worker.tower import top

class Desk:
    def __init__(self, a, b, c, d, e, f, *, g): ...
    @staticmethod
    def make(a, b, c, d, e, f, g): ...
    def keep(self, a, b, c, d, e, f): ...

@app.command()
def run(a, b, c, d, e, f, g): ...
"""


def house(folder: Path) -> list[str]:
    files = {
        "__init__.py": "",
        "ground.py": GROUND,
        "upper.py": UPPER,
        "tower/__init__.py": "from studio_worker.tower.top.room import x\n",
        "tower/top/__init__.py": "",
        "tower/top/room.py": "def f():\n    from studio_worker import left\n" + "    x = 1\n" * 60,
        "tower/cellar.py": "import studio_worker.ground\n" + "\n" * 300,
        "left.py": "import studio_worker.right\n",
        "right.py": "import studio_worker.left\n",
    }
    for name, text in files.items():
        path = folder / "studio_worker" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(report(folder))


def test_house_is_drawn_from_the_imports(tmp_path: Path) -> None:
    """Rooms stand above what they import, late ones too; rooms of a circle stand together, marked."""
    lines = house(tmp_path)
    assert lines[1:6] == [
        " 2  upper    → ground tower",
        " 1  tower    → ground left",
        " 0  ground",
        " 0  left   @ → right",
        " 0  right  @ → left",
    ]
    assert "rooms: 5, floors: 3, arrows between rooms: 6" in lines
    assert "longest chain: upper → tower → ground" in lines


def test_what_is_too_large_is_named(tmp_path: Path) -> None:
    """Long modules, long functions and signatures of many arguments are listed, but for commands' options."""
    lines = house(tmp_path)
    named = lines[lines.index("modules over 300 lines: 1") :]
    assert named == [
        "modules over 300 lines: 1",
        "   301  tower.cellar",
        "functions over 60 lines: 1",
        "    62  tower.top.room:1 f",
        "signatures over 6 arguments: 2",
        "     7  upper:8 make",
        "     7  upper:6 __init__",
    ]
