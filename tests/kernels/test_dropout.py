"""Dropout in Triton drops the weights that the reference drops."""

import torch
import triton
import triton.language as tl

from perceiver_fast.kernels.dropout import dropout_keep, hash_rows, hash_tokens, threshold_bits
from perceiver_fast.reference import dropout as reference


@triton.jit
def keep_kernel(seed, out, rows, tokens, threshold, BLOCK: tl.constexpr):
    row, token = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK).to(tl.int64)
    number = tl.load(seed)
    keep = dropout_keep(hash_rows(number, row), hash_tokens(number, token), threshold)
    tl.store(out + row * tokens + token, keep.to(tl.int8), mask=token < tokens)


def test_kept_weights_are_the_references(device):
    for number, probability in ((0, 0.5), (2**61 + 12345, 0.1), (987654321, 0.97)):
        seed = torch.tensor([number], device=device)
        out = torch.empty(40, 200, dtype=torch.int8, device=device)
        keep_kernel[(40,)](seed, out, 40, 200, threshold_bits(probability), BLOCK=256)
        assert -(2**31) <= threshold_bits(probability) < 2**31  # the same type of argument for all of them
        assert torch.equal(out.bool(), reference.dropout_keep(seed, 40, 200, probability))
