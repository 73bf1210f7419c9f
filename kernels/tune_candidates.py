"""What the tuner tries: representative calls of the entries of configs.json, and candidates for their configurations.

A candidate is compiled ahead of time, without a GPU, for all calls of its entry; one that spills, traps or passes a budget
has faults. The others are checked against the shipped configuration on a GPU, and timed.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import triton
from torch import Tensor

from perceiver_fast.kernels import (
    aot,
    cross_attention,
    cross_attention_backward,
    grid_attention,
    grid_attention_backward,
    grid_query_attention,
    grid_query_attention_backward,
)
from perceiver_fast.kernels.configs import Config, config, overridden
from perceiver_fast.kernels.grid_attention_tokens import BLOCK
from perceiver_fast.kernels.grid_query_keys import PAD
from perceiver_fast.kernels.launch import Launch

BATCH, LATENTS, IMAGE = 8, 512, (224, 224)
WARPS, STAGES, REGISTERS = (2, 4, 8), (1, 2), (None, 128, 168, 255)
SMALLEST, LARGEST = 16, 128  # sides of a tile: a product takes no less, and beyond the other registers spill
CHANGES = 2  # the most entries in which a candidate differs from the shipped configuration
META = torch.device("meta")

FINALISTS, ROUNDS = 3, 5  # the fastest are timed again, in turns with the shipped one, since clock rates drift
LEAST_GAIN = 0.02  # below it the shipped configuration stays
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # of a result's norm: sums change order


class OutOfTime(Exception):
    """``--seconds`` have passed."""


@dataclass(frozen=True)
class Call:
    """A representative call: latents attend to an image's grid, or to as many tokens, or such queries to latents.

    ``channels`` are the tokens' raw ones, or a head's; described queries have raw ones, and ``values`` has so many.
    """

    op: str
    dtype: torch.dtype
    channels: int
    decoder: bool = False
    values: int = 0

    def __str__(self) -> str:
        dtype, more = str(self.dtype).removeprefix("torch."), f", {self.values} of values" if self.values else ""
        return f"{self.op}, {dtype}, {self.channels} channels{more}{', decoder' if self.decoder else ''}"


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CALLS = [Call("grid_attention", dtype, channels) for dtype in (F32, BF16, F16) for channels in (3, 8, 64)]
CALLS += [
    Call("cross_attention", dtype, channels, decoder)
    for dtype in (F32, BF16)  # float16 takes bfloat16's entries, and its time
    for channels in (64, 128, 261, 512)
    for decoder in (False, True)
]
CALLS += [
    Call("grid_query_attention", dtype, channels, True, values)
    for dtype, channels, values in ((F32, 0, 1), (F32, 3, 64), (F32, 258, 512), (BF16, 3, 64), (BF16, 258, 512))
]


def described_forward(*arguments) -> tuple:
    """grid_query_attention's forward as a training step calls it, to a new output; the architecture comes last."""
    *others, arch = arguments
    return grid_query_attention.forward_launches(None, *others, True, arch)


def prepare(call: Call, name: str, arch: int, device: torch.device) -> Callable[[], tuple]:
    """What makes, with the configurations then in force, the results and (last) the launches of an entry's pass.

    On the meta device nothing runs; elsewhere the forward does, once, for what the backward needs.
    """
    torch.manual_seed(0)
    if call.op == "grid_attention":
        q = torch.randn(BATCH, LATENTS, call.channels + sum(IMAGE), device=device)
        feat = torch.randn(BATCH, *IMAGE, call.channels, device=device) * call.channels**-0.5
        arguments = (q, feat.to(call.dtype), torch.rand(BATCH, *IMAGE, device=device), None, 0.0, None)
        forward, backward = grid_attention.forward_launches, grid_attention_backward.backward_launches
    elif call.op == "grid_query_attention":
        tables, v = (
            torch.randn(BATCH, 1, LATENTS, n, device=device) for n in (call.channels + sum(IMAGE), call.values)
        )
        feat = torch.randn(1, *IMAGE, call.channels, device=device).to(call.dtype) * max(1, call.channels) ** -0.5
        scale = torch.rand(1, *IMAGE, device=device)
        arguments = (tables, feat, scale, None, v.to(call.dtype), None, True, 0.0, None, False)
        forward, backward = described_forward, grid_query_attention_backward.backward_launches
    else:
        queries, tokens = (math.prod(IMAGE), LATENTS) if call.decoder else (LATENTS, math.prod(IMAGE))
        q, k, v = (
            torch.randn(BATCH, 1, count, call.channels, dtype=call.dtype, device=device)
            for count in (queries, tokens, tokens)
        )
        arguments = (q, k, v, None, call.channels**-0.5, 0.0, None)
        forward, backward = cross_attention.forward_launches, cross_attention_backward.backward_launches
    if "forward" in name:
        return lambda: forward(*arguments, arch)
    *results, launches = forward(*arguments, arch)
    for launch in launches if device != META else ():
        launch.run()
    d_o = torch.randn_like(results[0])
    if call.op == "cross_attention":
        return lambda: backward(d_o, None, *arguments, *results[:2], arch)
    if call.op == "grid_query_attention":
        return lambda: backward(d_o, *arguments, results[1], True, arch)

    def grid_backward():
        o, lse, kept = results
        dq, _, *made = backward(d_o, None, None, *arguments, o, d_o, lse, kept, True, arch)  # _: rounding errors alone
        return dq, *made

    return grid_backward


