"""The kernels take exponentials in base 2, which is one instruction: 2^(log2(e) x) for e^x.

A factor of the logits is multiplied by ``LOG2_E`` beforehand. What a kernel returns in natural units, a log-sum-exp or
a gradient by logits, is multiplied by ``LN_2``.
"""

from __future__ import annotations

import math

import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
