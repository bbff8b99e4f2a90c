"""Reading one configuration file: its text, its values, and the line on which each of them stands.

Every fault becomes a :class:`ConfigError` with file, line where there is one, and cure. Knows nothing of
what the values mean.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio_worker.errors import ConfigError
from studio_worker.wording import user

_HEADER = re.compile(r"\s*\[\[?\s*([^\[\]]+?)\s*\]")
_ASSIGNMENT = re.compile(r"""\s*([\w."' \t-]+?)\s*=""")


@dataclass(frozen=True)
class Document:
    """A file that could be parsed. ``values`` is a table, or whatever a JSON file holds."""

    path: Path
    text: str
    values: Any

    def line_of_key(self, dotted: str) -> int | None:
        """The 1-based line of a TOML file that sets ``dotted``, or opens it as a section."""
        section = ""
        for number, line in enumerate(self.text.split("\n"), 1):
            if header := _HEADER.match(line):
                name = section = _dotted(header[1])
                holds = False  # a section's own line says nothing of its keys
            elif assignment := _ASSIGNMENT.match(line):
                name = _dotted(assignment[1])
                name = f"{section}.{name}" if section else name
                holds = dotted.startswith(f"{name}.")  # an inline table
            else:
                continue
            if name == dotted or name.startswith(f"{dotted}.") or holds:
                return number
        return None

    def line_containing(self, *words: str) -> int | None:
        """The first 1-based line that holds all of ``words``."""
        lines = enumerate(self.text.split("\n"), 1)
        return next((number for number, line in lines if all(word in line for word in words)), None)


def read_document(path: Path, *, cure_if_missing: str = "restore it, or remove the link to it") -> Document:
    """Read and parse a file: JSON where its name ends so, TOML otherwise.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or is not what its name says.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of other systems begin with a mark
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError("no such file", source=str(path), cure=cure_if_missing) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", source=str(path), cure="save it as UTF-8") from error
    parse = _parse_json if path.suffix == ".json" else _parse_toml
    return Document(path, text, parse(path, text))


def list_files(folder: Path, suffixes: set[str]) -> list[Path]:
    """The files of ``folder`` in name order; none where there is no such folder.

    Hidden files are left out: editors keep their own there.

    Raises:
        ConfigError: it is there and cannot be listed. Reading nothing would be a silent loss.
    """
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error
    return [path for path in entries if path.suffix in suffixes and not path.name.startswith(".")]


def _unreadable(path: Path, error: OSError) -> ConfigError:
    cures: dict[type[OSError], str] = {
        IsADirectoryError: "remove that folder or put a file in its place",
        NotADirectoryError: "remove that file or put a folder in its place",
        PermissionError: f"give user {user()} access to it",
    }
    return ConfigError(
        f"cannot be read: {error.strerror}",
        source=str(path),
        cure=cures.get(type(error), "check the disk it is on"),
    )


def _parse_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or a number of too many digits
        line = re.search(r"at line (\d+)", str(error))
        at_end = "at end of document" in str(error)
        raise ConfigError(
            f"is not valid TOML: {error}",
            source=str(path),
            line=int(line[1]) if line else len(text.splitlines()) or 1 if at_end else None,
            cure=_toml_cure(str(error)),
        ) from error


def _toml_cure(said: str) -> str:
    if twice := re.match(r"Cannot declare \((.*?),?\) twice", said):
        section = ".".join(part.strip(" '\"") for part in twice[1].split(","))
        return f"[{section}] stands there already: put these keys below it"
    if said.startswith("Cannot overwrite a value"):
        return "the key stands there already: leave one of the two out"
    return "mend the syntax (text values need quotes)"


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        decoding = error if isinstance(error, json.JSONDecodeError) else None
        raise ConfigError(
            f"is not valid JSON: {decoding.msg if decoding else error}",
            source=str(path),
            line=decoding.lineno if decoding else None,
            cure="mend the syntax",
        ) from error


def _dotted(written: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in written.split("."))
