"""Man pages, completions, recipes, examples and the table of failures: what they say is so."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker import download, errors
from studio_worker.config.required import read_required
from studio_worker.demo import write_configuration
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from studio_worker.report.journal import field_name
from studio_worker.sample_model import WEIGHTS
from tests.fakes.servers import FileServer
from tests.lab.service import READY_S, await_status, queue_synthetic, reload, require

ROOT = Path(__file__).parents[1]
PACKAGING = ROOT / "packaging"
RECIPES = PACKAGING / "examples" / "journal-recipes.txt"


@pytest.fixture(scope="module")
def documents() -> dict[Path, str]:
    """What `make docs` would write."""
    sys.path.insert(0, str(PACKAGING / "docs"))
    try:
        found: dict[Path, str] = runpy.run_path(str(PACKAGING / "docs" / "make.py"))["documents"]()
    finally:
        sys.path.pop(0)
    return found


def shell(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here")
    return path


# --- what is written from the program ---


def test_pages_and_completions_are_what_the_program_says(documents: dict[Path, str]) -> None:
    """A changed option, help or key is in the man pages and completions: else `make docs` was forgotten."""
    stale = [path.name for path, text in documents.items() if not path.exists() or path.read_text() != text]
    assert stale == [], "run: make docs"
    written = {path for folder in ("man", "completions") for path in (PACKAGING / folder).rglob("*.*")}
    assert {path for path in written if path.is_file()} <= documents.keys()


@pytest.mark.parametrize("page", ["studio-worker.1", "studio-worker-config.5"])
def test_page_is_clean_troff(page: str) -> None:
    """man(1) shows the page without a complaint, with hyphens and quotes that can be copied."""
    done = subprocess.run(
        [shell("groff"), "-Kutf8", "-man", "-ww", "-Tutf8", "-P-c", str(PACKAGING / "man" / page)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    if page.endswith(".1"):
        assert "jq -r 'select(.generate_ms > 60000)" in done.stdout
        for status in (3, 69, 74, 75, 76, 77, 78):
            assert re.search(rf"^\s+\S*{status}\S*\s", done.stdout, re.MULTILINE)


def test_exit_statuses_of_the_page_are_all_there_are(documents: dict[Path, str]) -> None:
    """Every status that an error of ours ends with is explained in studio-worker(1)."""
    known = {
        each.exit_status
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.StudioWorkerError)
    }
    page = documents[PACKAGING / "man" / "studio-worker.1"]
    assert [status for status in sorted(known - {1}) if f".B {status}\n" not in page] == []


COMPLETE_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_studio_worker
printf '%s\\n' "${COMPREPLY[@]}"
"""

EXPECTED = [
    (["do"], {"doctor"}),
    (["models", "ex"], {"export"}),
    (["models", "list", "--j"], {"--json"}),
    (["doctor", "--config", "/etc", "--js"], {"--json"}),
    (["local-studio", "--port", ""], set()),
]


