"""Attention dropout: which weights are kept, the same on every backend (perceiver_fast/reference/dropout.py states it).

A hash of indices rather than a stream of random numbers: a weight's fate does not depend on tiles, and the backward
finds it again. Philox would cost about three times the instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_fast.reference.dropout import dropout_threshold


@triton.jit
def _splitmix64(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_keys(seed, rows):
    """32-bit keys of query rows: int64 indices ``b H N + h N + n``."""
    return (_splitmix64(_splitmix64(seed.to(tl.uint64)) ^ _splitmix64(2 * rows.to(tl.uint64))) >> 32).to(tl.uint32)


@triton.jit
def token_keys(seed, tokens):
    """32-bit keys of tokens: int64 indices m."""
    return (_splitmix64(_splitmix64(seed.to(tl.uint64)) ^ _splitmix64(2 * tokens.to(tl.uint64) + 1)) >> 32).to(
        tl.uint32
    )


@triton.jit
def keep(row_key, token_key, threshold):
    """True where a weight is kept; keys broadcast; they and ``threshold``, p 2^32, are 32 bits of any type."""
    x = row_key.to(tl.uint32, bitcast=True) ^ token_key.to(tl.uint32, bitcast=True)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    x = x ^ (x >> 16)
    return x >= threshold.to(tl.uint32, bitcast=True)


def threshold_bits(probability: float) -> int:
    """p 2^32 as kernels take it: its 32 bits as a signed number, one type of argument for all p."""
    threshold = dropout_threshold(probability)
    return threshold - (threshold >> 31 << 32)
