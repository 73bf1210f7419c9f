"""The kernels of grid attention that ship: what is compiled ahead of time, with its budgets."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from perceiver_fast.kernels import grid_attention as forward
from perceiver_fast.kernels import grid_attention_backward as backward
from perceiver_fast.kernels import grid_attention_token_grads as token_grads
from perceiver_fast.kernels import grid_attention_tokens as tokens
from perceiver_fast.kernels.aot import Instance
from perceiver_fast.kernels.configs import Config
from perceiver_fast.kernels.grid import FEW, GROUP, Grid

FEATURES = {"fma": (3, 8), "bf16": (3, 64), "tf32": (3, 64), "ieee": (16, 64)}
"""Raw channels that are compiled for: an image's, and the most that a variant is meant for."""
INTEGERS = "B N rows columns padded q_batch q_row splits per_split column_blocks L".split()


def _types(kernel, grid: Grid, dropout: bool, masked: bool = False) -> tuple[dict[str, str], dict[str, None]]:
    """Types of a kernel's arguments, and those that are None for this variant."""
    halves = {"bf16": ("*bf16", "*bf16"), "tf32": ("*bf16", "*fp32")}
    feat = {"bf16": "*bf16", "tf32": "*fp16"}.get(grid.precision, "*fp32")
    keys, values = halves.get(grid.precision, ("*fp32", "*fp32"))
    fma = grid.precision == "fma"
    types = dict(
        planes="*fp32" if fma else None,
        scale=None if fma else "*fp32",
        keys=None if fma else keys,
        values=None if fma else values,
        feat=feat,
        dfeat=feat,
        mask="*u8" if masked else None,
        seed="*i64" if dropout else None,
        token_keys="*i32" if dropout else None,
        lse="*fp64",
        d_lse="*fp64",
        threshold="i64",
        kept_scale="fp32",
        **{name: "i32" for name in INTEGERS},
    )
    if kernel in (tokens.grid_planes_kernel, tokens.grid_tokens_kernel, token_grads.grid_attention_token_grads_kernel):
        types |= dict(scale="*fp32", planes="*fp32", values=values)
    constants = {p.name for p in kernel.params if p.is_constexpr}
    found = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
    return {n: t for n, t in found.items() if t is not None}, {n: None for n, t in found.items() if t is None}


def instances(architecture: int) -> Iterator[Instance]:
    """Every kernel of grid attention, in every variant, for an architecture."""
    divisible = ("padded", "per_split")
    for precision, counts in FEATURES.items():
        for features in counts:
            grid = Grid(1, 512, features, (224, 224), precision)
            few = features <= FEW
            widths = dict(K=tokens.key_width(grid), V=tokens.value_width(grid), GROUP=GROUP)
            for dropout in (False, True) if few else (False,):
                label = f"[{precision}, F={features}{', dropout' if dropout else ''}]"
                for stem, kernel in (
                    ("grid_attention_forward", forward.grid_attention_forward_kernel),
                    ("grid_attention_backward", backward.grid_attention_backward_kernel),
                ):
                    config = grid.config(stem, architecture)
                    types, none = _types(kernel, grid, dropout)
                    extra = dict(HOLES=True) | (dict(HAS_KEPT=dropout) if "backward" in stem else {})
                    yield Instance(
                        stem + label,
                        kernel,
                        types,
                        none
                        | widths
                        | extra
                        | dict(F=features, BN=config.queries, BJ=config.tokens, DROPOUT=dropout, PRECISION=precision),
                        config,
                        weights=config.queries * config.tokens,
                        tensor_cores=precision in ("bf16", "tf32"),
                        registers=255 if dropout or config.registers is None else config.registers,
                        divisible=divisible,
                    )
                kernel = token_grads.grid_attention_token_grads_kernel
                if few and precision in ("bf16", "tf32"):
                    continue  # few channels take the float32 kernel
                config = grid.config("grid_attention_token_grads", architecture)
                types, none = _types(kernel, grid, dropout, masked=True)
                rows = token_grads.ROWS if few else 1
                if precision == "fma":
                    types.pop("keys", None)
                    none["keys"] = None
                yield Instance(
                    "grid_attention_token_grads" + label,
                    kernel,
                    types,
                    none
                    | dict(F=features, K=widths["K"], C=max(16, triton.next_power_of_2(features)), BN=config.queries)
                    | dict(BJ=config.tokens, ROWS=rows, DROPOUT=dropout, HAS_KEPT=dropout, MASKED=True)
                    | dict(PRECISION=precision),
                    config,
                    weights=config.queries * config.tokens * rows,
                    tensor_cores=precision in ("bf16", "tf32"),
                    divisible=divisible,
                )
            yield from _small_kernels(grid, widths)


def _small_kernels(grid: Grid, widths: dict[str, int]) -> Iterator[Instance]:
    """Descriptions of tokens, statistics and merges: bound by memory, so only that they compile and do not spill."""
    label = f"[{grid.precision}, F={grid.features}]"
    common = dict(F=grid.features, MASKED=True, BLOCK=tokens.BLOCK if grid.features <= FEW else tokens.BLOCK // 4)
    plain = Config(0, tokens.BLOCK, 4)
    if grid.precision == "fma":
        kernel, constants = tokens.grid_planes_kernel, common
    else:
        kernel, constants = (
            tokens.grid_tokens_kernel,
            common | widths | dict(PIECES=tokens.key_pieces(grid), SPLIT=3 if grid.features <= FEW else 2),
        )
    types, none = _types(kernel, grid, False, masked=True)
    yield Instance(f"{kernel.__name__.removesuffix('_kernel')}{label}", kernel, types, none | constants, plain)
    if grid.features != 3 or grid.precision != "fma":
        return
    kernel = forward.grid_attention_merge_kernel
    types, none = _types(kernel, grid, True)
    constants = dict(F=grid.features, BJ=32, PARTS=64, BLOCK=128, DROPOUT=True)
    yield Instance(f"grid_attention_merge{label}", kernel, types, none | constants, plain)
    kernel = backward.grid_attention_backward_merge_kernel
    types, none = _types(kernel, grid, True)
    constants = dict(F=grid.features, BJ=32, PARTS=64, BLOCK=128, HAS_LSE=True, DROPOUT=True)
    yield Instance(f"grid_attention_backward_merge{label}", kernel, types, none | constants, plain)
    kernel = backward.grid_attention_delta_kernel
    types, none = _types(kernel, grid, True)
    types |= dict(rows="i32")
    constants = dict(HAS_LSE=True, HAS_KEPT=True, BLOCK=256)
    yield Instance("grid_attention_delta", kernel, types, none | constants, Config(0, 256, 2))
