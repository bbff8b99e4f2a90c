"""What comes from outside has stated limits, and none of it costs more than its length."""

from __future__ import annotations

import ast
import json
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.engine.families.sources import Sources
from studio_worker.engine.files.checkpoint import read_checkpoint
from studio_worker.errors import FileDamaged, FrameError, NotServed, ProtocolError
from studio_worker.formats import header_problem
from studio_worker.jobs import MAX_PROMPT_BYTES
from studio_worker.models import LocalFile
from studio_worker.studio import wire
from studio_worker.studio.session.offers import Impossible, Take, judge
from studio_worker.studio.session.protocol import SessionProtocol
from tests.lab.frames import CLAIM, SOURCE, claim
from tests.lab.session import IDLE

PACKAGE = Path(__file__).parents[1] / "studio_worker"
LONG = "x" * 201


def task(**fields: Any) -> dict[str, Any]:
    return claim(task={"kind": "image", "prompt": "a castle", **fields})


def source(file: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    files = [{**SOURCE["files"][0], **(file or {})}]  # type: ignore[index]
    return claim(modelSource={**SOURCE, "files": files, **fields})


@pytest.mark.parametrize(
    ("offer", "says"),
    [
        (claim(jobId=LONG), "jobId: has more than 200 characters"),
        (claim(model=LONG), "model: String should have at most 200 characters"),
        (claim(assetName=LONG), "assetName: String should have at most 200"),
        (claim(gameId=LONG), "gameId: String should have at most 200"),
        (claim(vramGbEstimate=1e300), "vramGbEstimate: Input should be less than or equal to 1000000"),
        (task(prompt="x" * (128 * 1024 + 1)), "prompt: has 131073 bytes; at most 131072 are read"),
        (task(negativePrompt="é" * 70_000), "negativePrompt: has 140000 bytes; at most 131072 are read"),
        (task(width=10**400), "width: Input should be less than or equal to 2147483647"),
        (task(steps=2**31), "steps: Input should be less than or equal to 2147483647"),
        (task(seed=10**400), "seed: Input should be less than or equal to"),
        (task(samplingMethod=LONG), "samplingMethod: String should have at most 200"),
        (task(ext=LONG), "ext: String should have at most 200"),
        (source(engine=LONG), "engine: String should have at most 200"),
        (source({"url": "https://h/" + "x" * 9000}), "files.0.url: String should have at most 8192"),
        (source({"approxBytes": 10**400}), "files.0.approxBytes: Input should be less than or equal to"),
        (source({"approxBytes": -1}), "files.0.approxBytes: Input should be greater than or equal to 0"),
        (source(files=[SOURCE["files"][0]] * 257), "files: Tuple should have at most 256 items"),  # type: ignore[index]
        (source(cliDefaults={"width": -(10**400), "steps": 10**400}), "cliDefaults.steps: Input should be"),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_offer_beyond_the_limits_is_malformed(offer: dict[str, Any], says: str) -> None:
    """An offer whose texts or numbers are beyond what they can mean is answered so, with the limit."""
    judgement = judge(offer, IDLE)
    assert isinstance(judgement, Impossible)
    assert judgement.error.startswith("the offer is malformed: ")
    assert says in judgement.error
    assert len(judgement.error) < 1000


def test_offer_at_the_limits_is_taken() -> None:
    """What lies just within the limits is no reason to refuse a job."""
    text = "x" * 200
    largest = {"prompt": "x" * MAX_PROMPT_BYTES, "negativePrompt": "é" * (MAX_PROMPT_BYTES // 2)}
    offer = {**CLAIM, "jobId": text, "model": text, "assetName": text, "task": {"kind": "image", **largest}}
    assert isinstance(judge(offer, IDLE), Take)


def test_error_of_a_long_frame_is_short() -> None:
    """What is unreadable, or said of an error, is told in a few words, whatever its length."""
    with pytest.raises(FrameError) as caught:
        wire.read_studio_frame(json.dumps({"type": "t" * 10**6}))
    assert len(str(caught.value)) < 400
    session = SessionProtocol(0.0)
    with pytest.raises(ProtocolError) as ended:
        session.receive(json.dumps({"type": "error", "code": "c", "message": "m" * 10**6}), 0.0)
    assert len(str(ended.value)) < 1000


def gguf_head(tensors: int, pairs: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs)


def text(length: int) -> bytes:
    return struct.pack("<Q", length) + b"k" * min(length, 100_000)


def listed(*counts: int) -> bytes:
    """A key whose value is a list of lists, and so on, to the last, which is one of words."""
    inner = b"".join(struct.pack("<IQ", 9, count) for count in counts[:-1])
    return text(1) + struct.pack("<I", 9) + inner + struct.pack("<IQ", 8, counts[-1])


HEADERS = {
    "a header of 17 MB.safetensors": struct.pack("<Q", 17 * 2**20) + b"{" + b" " * 17 * 2**20,
    "a number of many digits.safetensors": b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,%s]}}'
    % (b"9" * 10_000),
    "one offset.safetensors": b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0]}}' + bytes(64),
    "two tensors in one place.safetensors": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
    b'"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}' + bytes(16),
    "a tensor beyond the end.safetensors": b'{"t":{"dtype":"F32","shape":[400],"data_offsets":[0,1600]}}'
    + bytes(16),
    "a hole.safetensors": b'{"t":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}' + bytes(32),
    "no table.safetensors": b'{"t":["a table","has","names"]}',
    "nested.safetensors": b'{"a":' * 100_000,
    "a million keys.gguf": gguf_head(0, 10**6) + bytes(100),
    "a million tensors.gguf": gguf_head(10**6, 0) + bytes(100),
    "a long key.gguf": gguf_head(0, 1) + text(100_000) + bytes(100),
    "a list of lists.gguf": gguf_head(0, 1) + listed(*[1] * 600, 0) + bytes(100),
    "many words.gguf": gguf_head(0, 1) + listed(2**60) + bytes(1000),
    "many dimensions.gguf": gguf_head(1, 0) + text(1) + struct.pack("<I", 100_000) + bytes(900_000),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header_that_was_made_up_is_damage(name: str, tmp_path: Path) -> None:
    """A model's header beyond what models have, or that leads its reader astray, is damage, found at once."""
    path = tmp_path / "file"
    path = path.with_suffix(Path(name).suffix)
    content = HEADERS[name]
    if path.suffix == ".safetensors" and content.startswith(b"{"):
        length = content.find(b"}}") + 2 if b"}}" in content else len(content)
        content = struct.pack("<Q", length) + content
    path.write_bytes(content)
    assert "its header is wrong" in (header_problem(path, path.name) or "")
    with pytest.raises(FileDamaged):
        read_checkpoint(path)


