"""Probabilities as integers, by a fixed rule: what a range coder needs, the same on every machine.

Legend: b images · v levels.

With Fₗ the sum of exp(logit − largest logit) over levels up to l, one level after another in float32, and
T = 2²⁴ − v, level l has the integer ⌊Fₗ · (T / F)⌋ − ⌊Fₗ₋₁ · (T / F)⌋, where the last ⌊…⌋ is T. They sum to T; a coder
adds 1 to each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.vector import Code, Value
from kernels.vector_math import exp

TOTAL = 2**24  # float32 counts no further


def write(code: Code) -> None:
    """Write `integers`, for the images of one vector."""

    def integers(code: Code, logits, out, sums, levels, total, live) -> None:
        def load(v: Value) -> Value:
            return code.gather(live, lambda lane: code.load_as_number(logits, lane * levels + v, code.float))

        most, sum_of = code.variable(load(code.integer(0))), code.variable(code.number(0))
        with code.loop(levels, 1) as v:
            most.set(code.larger(load(v), most.get()))
        with code.loop(levels) as v:
            sum_of.set(sum_of.get() + exp(code, load(v) - most.get()))
            code.store(sum_of.get(), sums, v)
        whole, before = code.of_integer(total), code.variable(code.number(0))
        scale = whole / sum_of.get()
        with code.loop(levels) as v:
            upto = code.smaller(code.whole_part(code.load(sums, v) * scale), whole)
            upto = code.where((v + 1).equals(levels), whole, upto)
            with code.each(live, upto - before.get()) as (lane, one):
                code.store_number(one, out, lane * levels + v)
            before.set(upto)

    code.function(integers, "pppiii", name="integers")


def integer_probabilities(logits: Tensor) -> Tensor:
    """Logits (b v), float32 on the CPU → integers as float32 (b v), at least 0, that sum to 2²⁴ − v in each row."""
    logits = logits.contiguous()
    (b, v), lanes = logits.shape, native.lanes(len(logits), False)
    out, sums = torch.empty_like(logits), logits.new_empty(v, lanes)
    function = native.library(write, {"integers": 6}, lanes)["integers"]
    for first in range(0, b, lanes):
        at = first * v * logits.element_size()
        live = min(lanes, b - first)
        function(logits.data_ptr() + at, out.data_ptr() + at, sums.data_ptr(), v, TOTAL - v, live)
    return out