@pytest.mark.parametrize(("words", "choices"), EXPECTED)
def test_bash_completes(words: list[str], choices: set[str]) -> None:
    """TAB in bash: commands, their commands and options; nothing for a value that only a person knows."""
    script = str(PACKAGING / "completions" / "bash" / "studio-worker")
    done = subprocess.run(
        [shell("bash"), "--norc", "-c", COMPLETE_BASH, "bash", script, "studio-worker", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == choices, done.stderr


@pytest.mark.parametrize(("words", "choices"), EXPECTED[:4])
def test_fish_completes(words: list[str], choices: set[str]) -> None:
    """The same in fish."""
    script = PACKAGING / "completions" / "fish" / "studio-worker.fish"
    line = " ".join(["studio-worker", *words])
    done = subprocess.run(
        [shell("fish"), "--no-config", "-c", f"source {script}; complete -C '{line}'"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {each.split("\t")[0] for each in done.stdout.splitlines()} >= choices, done.stderr


def test_zsh_reads_the_completion() -> None:
    """zsh takes the completion for what it is: no syntax error, and the function is there."""
    script = PACKAGING / "completions" / "zsh" / "_studio-worker"
    done = subprocess.run([shell("zsh"), "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    text = script.read_text()
    assert text.startswith("#compdef studio-worker\n")
    assert "'doctor:" in text
    assert "'--json[" in text


# --- recipes and examples ---


def recipes() -> list[str]:
    return [line for line in RECIPES.read_text().splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What a real service has logged: a download, a job that was made, one that failed, a reload."""
    folder = tmp_path_factory.mktemp("recipes")
    with (
        LocalStudio(folder / "studio.sqlite3", models_dir=WEIGHTS.parent, auto_approve=True) as studio,
        FileServer() as server,
    ):
        (folder / "work").mkdir()
        configured = write_configuration(studio, folder / "work")
        (configured / "models.d" / "sample.json").unlink()
        require(configured, "small", server.serve("/small.safetensors", b"x" * 5000))
        with ServiceProcess(configured, folder / "log") as running:
            running.await_message("STATUS=ready, connected", READY_S)
            await_status(studio, queue_synthetic(studio), "done")
            broken = queue_synthetic(studio, initImageUrl=f"http://127.0.0.1:{server.port}/missing.png")
            await_status(studio, broken, "failed")
            reload(running)
            assert running.stop() == 0
        yield running.log_lines()


def test_recipes_find_what_they_promise(lines: list[dict[str, Any]]) -> None:
    """Each recipe's journal fields match real lines, and every fact that its jq program names is in one."""
    assert len(recipes()) > 5
    for recipe in recipes():
        fields = dict(re.findall(r"\b([A-Z_]{2,})=(\S+)", recipe))
        found = [
            line
            for line in lines
            if all(
                value == "ID" or str({field_name(key): fact for key, fact in line.items()}.get(name)) == value
                for name, value in fields.items()
            )
        ]
        assert found, recipe
        names = set(re.findall(r"\.([a-z_]+)\b", recipe.partition("jq")[2]))
        missing = names - {key for line in found for key in line}
        assert missing <= {"error"}, (recipe, missing)  # a reload that went well has none


def test_recipes_run(lines: list[dict[str, Any]]) -> None:
    """jq takes each recipe's program, and gives the job, the failure, the download and the reload."""
    jq = shell("jq")
    said = {}
    for recipe in recipes():
        program = re.search(r"\| jq (-r|-c) ('[^']+'|\S+)", recipe)
        if program is None:
            continue
        fields = {name: value for name, value in re.findall(r"\b([A-Z_]{2,})=(\S+)", recipe) if value != "ID"}
        matching = [
            json.dumps(line)
            for line in lines
            if all(str(line.get(name.lower())) == value for name, value in fields.items())
        ]
        done = subprocess.run(
            [jq, program[1], program[2].strip("'")],
            input="\n".join(matching),
            capture_output=True,
            text=True,
            check=True,
        )
        said[recipe.partition(" -o cat")[0] + program[2][:30]] = done.stdout
    everything = "".join(said.values())
    assert "placeholder\t" in everything
    assert "/small.safetensors\t5000\t" in everything
    assert "configuration reloaded" in everything


def test_readme_shows_recipes_that_are_shipped() -> None:
    """The README's journal commands are those of the example file, which are tested."""
    shown = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("journalctl ")]
    commands = [line.partition("   #")[0].strip() for line in shown]
    assert len(commands) >= 4
    plain = {"journalctl -fu studio-worker", "journalctl -u studio-worker -f"}
    assert set(commands) - plain <= set(recipes())


def test_example_models_are_valid() -> None:
    """Every example of models.d can be copied as it is; its address and hash are to be replaced."""
    models = read_required(PACKAGING / "examples" / "models.d", allow_insecure=False)
    assert [model.id for model in models] == ["sd15"]


# --- the table of failures, and the list in download.py ---


def promised() -> set[str]:
    """The names of all tests."""
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_what_a_download_survives_is_held_by_tests_that_exist() -> None:
    """Every kind of failure listed at the top of download.py names a test, and each of those is there."""
    listed = (download.__doc__ or "").split("\n* ")[1:]
    assert len(listed) > 20
    known = promised()
    named = {item: re.findall(r"``(test_\w+)``", item) for item in listed}
    assert [item for item, tests in named.items() if not tests or not known.issuperset(tests)] == []


def test_failures_are_held_by_tests_that_exist() -> None:
    """Every kind of failure in docs/failures.md names a test that holds it, and each of those is there."""
    lines = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| what", "| --- |"))]
    assert len(rows) > 100
    known = promised()
    wrong = []
    for row in rows:
        happens, does, tests = [cell.strip() for cell in row.strip("|").split("|")]
        named = [each.strip("` ") for each in tests.split(",")]
        if not happens or not does or not known.issuperset(named):
            wrong.append(row)
    assert wrong == []
