"""What a row of the cached sampler promises a GPU, which replays it as a graph: it asks and tells the host nothing, and
computes in memory that is there already.

Found on a CPU, operation by operation, as torch is asked for them. What an operation does inside is its own matter.

Legend: b batch · c channel (colour) · w columns.
"""

import itertools
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.sampling import PixelLoop, noise
from models.sampling.cached import Cached
from models.sampling.rules import Draw, Given, Keep, Record
from tests.cases import ARCHITECTURES, MIXTURE, Case, build, every_net, given, images

ROOT = Path(__file__).resolve().parent.parent
# The host waits for what a GPU computed: for a value, or for how many there are.
SYNCHRONISE = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere",
    "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2", "bincount", "repeat_interleave",
}  # fmt: skip
HOST_DATA = {"lift_fresh", "lift_fresh_copy", "scalar_tensor", "tensor"}  # a tensor of Python's numbers
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
ADD_PRODUCT = {"addmm", "baddbmm", "addmv", "addbmm"}


def line() -> str:
    """Where in the repository the operation at hand stands: the innermost of its lines outside of torch."""
    frame = sys._getframe(3)  # neither this function nor the mode's
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("models", "kernels", "tests"):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "nowhere in the repository"


class OneRow(TorchDispatchMode):
    """`broken`: what a captured row may not do, with the operation and its line; `nodes`: how many a graph has of it.

    A node is an operation that is no view. A product that is added to something has two, where the sum goes elsewhere:
    what it is added to is copied there first.
    """

    def __init__(self):
        super().__init__()
        self.broken, self.nodes = [], 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name, into = operation.overloadpacket.__name__, keywords.get("out")
        tensors = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)]
        there = {x.untyped_storage().data_ptr() for x in tensors}
        devices = {x.device for x in tensors}
        out = operation(*arguments, **keywords)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        indices = [x for x in tree_leaves(arguments[1]) if x is not None] if name in INDEX else []
        if name in SYNCHRONISE or any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            self.tell("synchronises", operation)
        if name in HOST_DATA:
            self.tell("brings Python's numbers", operation)
        if len(devices | {x.device for x in made}) > 1:
            self.tell("copies between devices", operation)
        new = any(x.untyped_storage().data_ptr() not in there for x in made)
        if new:
            self.tell("allocates", operation)
        if (new or operation._schema.is_mutable) and any(x.numel() for x in made):
            copied = name in ADD_PRODUCT and into is not None and into.data_ptr() != arguments[0].data_ptr()
            self.nodes += 1 + copied
        return out

    def tell(self, what: str, operation) -> None:
        self.broken.append(f"{operation} {what}, at {line()}")


def two_rows(loop, evaluator, rule) -> tuple[OneRow, OneRow]:
    """What the first row of an image and another one do, once each kind has run."""
    rows = OneRow(), OneRow()
    with loop.drawing():
        for modes in ((nullcontext(), nullcontext()), rows):
            for i, mode in enumerate(modes):
                evaluator.load(i)
                rule.load(i)
                with mode:
                    evaluator.row(rule, loop.values, first=i == 0)
                rule.store(i)
    return rows


def every_network():
    """Architecture × head × one colour or three × conditioned or not × skip or not."""
    heads = {"": {}, "-mixture": MIXTURE}
    conditions = {"": {}, "-given": {"classes": 3, "map_features": 2}}
    skips = {"": {}, "-skip": {"skip": True}}
    for name, head, condition, skip, channels in itertools.product(ARCHITECTURES, heads, conditions, skips, (1, 3)):
        extra = {**heads[head], **conditions[condition], **skips[skip], "channels": channels}
        yield pytest.param(Case(ARCHITECTURES[name][0], extra, None), id=f"{name}{head}{condition}{skip}-{channels}")


