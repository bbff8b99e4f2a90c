"""Private names of libraries: none is used but those listed, and the installed libraries have these."""

from __future__ import annotations

import ast

import pytest

from tests.private_names import (
    PrivateName,
    all_used,
    foreign_names,
    missing,
    own_names,
    unknown,
    used_names,
)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._C._cuda_getDriverVersion()", {"torch._C"}),
        ("import torch\ntorch.cuda._lazy_init()", {"_lazy_init"}),
        ("import torch._dynamo", {"torch._dynamo"}),
        ("from diffusers.loaders.lora_base import _fetch_state_dict", {"_fetch_state_dict"}),
        ("def f(pipe):\n    pipe._interrupt = True", {"_interrupt"}),
        ("def f(self):\n    self._step_index += 1", {"_step_index"}),
        ("class A:\n    def _get(self):\n        return super()._get()", {"_get"}),
        ("getattr(model, '_repeated_blocks', None)", {"_repeated_blocks"}),
        ("import_module('torch._inductor.config')", {"torch._inductor"}),
        ("import torch\ndef f():\n    def _lazy_init(): ...\n    torch.cuda._lazy_init()", {"_lazy_init"}),
        (
            "class A:\n    def __init__(self):\n        self._x = 1\n    def f(self):\n        self._x += 1",
            set(),
        ),
        ("from studio_worker import __version__\nimport os\nos._exit(1)\nrow._replace(a=1)", set()),
    ],
)
def test_private_name_of_a_library_is_seen(source: str, found: set[str]) -> None:
    """The rule sees a library's private name however it is reached, and leaves ours alone."""
    tree = ast.parse(source)
    assert {name for name, _ in foreign_names(tree, own_names([tree]))} == found


def test_installed_libraries_have_every_private_name_in_use() -> None:
    """A release of a library that drops a name this package cannot do without fails here, not on a box."""
    assert missing() == {}


def test_installed_libraries_have_every_public_name_in_use() -> None:
    """Also on paths that only a GPU takes, nothing is called that the installed libraries do not have."""
    names = all_used()
    assert {"torch.cuda.mem_get_info", "torch.cuda.get_arch_list", "gguf.GGML_QUANT_SIZES"} <= names
    assert unknown(names) == {}


def test_public_name_that_a_library_lacks_is_told() -> None:
    """A name that a release has taken away is named with how it shows, and others are found."""
    source = "import torch\nfrom torch.nn import Linear, Gone\ntorch.cuda.gone(torch.version.cuda.split('.'))"
    assert sorted(unknown(used_names(ast.parse(source)))) == ["torch.cuda.gone", "torch.nn.Gone"]


def test_name_that_a_library_lacks_is_told() -> None:
    """A listed name that the installed library has not is named with what happens where it is used."""
    gone = PrivateName("_gone", (), "import gguf; gguf.GGUFReader._gone", "")
    assert list(missing([gone])) == ["_gone"]
    assert "no attribute '_gone'" in missing([gone])["_gone"]
