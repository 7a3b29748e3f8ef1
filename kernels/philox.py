"""Uniform numbers on any device: the bits that numpy's `Philox` gives, ten rounds of Philox4x64 (Salmon et al. 2011).

Legend: n images · m numbers of an image.

A block of four words of 64 bits is a function of a key (two words) and a counter (four):

    a round     [x₀ x₁ x₂ x₃] ← [hi(M₁·x₂) ⊕ x₁ ⊕ key₀,  lo(M₁·x₂),  hi(M₀·x₀) ⊕ x₃ ⊕ key₁,  lo(M₀·x₀)]
    between     [key₀ key₁] ← [key₀ + W₀, key₁ + W₁]

A word gives two numbers, of its lower half first: the upper 24 of 32 bits, over 2²⁴. Block k of an image has the
counter [k+1, 0, 0, stage], since numpy counts before it makes a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import backend_for
from kernels.jit import cdiv, jit, launch, tl
from kernels.philox_cpu import MULTIPLIERS, WEYL, by_cpu

BLOCK = 128  # blocks of eight numbers that a program makes


@jit
def philox_round(x0, x1, x2, x3, key0, key1):
    m0, m1 = tl.full((1,), 0xD2E7470EE14C6C93, tl.uint64), tl.full((1,), 0xCA5A826395121157, tl.uint64)
    return tl.umulhi(x2, m1) ^ x1 ^ key0, x2 * m1, tl.umulhi(x0, m0) ^ x3 ^ key1, x0 * m0


@jit
def unit(bits):
    """The number in [0, 1) of 32 bits."""
    return (bits.to(tl.uint32) >> 8).to(tl.float32) * (1 / 16777216)


@jit(varying=("m", "stage"))
def philox_kernel(
    keys,  # (n 2): of each image
    out,  # (n m)
    m,
    stage,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.uint64)
    key0 = tl.load(keys + image * 2).to(tl.uint64) + zero
    key1 = tl.load(keys + image * 2 + 1).to(tl.uint64) + zero
    x0, x1, x2, x3 = (block + 1).to(tl.uint64), zero, zero, stage.to(tl.uint64) + zero
    for _ in tl.static_range(10):
        x0, x1, x2, x3 = philox_round(x0, x1, x2, x3, key0, key1)
        key0 += 0x9E3779B97F4A7C15
        key1 += 0xBB67AE8584CAA73B
    first = out + image * m + block * 8
    for word in tl.static_range(4):
        bits = x0 if word == 0 else x1 if word == 1 else x2 if word == 2 else x3
        at = block * 8 + 2 * word
        tl.store(first + 2 * word, unit(bits), mask=at < m)
        tl.store(first + 2 * word + 1, unit(bits >> 32), mask=at + 1 < m)


def signed(word: int) -> int:
    """The number whose 64 bits in two's complement are those of a word."""
    return word - (word >> 63 << 64)


def multiply(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 64 bits of products of words, which are int64 here, and another word."""
    half = 0xFFFFFFFF
    low, high, by_low, by_high = x & half, x >> 32 & half, by & half, by >> 32
    middle = high * by_low + (low * by_low >> 32 & half)
    carried = low * by_high + (middle & half)
    return high * by_high + (middle >> 32 & half) + (carried >> 32 & half), x * signed(by)


def by_torch(keys: Tensor, m: int, stage: int) -> Tensor:
    """The kernel in torch, for any device."""
    (key0, key1), counter = keys.T[..., None], torch.arange(1, cdiv(m, 8) + 1, device=keys.device)
    x0, x1, x2, x3 = counter, torch.zeros_like(counter), torch.zeros_like(counter), torch.full_like(counter, stage)
    for _ in range(10):
        (high0, low0), (high1, low1) = (multiply(x, by) for x, by in zip((x0, x2), MULTIPLIERS, strict=True))
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key + signed(weyl) for key, weyl in zip((key0, key1), WEYL, strict=True))
    words = torch.stack(torch.broadcast_tensors(x0, x1, x2, x3), dim=2)
    upper = torch.stack([words >> 8 & 0xFFFFFF, words >> 40 & 0xFFFFFF], dim=3)
    return upper.flatten(1)[:, :m] * 2.0**-24


def uniforms(keys: Tensor, m: int, stage: int, backend: str | None = None) -> Tensor:
    """Make m uniform numbers for each image: the same bits on every device.

    Args:
        keys: (n 2) int64, whose bits are the key of each image.
        m: below 2³¹.
        stage: the counter's last word.
        backend: see `kernels.backend_for`.

    Returns:
        (n m) float32 in [0, 1).
    """
    if backend_for(keys, backend) == "torch":
        return (by_cpu if keys.device.type == "cpu" else by_torch)(keys, m, stage)
    out = torch.empty(len(keys), m, dtype=torch.float32, device=keys.device)
    if out.numel():
        launch(philox_kernel, (len(keys), cdiv(m, 8 * BLOCK)), keys, out, m, stage, BLOCK=BLOCK, num_warps=4)
    return out
