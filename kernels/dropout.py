"""Attention dropout: which weights are kept, the same on every backend (perceiver_fast/reference/dropout.py states it).

Every query row and every token has a 32-bit hash of its index and the seed, and one more hash, of these two, decides
about their weight. No random numbers are drawn in turn: a weight's fate does not depend on how tiles are cut, and the
backward finds it again. Philox, which torch uses, would cost about three times the instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.reference.dropout import dropout_threshold


@triton.jit
def _splitmix64(x):
    """64 bits out of 64 bits (Sebastiano Vigna's generator), of any shape."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def hash_rows(seed, rows):
    """uint32 hashes of query rows, by their int64 indices ``(b H + h) N + n``, of any shape; ``seed`` is one int64."""
    return (_splitmix64(_splitmix64(seed.to(tl.uint64)) ^ _splitmix64(2 * rows.to(tl.uint64))) >> 32).to(tl.uint32)


@triton.jit
def hash_tokens(seed, tokens):
    """uint32 hashes of tokens, by their int64 indices m, of any shape; their numbers are odd, those of rows even."""
    return (_splitmix64(_splitmix64(seed.to(tl.uint64)) ^ _splitmix64(2 * tokens.to(tl.uint64) + 1)) >> 32).to(
        tl.uint32
    )


@triton.jit
def dropout_keep(row_hash, token_hash, threshold):
    """True where a weight is kept: where lowbias32 (Chris Wellons) of ``row_hash ^ token_hash`` is not below threshold.

    The hashes broadcast, as ``[N, 1]`` and ``[1, M]``. They and ``threshold``, p 2^32, are 32 bits of any type.
    """
    x = row_hash.to(tl.uint32, bitcast=True) ^ token_hash.to(tl.uint32, bitcast=True)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    x = x ^ (x >> 16)
    return x >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def cross_attention_hashes_kernel(seed, row_hashes, token_hashes, rows, tokens, BLOCK: tl.constexpr):
    """Dropout's hashes of all query rows and tokens: once a call, since a hash costs more than a weight does.

    Grid: a program a ``BLOCK`` of indices, of rows and of tokens; indices beyond the last of either are not written.

        seed          [2]      in   int64: the seed, and the index of the first token
        row_hashes    [rows]   out  uint32 as int32; rows = B H N
        token_hashes  [tokens] out  uint32 as int32; tokens = M
    """
    number = tl.load(seed)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(row_hashes + i, hash_rows(number, i).to(tl.int32, bitcast=True), mask=i < rows)
    tl.store(token_hashes + i, hash_tokens(number, tl.load(seed + 1) + i).to(tl.int32, bitcast=True), mask=i < tokens)


def two_numbers(seed: Tensor | None) -> Tensor | None:
    """A seed as kernels that hash tokens read it: int64 ``[2]``, the seed and the index of the first token."""
    return seed if seed is None or seed.numel() == 2 else torch.cat([seed, torch.zeros_like(seed)])


def threshold_bits(probability: float) -> int:
    """p 2^32 as kernels take it: its 32 bits as a signed number, so that it is an int32 argument for every p."""
    threshold = dropout_threshold(probability)
    return threshold - (threshold >> 31 << 32)
