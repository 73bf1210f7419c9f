"""One case: every side built, checked, then timed in turns. And one side in a loop, for a profiler."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable

import torch

import perceiver_fast as pf
from benchmarks.gpu import check, clock
from benchmarks.gpu.cases import Case
from benchmarks.gpu.problem import Problem
from benchmarks.gpu.sides import PEERS, reasons
from benchmarks.sides import OURS

SHARE = 0.6  # of a case's time, after which no further side is begun: those that are there are still to be timed


class DeviceLost(RuntimeError):
    """The device answers no more: this process is of no further use."""


def use_exact_float32() -> None:
    """No tf32: float32 means float32 on all sides."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def explain(problem: Problem) -> dict:
    """Which way and backend our side takes, and which ops describe its tokens."""
    image = problem.copies[0][0][-1]
    with problem.autocast(), torch.set_grad_enabled(problem.case.step):
        crosses = [layer for layer in pf.explain(problem.model, image).layers if layer.path]
    return {
        "path": ", ".join(sorted({layer.path for layer in crosses})),
        "backend": ", ".join(sorted({f"{layer.choice.op} on {layer.choice.backend}" for layer in crosses})),
        "uses": sorted({f"{use.op} on {use.backend}" for layer in crosses for use in layer.plan.uses}),
        "rejected": {name: why for layer in crosses for name, why in layer.choice.rejected.items()},
    }


def outcome(error: Exception) -> dict:
    """What a side's exception means for its line of the result.

    Raises:
        DeviceLost: the device fails whatever it is asked from now on.
    """
    text = (str(error).strip().splitlines() or [""])[0]
    found = {"outcome": "failed", "reason": f"{type(error).__name__}: {text}"[:400]}
    if isinstance(error, torch.OutOfMemoryError):
        found["outcome"] = "out of memory"
    error.__traceback__ = None  # its frames hold tensors
    free()
    return found


def free() -> None:
    """Give memory back to the device; the first thing to notice that it is lost."""
    gc.collect()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(str(error).splitlines()[0]) from error
        torch.cuda.empty_cache()


def measure_case(
    case: Case,
    device: torch.device,
    dry: bool = False,
    compile_mode: str = "headline",
    exclude: dict[str, str] | None = None,
    seconds: float = math.inf,
    say: Callable[[str], object] = lambda side: None,
) -> dict:
    """Measure ``case``: one entry of the result's "cases".

    Args:
        exclude: sides that are left out, and why.
        seconds: that there are for it: sides whose turn comes too late are not run.
        say: told which side comes next, for whoever has to know what a process died of.
    """
    late = time.monotonic() + SHARE * seconds
    torch.compiler.reset()
    free()
    cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    try:
        problem = Problem(case, device, dry, getattr(cuda, "L2_cache_size", 0))
    except torch.OutOfMemoryError as error:
        return {"case": case.name, "sides": {OURS: outcome(error)}, "notes": ["the inputs do not fit"]}
    result = {"case": case.name, "copies": len(problem.copies), "notes": [], **_facts(problem)}
    try:
        result["ours"] = explain(problem)
    except Exception as error:
        result["ours"] = outcome(error)
    say("truth")
    try:
        truths = check.truth(problem)
    except Exception as error:
        truths = None
        result["notes"].append(f"unchecked, so without ratios: no truth: {outcome(error)['reason']}")
    sides: dict[str, dict] = {}
    calls: dict[str, clock.Call] = {}
    for name in (name for name, peer in PEERS.items() if peer.fits(case)):
        if name in (exclude or {}):
            sides[name] = {"outcome": "failed", "reason": exclude[name]}
        elif why := reasons(problem, name, compile_mode, cuda.total_memory if cuda else None):
            sides[name] = why
        elif calls and time.monotonic() > late:
            sides[name] = {"outcome": "not run", "reason": f"the case's {seconds:.0f} s were spent"}
        else:
            say(name)
            try:
                calls[name], sides[name] = _checked(problem, name, truths)
            except Exception as error:
                sides[name] = outcome(error)
    del truths
    say("timing")
    rough = {name: sides[name].pop("seconds") for name in calls}
    timed = clock.interleave(calls, rough, device, lambda name, error: sides[name].update(outcome(error)))
    for name, times in timed.items():
        sides[name].update(times, outcome="timed")
        if case.level == "op" and not case.step:
            sides[name]["pairs_per_second"] = result["pairs"] / times["median"]
    for name, side in sides.items():
        side["over_ours"] = check.ratio(sides, name) if name != OURS else None
    return result | {"sides": sides}


def _facts(problem: Problem) -> dict:
    case, geometry = problem.case, problem.geometry
    facts = {
        "level": case.level, "geometry": case.geometry, "batch": case.batch, "dtype": case.dtype, "pass": case.pass_name,
        "tokens": geometry.tokens, "channels": geometry.token_channels, "latents": geometry.queries,
        "latent_dim": geometry.model["latent_dim"], "dim_head": geometry.dim_head,
        "pairs": case.batch * geometry.queries * geometry.tokens,
    }  # fmt: skip
    if case.level == "model":
        facts |= {key: geometry.model[key] for key in ("depth", "self_per_cross_attn")}
        facts |= {"cut": geometry.cut or "nothing"}
    return facts


def rotating(problem: Problem, side) -> clock.Call:
    """The call that is timed: every one on the next copy of the inputs."""
    return lambda i: check.call(problem, side, *problem.copies[i % len(problem.copies)])


def _checked(problem: Problem, name: str, truths) -> tuple[clock.Call, dict]:
    """A side that ran twice: once to be checked, once warm for its memory and a rough time."""
    side = PEERS[name].build(problem)
    found = check.judge(check.checked_results(problem, side), truths, problem.case.dtype)
    call = rotating(problem, side)
    call(0)  # not the first: its cotangent was another
    return call, {"outcome": "checked", **found, **clock.probe(call, problem.device)}


def profile(case: Case, name: str, device: torch.device, dry: bool, iterations: int) -> None:
    """Run one side in a loop, warm, between the marks that profilers start and stop at."""
    problem = Problem(case, device, dry)
    if why := reasons(problem, name, "all", None):
        raise SystemExit(f"{case.name}: {name} is {why['outcome']}: {why['reason']}")
    print(f"{case.name}, {name}; ours: {explain(problem)['backend']}", flush=True)
    call = rotating(problem, PEERS[name].build(problem))
    for i in range(3):
        call(i)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
    for i in range(iterations):
        call(i)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()
