"""`kernels.philox` on a CPU, compiled: the words of a block by the CPU's product of two words, one block after another.

Legend: n images · m numbers of an image.
"""

from __future__ import annotations

import torch
from llvmlite import ir
from torch import Tensor

from kernels import native
from kernels.vector import I64, Code, Value

I32, I128 = ir.IntType(32), ir.IntType(128)
BLOCK = 8  # numbers
MULTIPLIERS, WEYL = (0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def high_and_low(code: Code, x: Value, by: int) -> tuple[Value, Value]:
    """The upper and the lower word of a product."""
    whole = code.at.mul(code.at.zext(x.ir, I128), ir.Constant(I128, by))
    return Value(code, code.at.trunc(code.at.lshr(whole, ir.Constant(I128, 64)), I64)), x * by


def words(code: Code, block: Value, stage: Value, keys: list[Value]) -> list[Value]:
    """The four words of a block."""
    x = [block + 1, code.integer(0), code.integer(0), stage]
    for k in range(10):
        (high0, low0), (high2, low2) = (high_and_low(code, x[2 * i], by) for i, by in enumerate(MULTIPLIERS))
        of_round = [key + (weyl * k & 2**64 - 1) for key, weyl in zip(keys, WEYL, strict=True)]
        x = [high2 ^ x[1] ^ of_round[0], low2, high0 ^ x[3] ^ of_round[1], low0]
    return x


def store_units(code: Code, x: list[Value], at: Value) -> None:
    """Store the numbers in [0, 1) of a block's words."""
    for k in range(BLOCK):
        upper = code.at.lshr(x[k // 2].ir, ir.Constant(I64, 40 if k % 2 else 8))
        number = code.at.sitofp(code.at.and_(code.at.trunc(upper, I32), ir.Constant(I32, 0xFFFFFF)), code.float)
        code.store_number(Value(code, code.at.fmul(number, ir.Constant(code.float, 2.0**-24))), at, code.integer(k))


def uniforms(code: Code, keys: Value, out: Value, m: Value, stage: Value) -> None:
    """The m numbers of an image, whose key is the two words at `keys`."""
    key, whole = [code.load_integer(keys, k) for k in range(2)], m / BLOCK
    with code.loop(whole) as block:
        store_units(code, words(code, block, stage, key), code.address(out, block * BLOCK, code.float))
    with code.when(whole * BLOCK < m):
        last = code.room(BLOCK // code.lanes)
        store_units(code, words(code, whole, stage, key), last)
        with code.loop(m, whole * BLOCK) as k:
            number = code.at.load(code.address(last, k - whole * BLOCK, code.float).ir, typ=code.float)
            code.store_number(Value(code, number), out, k)


def write(code: Code) -> None:
    code.job(uniforms, "ppii", "uniforms")


def by_cpu(keys: Tensor, m: int, stage: int) -> Tensor:
    """The numbers (n m) of keys (n 2)."""
    out, keys = torch.empty(len(keys), m), keys.contiguous()
    first, of_key = keys.data_ptr(), keys.element_size() * 2
    jobs = [(first + of_key * k, out.data_ptr() + out.element_size() * m * k, m, stage) for k in range(len(keys))]
    native.in_parallel(native.library(write, {"uniforms": 1}, BLOCK)["uniforms"], jobs)
    return out