def every_rule(model, b: int) -> dict:
    x, uniforms = images(model, b), noise(0, range(b), model.shape)
    return {
        "draw": Draw(uniforms),
        "draw at 0.5": Draw(uniforms, 0.5),
        "draw at 0": Draw(uniforms, 0),
        "keep": Keep(x, x < 2, Draw(uniforms)),
        "given": Given(x),
        "record": Record(model, Draw(uniforms), b, conditionals=True),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", list(every_network()))
@pytest.mark.parametrize(
    "images_last, dtype",
    [
        pytest.param(False, torch.float32, id="gpu", marks=pytest.mark.slow),
        pytest.param(False, torch.bfloat16, id="gpu_bf16", marks=pytest.mark.slow),
        pytest.param(True, torch.float32, id="cpu"),
    ],
)
def test_a_row_neither_allocates_nor_speaks_with_the_host(case, images_last, dtype):
    b, model = 2, build(case, height=2, width=2, hidden=6, head_features=6).to(dtype)
    condition, rules = model.condition(**given(model, b)), every_rule(model, b)
    loop = PixelLoop(model, "cached", rules["draw"], b, condition)
    evaluator = Cached(model, b, condition, images_last=images_last)
    for name, rule in rules.items():
        for which, row in zip(("first row", "any other"), two_rows(loop, evaluator, rule), strict=True):
            assert row.nodes > 20 and not row.broken, f"{name}, {which}:\n" + "\n".join(dict.fromkeys(row.broken))


# Nodes of a graph, a sub-pixel, for 32 columns of 3 colours and 256 levels: hidden 12, head 32. A GPU takes some 2 µs
# for each, whatever it computes, so they are what a draw of few images takes. Lower a number when it can be lowered.
NODES = {
    "pixel_cnn": (15, {}, 103.2),
    "gated_pixel_cnn": (15, {}, 104.1),
    "row_lstm": (12, {}, 121.2),
    "diag_bilstm": (12, {}, 139.4),
    "pixel_cnn-mixture": (15, {"head": "logistic_mixture"}, 56.8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NODES)
def test_a_sub_pixel_has_no_more_nodes_than_are_written_here(name):
    layers, extra, most = NODES[name]
    case = Case(ARCHITECTURES[name.removesuffix("-mixture")][0], extra, None)
    sizes = {"channels": 3, "levels": 256, "height": 2, "width": 32, "hidden": 12, "head_features": 32}
    model = build(case, layers=layers, **sizes)
    loop = PixelLoop(model, "cached", Draw(noise(0, range(2), model.shape)), 2)
    _, row = two_rows(loop, Cached(model, 2, images_last=False), loop.rule)
    assert most - 1 < row.nodes / 96 <= most


@every_net
def test_what_rows_above_give_is_copied_in_words_where_features_fill_them(case):
    """The Row LSTM's hidden states do not: they come after a column of ones."""
    for hidden, fills in ((16, case.target != "RowLSTM"), (7, False)):
        layers = Cached(build(case, hidden=hidden, channels=1), 3, images_last=False).layers
        ((side_by_side, handed_down),) = layers.above.copies
        assert side_by_side.dtype == handed_down.dtype == (torch.int64 if fills else torch.float32)


# ------------------------------------------------------------------------------------- what finds it can find it

X, MASK = torch.arange(4.0).view(2, 2), torch.tensor([[True, False], [True, True]])
PLANTED = {
    "a number": (lambda: X[0, 0].item(), "synchronises"),
    "a number of a rule": (lambda: float(X.sum()), "synchronises"),
    "a condition": (lambda: bool((X > 0).any()), "synchronises"),
    "a comparison": (lambda: torch.equal(X, X), "synchronises"),
    "a boolean index": (lambda: X[MASK], "synchronises"),
    "a boolean index of some rows": (lambda: X[:, MASK[0]], "synchronises"),
    "where a mask is true": (lambda: MASK.nonzero(), "synchronises"),
    "values that there are": (lambda: X.unique(), "synchronises"),
    "Python's numbers": (lambda: torch.tensor([1.0, 2.0]), "brings Python's numbers"),
    "a number put where a mask is true": (lambda: X.clone().__setitem__(MASK, 0.0), "brings Python's numbers"),
    "another device": (lambda: X.to("meta"), "copies between devices"),
    "a clone": (lambda: X.clone(), "allocates"),
    "a sum": (lambda: X + 1, "allocates"),
    "an index": (lambda: X[torch.zeros(1, dtype=torch.long)], "allocates"),
    "a transpose laid out": (lambda: X.T.reshape(-1), "allocates"),
    "another precision": (lambda: X.double(), "allocates"),
    "zeros": (lambda: torch.zeros(3), "allocates"),
}


@pytest.mark.parametrize("planted, what", PLANTED.values(), ids=PLANTED.keys())
def test_what_a_row_may_not_do_is_found_where_it_stands(planted, what):
    with torch.inference_mode(), OneRow() as row:
        planted()
    stands = f"at tests/test_one_row.py:{planted.__code__.co_firstlineno}"
    assert any(what in said and said.endswith(stands) for said in row.broken), row.broken


def test_a_memory_that_an_operation_had_to_enlarge_is_found():
    small = torch.empty(0)
    with torch.inference_mode(), OneRow() as row:
        torch.add(X, X, out=small)
    assert [said.split(" at ")[0] for said in row.broken] == ["aten.add.out allocates,"]


def test_what_a_row_may_do_is_let_through_and_counted():
    out, product, index = torch.empty(2, 2), torch.empty(2, 2), torch.tensor([1, 0])
    with torch.inference_mode(), OneRow() as row:
        torch.add(X, 1, out=out).relu_()[0].copy_(X[1])  # 3
        torch.index_select(X, 0, index, out=out)  # 1
        out.view(4)[1:].unflatten(0, (3, 1)).reshape(3).to(torch.float32)  # views
        torch.addmm(out, X, X, out=product)  # 2: it copies `out` first
        torch.addmm(out, X, X, out=out)  # 1
        out.addmm_(X, X)  # 1
        torch.mm(X, X, out=out)  # 1
        out[:, :0].tanh_()  # none: it is empty
    assert (row.nodes, row.broken) == (9, [])
