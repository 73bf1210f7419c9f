"""Registered operators called raw, as exported graphs call them: whatever comes is refused, or computed, never a crash.

Every argument of every declared operator is changed in turn, and in pairs drawn at random, in another process. What
is not refused has the shapes that it is to have, and nothing in it is left unwritten.
"""

import faulthandler
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from support import needs_extension
from torch.utils._pytree import tree_leaves, tree_map_only
from warm_python import python

from perceiver_fast.gpu import INTERPRETED, triton_error
from perceiver_fast.ops.declaration import OPERATORS, OPS

HUGE = 2**62
HALF = torch.bfloat16, torch.float16
PAIRS = 0 if INTERPRETED else 100  # of changed arguments, drawn at random, of every sample's calls


def changed_tensors(t):
    """What a tensor may be taken for: (what was done, another tensor)."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool):
        if dtype != t.dtype:
            yield f"in {dtype}", t.to(dtype)
    yield "on meta", t.to("meta")
    yield "one dimension more", t.unsqueeze(0)
    yield "one dimension more at the end", t.unsqueeze(-1)
    yield "flat", t.flatten()
    yield "of no dimension", t.new_zeros(())
    yield "without elements", t.new_zeros(0)
    for axis, size in enumerate(t.shape):
        if size > 0:
            yield f"axis {axis} one less", t.narrow(axis, 0, size - 1)
            yield f"axis {axis} of one", t.narrow(axis, 0, 1)
            yield f"without axis {axis}", t.select(axis, 0)
            yield f"axis {axis} one more", torch.cat([t, t.narrow(axis, 0, 1)], axis)
            yield f"axis {axis} twice", torch.cat([t, t], axis)
            yield f"axis {axis} empty", t.narrow(axis, 0, 0)
            # Many elements in the memory of one, and sizes whose product overflows in no memory at all.
            one = t.flatten()[:1] if t.numel() else t.new_zeros(1)
            yield (
                f"axis {axis} expanded to 2^62",
                one.view((1,) * t.dim()).expand(_with((1,) * t.dim(), axis, HUGE)),
            )
            others = tuple(0 if other == (axis + 1) % t.dim() else HUGE for other in range(t.dim()))
            if t.dim() > 1:
                yield f"all axes of 2^62, but one of none before axis {axis}", sized(t, others)


def sized(t, shape):
    """A tensor without elements; torch itself may refuse the shape, and then it is one of no axis but that."""
    try:
        return t.new_empty(0).as_strided(shape, (0,) * len(shape))
    except RuntimeError:
        return t.new_empty(0)


def same_tensors(t):
    """The same numbers, lying otherwise in memory."""
    spread = t.new_zeros(*t.shape, 3)
    spread[..., 1] = t
    yield "with gaps", spread[..., 1]
    if INTERPRETED:
        return  # a call takes seconds
    yield "transposed in memory", t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2]
    yield "from the middle", torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t


def changed(argument, value):
    """What else may come for an argument of a schema: (what was done, another value)."""
    kind = str(argument.type)
    if isinstance(value, torch.Tensor):
        yield from changed_tensors(value)
        yield "None", None
    elif value is None:
        yield from (
            (f"{tuple(t.shape)} {t.dtype}", t) for t in (torch.ones(1), torch.ones(2, 3).bool(), torch.ones(0).long())
        )
        yield "a number", 1.0
    elif isinstance(value, bool):
        yield "the other", not value
    elif isinstance(value, float):
        for other in (-1.0, float("nan"), float("inf"), -float("inf"), 1e300, 0.0, 1.0):
            yield f"{other}", other
    elif isinstance(value, int) or "dtype" in kind.lower() or isinstance(value, torch.dtype):
        yield from (
            (f"{other}", other) for other in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool)
        )
    elif isinstance(value, (list, tuple)) and not value:
        one = torch.ones(1) if "Tensor" in kind else 1.0
        yield from ((f"{count} of one", [one] * count) for count in (1, 2, 3))
    elif isinstance(value, (list, tuple)) and isinstance(value[0], torch.Tensor):
        yield from (("one less", value[1:]), ("none", []), ("twice", [*value, *value]))
        for i, t in enumerate(value):
            for what, other in changed_tensors(t):
                yield f"{i} {what}", [*value[:i], other, *value[i + 1 :]]
    elif isinstance(value, (list, tuple)):
        for other in (
            [],
            list(value) * 2,
            [-1] * len(value),
            [HUGE] * len(value),
            [0] * len(value),
            [2**31] * len(value),
        ):
            yield f"{other}", other


def _with(shape, axis, size):
    return *shape[:axis], size, *shape[axis + 1 :]


def tensors_of(result):
    """The outputs; an operator that writes into an argument has none."""
    return [t for t in tree_leaves(result) if t is not None]


def call(operator, arguments):
    """The outputs, or None where the call is refused with a message of what was expected."""
    try:
        outputs = tensors_of(operator.packet(*arguments))
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, MemoryError) as error:
        assert str(error).strip(), error
        return None
    if all(t.device.type == "meta" for t in outputs):
        return outputs
    kinds = [str(argument.type) for argument in operator.packet.default._schema.arguments]
    on_meta = [
        tree_map_only(torch.Tensor, lambda t: t.to("meta"), value) if "Tensor" in kind else value
        for value, kind in zip(arguments, kinds)
    ]
    expected = tensors_of(operator.packet(*on_meta))
    assert [(t.shape, t.dtype) for t in outputs] == [(t.shape, t.dtype) for t in expected]
    return outputs


def unwritten(outputs, before):
    """Whether fresh memory shows, which is NaN here, where the sample's results have none."""
    return any(o.isnan().any() and not b.isnan().any() for o, b in zip(outputs, before))


