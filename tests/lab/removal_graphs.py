"""Small ONNX graphs with the contract of LaMa's: what takes a picture and a mask, and fills what is white.

The published model has 207 MB and is not part of the tests. These prove the plumbing, crops and feather of
object removal; they do not prove how well LaMa paints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onnx import NodeProto, TensorProto, checker, helper, save

from studio_worker.models import LocalFile

SIDE = 512
IMAGE = (1, 3, SIDE, SIDE)
MASK = (1, 1, SIDE, SIDE)

_OPSET = 17
"""That of LaMa's published graph."""

Body = Callable[["Graph"], None]
"""Adds nodes that make ``filled`` of ``image`` and ``mask``."""


class Graph:
    """Nodes in the making."""

    def __init__(self, type_: int = TensorProto.FLOAT) -> None:
        self.type_ = type_
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, name: str, *values: float) -> str:
        shape = [] if len(values) == 1 else [len(values)]
        self.constants.append(helper.make_tensor(name, self.type_, shape, values))
        return name


def pull_push(graph: Graph) -> None:
    """Fill the hole from its surroundings: the mean of what is known in ever larger squares."""
    one, tiny = graph.constant("one", 1.0), graph.constant("tiny", 1e-6)
    double = graph.constant("double", 1.0, 1.0, 2.0, 2.0)
    known = [graph.add("Sub", [one, "mask"], "known")]
    colours = [graph.add("Mul", ["image", "known"], "colours")]
    half = {"kernel_shape": [2, 2], "strides": [2, 2]}
    for level in range(1, SIDE.bit_length()):
        known.append(graph.add("AveragePool", [known[-1]], f"known{level}", **half))
        colours.append(graph.add("AveragePool", [colours[-1]], f"colours{level}", **half))
    filled = ""
    for level in reversed(range(SIDE.bit_length())):
        divisor = graph.add("Max", [known[level], tiny], f"divisor{level}")
        mean = graph.add("Div", [colours[level], divisor], f"mean{level}")
        if filled:
            coarse = graph.add("Resize", [filled, "", double], f"coarse{level}", mode="nearest")
            is_known = graph.add("Greater", [known[level], tiny], f"is_known{level}")
            last = "filled" if level == 0 else f"filled{level}"
            filled = graph.add("Where", [is_known, mean, coarse], last)
        else:
            filled = mean


def same(graph: Graph) -> None:
    """Give the picture back as it came, whatever the mask says."""
    graph.add("Identity", ["image"], "filled")


def mask_alone(graph: Graph) -> None:
    """Give the mask back in the picture's place."""
    graph.add("Identity", ["mask"], "filled")


def mean_of_known(graph: Graph) -> None:
    """Fill the hole with the mean of all that is known."""
    one = graph.constant("one", 1.0)
    known = graph.add("Sub", [one, "mask"], "known")
    colours = graph.add("Mul", ["image", known], "colours")
    axes = {"axes": [2, 3], "keepdims": 1}
    total = graph.add("ReduceMean", [colours], "total", **axes)
    share = graph.add("ReduceMean", [known], "share", **axes)
    mean = graph.add("Div", [total, share], "mean")
    masked = graph.add("Mul", [mean, "mask"], "masked")
    graph.add("Add", [colours, masked], "filled")


def greedy(graph: Graph) -> None:
    """Want four terabytes."""
    graph.constants.append(helper.make_tensor("shape", TensorProto.INT64, [1], [1 << 40]))
    graph.add("ReduceMax", ["mask"], "one", keepdims=0)
    graph.add("Expand", ["one", "shape"], "many")
    graph.add("ReduceMax", ["many"], "most", keepdims=0)
    graph.add("Add", ["image", "most"], "filled")


def constant(value: float) -> Body:
    """Paint everything in one grey."""

    def body(graph: Graph) -> None:
        zero, grey = graph.constant("zero", 0.0), graph.constant("grey", value)
        nothing = graph.add("Mul", ["image", zero], "nothing")
        unmasked = graph.add("Mul", ["mask", zero], "unmasked")
        graph.add("Add", [graph.add("Add", [nothing, unmasked], "both"), grey], "filled")

    return body


def removal_graph(
    path: Path,
    body: Body = pull_push,
    *,
    highest: float = 255.0,
    inputs: Sequence[tuple[str, Sequence[int | str]]] = (("image", IMAGE), ("mask", MASK)),
    outputs: Sequence[tuple[str, Sequence[int | str]]] = (("output", IMAGE),),
    type_: int = TensorProto.FLOAT,
    opset: int = _OPSET,
    domain: str = "",
    white_in: str = "",
    checks: bool = True,
) -> LocalFile:
    """A graph as a model's file.

    Args:
        highest: what white is in the output.
        inputs: names and shapes; where others are called so, the first two stand for ``image`` and ``mask``.
        outputs: likewise; all are the same picture.
        type_: of inputs and outputs.
        domain: of a further operation that no runtime knows; none where empty.
        white_in: a file beside the graph that has one of its numbers.
        checks: whether the graph is a valid one.
    """
    graph = Graph(type_)
    for name, meant in zip((name for name, _ in inputs), ("image", "mask"), strict=False):
        if meant not in dict(inputs):
            graph.add("Identity", [name], meant)
    body(graph)
    white = graph.constant("white", highest)
    picture = graph.add("Mul", ["filled", white], "picture")
    if domain:
        picture = graph.add("Polish", [picture], "polished", domain=domain)
    for name, _ in outputs:
        graph.add("Cast", [picture], name, to=type_)
    if white_in:
        white_tensor = graph.constants[-1]
        white_tensor.ClearField("float_data")
        white_tensor.data_location = TensorProto.EXTERNAL
        white_tensor.external_data.add(key="location", value=white_in)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "removal",
            [helper.make_tensor_value_info(name, type_, shape) for name, shape in inputs],
            [helper.make_tensor_value_info(name, type_, shape) for name, shape in outputs],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid(each, opset) for each in dict.fromkeys(("", domain))],
        ir_version=8,
    )
    if checks:
        checker.check_model(model)
    save(model, str(path))
    return LocalFile("model", path, f"{path}:{path.stat().st_mtime_ns}")