def own(launches: Sequence[Launch], config: Config) -> list[Launch]:
    """The launches that ``config``, this very object, shapes: its kernel's, and those that gather partial results."""
    found, ours = [], False
    for launch in launches:
        ours = launch.config is config if launch.weights else ours
        found += [launch] * ours
    return found


def calls_of(name: str, arch: int) -> list[Call]:
    """The representative calls that launch an entry's kernel with its configuration."""
    calls, shipped = [call for call in CALLS if name.startswith(call.op)], config(name, arch)
    return [call for call in calls if own(prepare(call, name, arch, META)()[-1], shipped)]


def candidates(name: str, shipped: Config) -> list[Config]:
    """The shipped configuration, then its neighbours, the nearest first."""

    def near(size: int, most: int) -> list[int]:
        return [side for side in (size // 2, size, 2 * size) if SMALLEST <= side <= most]

    def changes(c: Config) -> int:
        return sum(a != b for a, b in zip(asdict(c).values(), asdict(shipped).values()))

    queries = near(shipped.queries, LARGEST)
    most = {"grid_attention": BLOCK, "grid_query_attention": PAD}  # what columns, and keys, are padded to
    tokens = near(shipped.tokens, next((size for op, size in most.items() if name.startswith(op)), LARGEST))
    every = itertools.starmap(Config, itertools.product(queries, tokens, WARPS, STAGES, REGISTERS))
    return [shipped, *sorted((c for c in every if 0 < changes(c) <= CHANGES), key=changes)]


@dataclass(frozen=True)
class Need:
    """What a candidate needs at most over an entry's calls, or its faults in the first that has any."""

    config: Config
    registers: int = 0
    shared: int = 0
    per_pair: float = 0.0  # instructions a thread issues for one weight, in its innermost loop
    faults: tuple[str, ...] = ()
    code: tuple = ()  # candidates alike in tile and in this are one binary, as far as can be told


def compile_candidate(name: str, calls: Sequence[Call], arch: int, deadline: float, candidate: Config) -> Need:
    """Compile a candidate ahead of time for all calls of its entry.

    Raises:
        OutOfTime: before it was done. ``deadline`` is of ``time.time()``, which processes share.
    """
    all_compiled = []
    for call in calls:
        if time.time() > deadline:
            raise OutOfTime
        try:
            with overridden({name: candidate}):
                launches = prepare(call, name, arch, META)()[-1]
            for launch in {id(launch): launch for launch in own(launches, candidate) if launch.weights}.values():
                instance = launch.instance(str(call))
                compiled = aot.compile_instance(instance, arch)
                faults = aot.faults(instance, compiled, arch)
                if compiled.matrix_instructions and not instance.tensor_cores:
                    faults.append("tensor cores for products that are to be float32's")
                if faults:
                    return Need(candidate, faults=tuple(faults))
                all_compiled.append(compiled)
        except Exception as error:  # Triton's, LLVM's and ptxas's have no common base
            return Need(candidate, faults=(f"does not compile: {type(error).__name__}",))
    return Need(
        candidate,
        max(c.registers for c in all_compiled),
        max(c.shared for c in all_compiled),
        max(c.instructions / c.exponentials for c in all_compiled),
        code=tuple((c.registers, c.shared, *sorted(c.loop.items())) for c in all_compiled),
    )


def distinct(needs: Sequence[Need]) -> list[Need]:
    """The candidates without faults, one of every binary; and the shipped one, which comes first, whatever it has."""
    first: dict[tuple, Need] = {}
    for need in needs:
        c = need.config
        if not need.faults or need is needs[0]:
            first.setdefault((c.queries, c.tokens, c.warps, need.code), need)
    return list(first.values())


def clock(launches: Sequence[Launch]) -> float:
    """Microseconds of launches by device events: the median of many runs, the level-2 cache emptied before each."""
    flags = next((f for x in launches if (f := x.arguments.get("flags")) is not None), None)

    def run() -> None:
        if flags is not None:
            flags.fill_(1)  # all that launches both read and write: without it every run but the first has less to do
        for launch in launches:
            launch.run()

    return 1e3 * triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median")


def wrong(results: Sequence[Tensor], right: Sequence[Tensor], tolerance: float) -> str | None:
    """By how much results differ, if by more than they may."""
    for mine, theirs in zip(results, right):
        error = float((mine - theirs).norm(dtype=torch.float64) / theirs.norm(dtype=torch.float64))
        if not error <= tolerance:  # not a number included
            return f"wrong: {error:.1e} of the norm, not at most {tolerance:.0e}"
    return None


def measure(
    name: str, call: Call, configs: Sequence[Config], arch: int, device: torch.device, deadline: float, rounds: int = 1
) -> list[float | str]:
    """Microseconds of every configuration, the median of the rounds, or why there are none; the first is the truth.

    Raises:
        OutOfTime: before it was done.
        Exception: of the first configuration, which has to be right.
    """
    make, right = prepare(call, name, arch, device), None
    found: list[list[float] | str] = [[] for _ in configs]
    for index in [*range(len(configs))] * rounds:
        if time.time() > deadline:
            raise OutOfTime
        if isinstance(found[index], str):
            continue
        try:
            with overridden({name: configs[index]}):
                *results, launches = make()
            results = [result.fill_(math.nan) for result in results if result.numel()]  # no leftovers of the one before
            for launch in launches:
                launch.run()
            right = right or [result.clone() for result in results]
            found[index] = wrong(results, right, TOLERANCE[call.dtype]) or found[index]
            if not isinstance(found[index], str):
                found[index].append(clock(own(launches, configs[index])))
        except Exception as error:
            if right is None:
                raise
            found[index] = f"{type(error).__name__}: {str(error)[:200]}"
    if isinstance(found[0], str):
        raise RuntimeError(f"the shipped configuration: {found[0]}")
    return [times if isinstance(times, str) else statistics.median(times) for times in found]


def gains(times: Sequence[Sequence[float | str]]) -> dict[int, float]:
    """How much faster every configuration is than the first, over all calls (the rows): 0.1 is 10 %."""
    whole = {i: column for i, column in enumerate(zip(*times)) if not any(isinstance(t, str) for t in column)}
    return {i: statistics.geometric_mean(a / b for a, b in zip(whole[0], column)) - 1 for i, column in whole.items()}


def choose(
    name: str, calls: Sequence[Call], configs: Sequence[Config], arch: int, device: torch.device, deadline: float
) -> tuple[Config, float, dict]:
    """The fastest configuration, or the first if none gains enough; the best gain; and all times for the log."""
    first = [measure(name, call, configs, arch, device, deadline) for call in calls]
    order = sorted((found := gains(first)), key=found.get, reverse=True)
    finalists = [configs[0], *(configs[i] for i in order if i)][: 1 + FINALISTS]
    final = [measure(name, call, finalists, arch, device, deadline, ROUNDS) for call in calls]
    best, gain = max(gains(final).items(), key=lambda item: item[1])
    log = {
        title: [
            {"config": asdict(c), "microseconds": dict(zip(map(str, calls), column))}
            for c, column in zip(those, zip(*times))
        ]
        for title, those, times in (("all", configs, first), ("finalists", finalists, final))
    }
    return finalists[best if gain >= LEAST_GAIN else 0], gain, log
