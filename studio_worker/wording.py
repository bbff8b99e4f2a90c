"""Words for an operator: what is wrong with a value, who runs this, where an error of ours was raised.

Of values the libraries speak of dictionaries and instances.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KINDS = {
    "bool": "true or false",
    "dict": "a table of names and values, { name = value }",
    "float": "a number",
    "int": "a whole number",
    "list": "a list, [ ... ]",
    "path": "a path, in quotes",
    "string": "text, in quotes",
    "tuple": "a list, [ ... ]",
}
"""By how the names of pydantic's errors begin: ``bool_parsing``, ``string_type``, …"""


def fault(error: Mapping[str, Any]) -> str:
    """One of the errors of pydantic's ValidationError."""
    name = str(error["type"])
    kind, _, how = name.partition("_")
    if kind in _KINDS and (
        how in {"type", "parsing"} or how.startswith("parsing_") or name == "int_from_float"
    ):
        return f"must be {_KINDS[kind]}"
    if name in {"model_type", "model_attributes_type"}:
        return "must be an object of names and values"
    if name == "missing":
        return "is missing"
    if name == "extra_forbidden":
        return "is not known here"
    message = str(error["msg"]).removeprefix("Value error, ")
    for theirs, ours in (("Input should be ", "must be "), ("Input should ", "should ")):
        message = message.replace(theirs, ours)
    return message


def user() -> str:
    """Who runs this, as a cure names them."""
    return os.environ.get("USER") or f"with id {os.getuid()}"


def instance_of(state: Path) -> int | None:
    """The N of the studio-worker@N whose state folder this is; ``None`` = it is the one service's."""
    found = re.fullmatch(r"instance-(\d+)", state.name)
    return None if found is None else int(found[1])


def unit_of(state: Path) -> str:
    """The unit whose state folder this is."""
    instance = instance_of(state)
    return "studio-worker" if instance is None else f"studio-worker@{instance}"


def register_command(state: Path, words: str) -> str:
    """`studio-worker register` with these options, for the service whose state folder this is."""
    instance = instance_of(state)
    return f"studio-worker register {words}" + ("" if instance is None else f" --instance {instance}")


def in_container() -> bool:
    """Whether an image of ours says so, in systemd's way: by ``$container``. No systemd runs there then."""
    return bool(os.environ.get("container"))  # noqa: SIM112  (as systemd spells it)


def to_service(verb: str, unit: str = "studio-worker") -> str:
    """How an operator has the service start, stop, restart or reload."""
    if not in_container():
        return f"systemctl {verb} {unit}"
    return {"reload": "send SIGHUP to the container's process 1"}.get(verb, f"{verb} the container")


def volume_cure(folder: Path) -> str:
    """How a container comes to a folder that it can write to."""
    user_id, group_id = os.geteuid(), os.getegid()
    return (
        f"mount a volume at {folder} that user {user_id} may write to (chown -R {user_id}:{group_id} it; in "
        f"Kubernetes securityContext.fsGroup: {group_id})"
    )


def frames(error: BaseException) -> str:
    """Where ``error`` was raised, for the log: without its text, which may quote the prompt."""
    return "".join(traceback.format_tb(error.__traceback__))
