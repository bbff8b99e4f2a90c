"""Prompts whose words have weights: read as stable-diffusion.cpp reads them, and what they do."""

from __future__ import annotations

import pytest
import torch

from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families.parts.weighted import pieces, scaled
from studio_worker.jobs import Cancel
from tests.lab.engine import PROMPT, decoded, request

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("", []),
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("[less] of it", [("less", 1 / 1.1), (" of it", 1.0)]),
        ("(red:1.4), ((house:1.3))", [("red", 1.4), (", ", 1.0), ("house", 1.3 * 1.1)]),
        ("(a [b] c:2)", [("a ", 2.0), ("b", 2 / 1.1), (" c", 2.0)]),
        ("(unclosed", [("unclosed", 1.1)]),
        ("un)opened] :1.3) it", [("un)opened]  it", 1.0)]),
        (r"smile \(drawn\)", [("smile (drawn\\)", 1.0)]),
        ("Big Birds: B", [("Big Birds: B", 1.0)]),
        ("a BREAK b", [("a ", 1.0), ("BREAK", -1.0), (" b", 1.0)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("(.:..)", [(".", 1.0)]),
    ],
)
def test_prompt_is_read_as_stable_diffusion_cpp_reads_it(prompt: str, read: list[tuple[str, float]]) -> None:
    """Brackets, numbers, escapes and BREAK mean what they mean there; what is none of them is text."""
    found = pieces(prompt)
    assert [text for text, _ in found] == [text for text, _ in read]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in read])


def test_endless_prompts_are_read_at_once() -> None:
    """A megabyte of brackets, blanks, letters or colons is read without a second thought."""
    for part in ("(a", "[", ")", " ", "B", "\\", ":", "(:", ":1"):
        assert pieces(part * (2**20 // len(part)))


def test_weights_scale_words_and_keep_the_mean() -> None:
    """A word's states grow by its weight against the others', while the mean of all stays."""
    states = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])
    found = scaled(states, [2.0, 1.0])
    assert float(found.mean()) == pytest.approx(2.0)
    ratio = (found / states)[0]
    assert torch.allclose(ratio[0] / ratio[1], torch.tensor(2.0))
    assert scaled(states, [1.0, 1.0]) is states


def test_weights_and_windows_tell_in_the_picture() -> None:
    """A weighted word and BREAK change the picture; brackets that weigh nothing do not."""
    engine = DiffusionEngine("cpu")

    def make(prompt: str) -> bytes:
        asked = request(prompt=prompt, steps=1)
        return decoded(engine.generate(asked, lambda *_: None, Cancel()).data).tobytes()

    plain = make(f"{PROMPT}, red")
    assert make(f"{PROMPT}, (red:1.0)") == plain
    assert make(f"{PROMPT}, (red:1.5)") != plain
    assert make(f"{PROMPT} BREAK red") != make(f"{PROMPT} red")
    assert make(f"BREAK {PROMPT}, red BREAK") == plain