@pytest.mark.parametrize("metadata", [b"", b'"__metadata__":{"epoch":5},'])
def test_tensor_longer_than_its_place_is_damage(metadata: bytes, tmp_path: Path) -> None:
    """A tensor that would be read from its neighbour's bytes is damage, whatever the metadata are."""
    header = b"{%s" % metadata + b'"t":{"dtype":"F32","shape":[400],"data_offsets":[0,16]}}'
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(FileDamaged):
        read_checkpoint(path)


def test_long_texts_among_a_models_keys_are_fine(tmp_path: Path) -> None:
    """Some GGUF files carry a whole tokenizer as one text; that is none of their tensors' business."""
    path = tmp_path / "x.gguf"
    value = struct.pack("<I", 8) + text(100_000)
    path.write_bytes(gguf_head(0, 1) + text(9) + value + bytes(32))
    assert header_problem(path, path.name) is None
    assert read_checkpoint(path).shapes == {}


@pytest.mark.parametrize(
    "key", ["input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", "input_blocks.0.0.weight"]
)
def test_scalar_where_a_matrix_belongs_is_refused_for_good(key: str, tmp_path: Path) -> None:
    """A model whose tensors have odd shapes is refused by name, and not tried again and again here."""
    tensors = {"input_blocks.0.0.weight": [1], key: []}
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [4 * index, 4 * index + 4]}
        for index, (name, shape) in enumerate(tensors.items())
    }
    encoded = json.dumps(header).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(4 * len(tensors)))
    with pytest.raises(NotServed, match=r"odd\.safetensors") as caught:
        Sources().identify([LocalFile("model", path, "0" * 64)])
    assert caught.value.is_final_here


# --- patterns ---

_METHODS = {"match", "fullmatch", "search", "sub", "split", "findall", "finditer"}
_OWN = {"config/documents.py"}
"""Modules whose patterns read the operator's own files."""


def patterns() -> Iterator[tuple[str, str | bytes, int, str]]:
    """Every pattern of the package: where it is, its text and flags, and how it is used."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if module in _OWN or module.startswith("gpu_check/"):
            continue
        tree, content = ast.parse(path.read_text()), path.read_text()
        names = {id(n.value): n.targets[0].id for n in ast.walk(tree) if _is_plain_assignment(n)}  # type: ignore[attr-defined]
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.") and node.args):
                continue
            try:
                pattern = ast.literal_eval(node.args[0])
            except ValueError:  # a name: of a pattern for what begins a file, which is cut to 512 bytes
                continue
            method = ast.unparse(node.func)[3:]
            if method == "compile":
                name = names.get(id(node))  # none where it stands in an expression
                used = set(re.findall(rf"\b{name}\.(\w+)\(", content) if name else ()) & _METHODS
                flags = [ast.unparse(each) for each in node.args[1:]]
            else:
                used, flags = {method} & _METHODS, []
            for each in sorted(used or {"search"}):
                yield f"{module}:{node.lineno}", pattern, re.DOTALL if "re.DOTALL" in flags else 0, each


def _is_plain_assignment(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)


_FEED = """
import json, re, sys
size = 2**20
for where, pattern, flags, method in json.load(sys.stdin):
    print(where, pattern, flush=True)
    found = re.compile(pattern, flags)
    use = getattr(found, method)
    for unit in json.loads(sys.argv[1]):
        text = (unit * (size // len(unit) + 1))[:size]
        for whole in (text + "\\n!", "<lora:a." + text):
            if method == "sub": found.sub("", whole)
            elif method == "finditer": any(False for _ in use(whole))
            else: use(whole)
"""
_UNITS = [" ", "a", "1", "<lora:", ":1", "(", "a."]


def test_patterns_are_linear() -> None:
    """No pattern that reads foreign text takes longer than the text's length warrants: 1 MB of anything."""
    found = [each for each in patterns() if isinstance(each[1], str)]
    assert {
        "engine/loras/wanted.py",
        "engine/families/parts/weighted.py",
        "engine/files/sections.py",
        "transfer/asking.py",
    } <= {each[0].split(":")[0] for each in found}

    def limit() -> None:  # a quadratic one would take hours
        resource.setrlimit(resource.RLIMIT_CPU, (120, 120))

    done = subprocess.run(
        [sys.executable, "-c", _FEED, json.dumps(_UNITS)],
        input=json.dumps(found),
        text=True,
        capture_output=True,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]} {done.stderr[-500:]}"
