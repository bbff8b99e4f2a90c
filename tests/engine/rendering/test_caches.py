"""What is not done twice: encoding the same words, reading the same headers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextModel

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import sources
from studio_worker.engine.families.sources import Sources
from studio_worker.engine.rendering.prompts import PromptCache
from studio_worker.errors import JobError
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import LocalFile
from tests.lab.engine import SAMPLE, changed_sample, request

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CPU = torch.device("cpu")


@pytest.fixture
def encoded() -> Iterator[list[int]]:
    """Grows by one for every text that a CLIP text encoder reads."""
    calls: list[int] = []

    def count(module: torch.nn.Module, *_: Any) -> None:
        if isinstance(module, CLIPTextModel):
            calls.append(1)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    yield calls
    handle.remove()


def made(engine: DiffusionEngine, file: LocalFile = SAMPLE, **task: Any) -> Picture:
    return engine.generate(request(files=(file,), steps=2, **task), lambda done, total: None, Cancel())


def test_same_words_are_encoded_once(encoded: list[int], tmp_path: Path) -> None:
    """Another picture of the same prompt needs no text encoder and is the same picture; other words, another
    guidance and another model do.
    """
    engine = DiffusionEngine("cpu")
    first = made(engine)
    assert len(encoded) == 2  # prompt and negative prompt
    assert made(engine).data == first.data
    made(engine, seed=8, width=72)
    assert len(encoded) == 2
    made(engine, prompt="a gem")
    assert len(encoded) == 4
    made(engine, cfg_scale=1.0)
    assert len(encoded) == 5
    dull = changed_sample(
        tmp_path / "dull.safetensors",
        lambda tensors: tensors[
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
        ].zero_(),
    )
    assert made(engine, dull).data != first.data
    assert len(encoded) == 7


def test_kept_prompts_stay_within_their_budget() -> None:
    """When the budget is full, the prompt not used for longest is encoded anew."""
    cache, calls = PromptCache(budget_bytes=8 * 2 * 4), []

    def get(name: str) -> torch.Tensor:
        def encode() -> dict[str, Any]:
            calls.append(name)
            return {"prompt_embeds": torch.full((8,), float(len(name)))}

        found: torch.Tensor = cache.get(name, CPU, encode)["prompt_embeds"]
        return found

    for name in ("a", "bb", "a", "ccc", "a", "bb"):
        get(name)
    assert calls == ["a", "bb", "ccc", "bb"]


def test_kept_prompt_cannot_be_changed() -> None:
    """What a pipeline does to the tensors it was given does not reach the next job."""
    cache = PromptCache()

    def get() -> torch.Tensor:
        found = cache.get("a", CPU, lambda: {"prompt_embeds": [torch.ones(4)]})["prompt_embeds"]
        tensor: torch.Tensor = found[0]
        return tensor

    for _ in range(3):
        assert get().add_(1).tolist() == [2.0] * 4


def test_headers_are_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A source is understood once, and again where a file of it has changed."""
    calls, identify = [], sources.identify
    monkeypatch.setattr(sources, "identify", lambda *given: calls.append(1) or identify(*given))
    known = Sources()
    file = changed_sample(tmp_path / "a.safetensors", lambda tensors: None)
    assert known.identify([file]) is known.identify([file])
    assert len(calls) == 1
    file.path.write_bytes(file.path.read_bytes() + b"\0")
    for _ in range(2):
        with pytest.raises(JobError, match="not a whole safetensors file"):
            known.identify([file])
    assert len(calls) == 3


# --- the interpreter's own ---


def test_libraries_are_no_concern_of_collections() -> None:
    """When a model leaves, what jobs made is searched for garbage, and not all that libraries are made of."""
    DiffusionEngine("cpu")
    assert gc.get_freeze_count() > 100_000