def try_operator(name):
    """All changes of all samples' calls of an operator; prints what is about to be tried, and how much was refused."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    op = next(op for op in OPS.values() if any(o.name == name for o in op.operators))
    refused = computed = 0
    for variant in op.variants:
        if INTERPRETED and (variant.get("dtype") == torch.float64 or variant.get("inverted")):
            continue  # Triton's kernels have neither
        if INTERPRETED and refused:
            break  # one sample's calls; interpreted, each takes a good part of a second
        for operator, arguments in op.recorded_calls("cpu", **variant):
            if operator.name != name:
                continue
            schema = operator.packet.default._schema.arguments
            expected = call(operator, arguments)
            assert expected is not None, f"{name} refuses its sample"
            options = []
            for place, (argument, value) in enumerate(zip(schema, arguments)):
                options += [(place, f"{argument.name} {what}", other) for what, other in changed(argument, value)]
                for what, other in same_tensors(value) if isinstance(value, torch.Tensor) else ():
                    print(f"{variant}: {argument.name} {what}", flush=True)
                    found = call(operator, [*arguments[:place], other, *arguments[place + 1 :]])
                    assert found is not None, "refused"
                    for a, b in zip(found, expected):
                        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
            draw = random.Random(0)
            trials = [(option,) for option in options] + [tuple(draw.sample(options, 2)) for _ in range(PAIRS)]
            for trial in trials:
                given = list(arguments)
                for place, _, other in trial:
                    given[place] = other
                print(f"{variant}: {', '.join(what for _, what, _ in trial)}", flush=True)
                found = call(operator, given)
                refused, computed = refused + (found is None), computed + (found is not None)
                if found is None or any(t.device.type == "meta" for t in found):
                    continue
                finite = all(
                    v.isfinite().all() for v in tree_leaves(given) if isinstance(v, torch.Tensor) and v.numel() < HUGE
                )
                finite = finite and all(abs(v) < 1e30 for v in tree_leaves(given) if isinstance(v, float))
                if INTERPRETED:  # Triton's interpreter multiplies the bit patterns of half precision
                    finite = finite and not any(
                        t.dtype in HALF for t in (*given, *found) if isinstance(t, torch.Tensor)
                    )
                assert not finite or not unwritten(found, expected), "an output was not written"
    print(f"refused {refused}, computed {computed}", flush=True)


def run(names, **environment):
    """Tries operators in a process of their own, and those after one that ends it in another.

    Returns how many calls of each were refused, and computed; or how it ended.
    """
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    found, left = {}, list(names)
    while left:
        done = python(__file__, *left, env=os.environ | {"PYTHONPATH": path} | environment)
        lines = done.stdout.splitlines()
        for line in lines:
            if line.startswith("refused "):
                _, refused, _, computed = line.split()
                found[left.pop(0)] = int(refused.rstrip(",")), int(computed)
        if left:
            found[left.pop(0)] = f"ended with {done.returncode} at: {lines[-1:]}\n{done.stderr[-3000:]}"
        else:
            assert done.returncode == 0, done.stderr[-3000:]
    return found


def check(found, name):
    assert not isinstance(found[name], str), f"{name} {found[name]}"
    refused, computed = found[name]
    assert refused > computed


INTERPRETABLE = [name for name, operator in OPERATORS.items() if operator.triton]


@pytest.fixture(scope="module")
def on_the_cpu():
    return run(OPERATORS)


@pytest.fixture(scope="module")
def in_the_interpreter():
    return run(INTERPRETABLE, TRITON_INTERPRET="1")


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize("name", OPERATORS)
def test_on_the_cpu(name, on_the_cpu):
    check(on_the_cpu, name)


@pytest.mark.skipif(triton_error is not None, reason=f"triton is not there: {triton_error}")
@pytest.mark.parametrize("name", INTERPRETABLE)
def test_triton_kernels_in_the_interpreter(name, in_the_interpreter):
    check(in_the_interpreter, name)


if __name__ == "__main__":
    faulthandler.enable()
    if INTERPRETED:
        import fast_interpreter  # noqa: F401
    for name in sys.argv[1:]:
        try_operator(name)
