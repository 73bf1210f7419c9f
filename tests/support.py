"""What several tests need: error measures, random configurations, and models of both libraries with one set of weights."""

import math
import random
import subprocess
import sys

import perceiver_pytorch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import perceiver_fast as pf
from perceiver_fast import extension

needs_extension = dict(
    condition=extension.error is not None, reason=f"the CPU kernels are not there: {extension.error}"
)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected, in float64; zero when both are equal."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if torch.equal(actual, expected):
        return 0.0
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def grid_inputs(batch, queries, features, sizes, dtype=torch.float64, masked=False, magnitude=1.0, seed=0):
    """Random q, feat, scale and mask of grid attention; with several batch elements the first mask is all False."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = (draw(batch, queries, features + sum(sizes)) * magnitude).to(dtype)
    feat = draw(batch, *sizes, features).to(dtype)
    scale = (draw(batch, *sizes).abs() + 0.3).to(dtype)
    mask = draw(batch, *sizes) > -0.5 if masked else None
    if masked and batch > 1:
        mask[0] = False
    return q, feat, scale, mask


def random_config(seed: int) -> dict:
    """A random small model and its input: keywords, sizes, batch, and whether it is masked."""
    r = random.Random(seed)
    axes = r.choice([1, 2, 2, 2, 3, 4])
    sizes = tuple(r.choice([1, 2, 3, 5, 7, 9, 13, 16, 17, 31] if axes < 3 else [1, 2, 3, 5, 7]) for _ in range(axes))
    keywords = dict(
        num_freq_bands=r.choice([1, 2, 4, 6, 13]),
        depth=r.choice([1, 2, 3]),
        max_freq=r.choice([4.0, 10.0, 30.0]),
        input_channels=r.choice([1, 2, 3, 3, 4, 6]),
        input_axis=axes,
        num_latents=r.choice([1, 3, 8, 17, 33]),
        latent_dim=r.choice([8, 16, 24]),
        cross_heads=r.choice([1, 1, 2, 3, 4]),
        latent_heads=2,
        cross_dim_head=r.choice([4, 8, 16]),
        latent_dim_head=8,
        num_classes=5,
        weight_tie_layers=r.random() < 0.4,
        self_per_cross_attn=r.choice([0, 1]),
    )
    return dict(keywords=keywords, sizes=sizes, batch=r.choice([1, 2, 3]), masked=r.random() < 0.5)


def model_pair(dtype=torch.float32, **keywords):
    """perceiver-pytorch's model and ours with its weights."""
    theirs = perceiver_pytorch.Perceiver(**keywords)
    ours = pf.Perceiver(**keywords)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def outputs_and_gradients(model, data, mask=None, weight=None, **call):
    """Output, and the gradients of a weighted sum of it by every parameter and by the data."""
    model.zero_grad()
    data = data.clone().requires_grad_()
    out = model(data, mask=mask, **call)
    (out * (torch.ones_like(out) if weight is None else weight.to(out.dtype))).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients | {"data": data.grad}


def tensors(value) -> list[torch.Tensor]:
    """All tensors of an output: a tensor, or tuples and lists of them."""
    return [value] if torch.is_tensor(value) else [t for part in value for t in tensors(part)]


def results(model, dtype, inputs, weight=None, default_dtype=torch.float32):
    """Outputs of a model in ``dtype``, and the gradients of a weighted sum of them.

    Args:
        inputs: the forward's keyword arguments; floating-point tensors are converted and get a gradient.
        weight: of the first output in that sum. Default: drawn at random, the same for all calls.
        default_dtype: torch's during the forward.
    """
    model.zero_grad()  # first: changing dtype rounds the gradients a model still holds, those of earlier calls
    model.to(dtype)
    torch.manual_seed(0)  # of dropout
    call = {}
    for name, value in inputs.items():
        if torch.is_tensor(value) and value.is_floating_point():
            value = value.to(dtype, copy=True).requires_grad_()
        elif isinstance(value, list):
            value = [part.to(dtype) for part in value]
        call[name] = value
    torch.set_default_dtype(default_dtype)
    try:
        outputs = tensors(model(**call))
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype) for out in outputs]
    if weight is not None:
        weights[0] = weight.to(dtype)
    sum((out * w).sum() for out, w in zip(outputs, weights)).backward()
    found = {f"out {i}": out.detach() for i, out in enumerate(outputs)}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: v.grad for name, v in call.items() if torch.is_tensor(v) and v.grad is not None}


def compare_models(theirs, ours, inputs, noise=1e-14, weight=None, exact_positions=False, where=None):
    """Errors of ours (float64, float32) and of theirs (float32) against theirs in float64, for all results.

    Gradients that are nothing but rounding beside the others' norm (1e-9 of it, as where softmax saturates) are left
    out of the comparison of float32 errors, and in float64 agree to ``noise`` times it.

    Args:
        theirs, ours: models with the same weights, all exact in float32.
        inputs, weight: see :func:`results`.
        exact_positions: let theirs compute positions in float64 when all else is: the variants' are in torch's default
            dtype.
        where: named when a comparison fails.

    Yields:
        name, error of ours in float32, error of theirs in float32.
    """
    default_dtype = torch.float64 if exact_positions else torch.float32
    exact = results(theirs, torch.float64, inputs, weight, default_dtype)
    ours64 = results(ours, torch.float64, inputs, weight)
    ours32 = results(ours, torch.float32, inputs, weight)
    theirs32 = results(theirs, torch.float32, inputs, weight)
    assert ours64.keys() == exact.keys(), where
    whole = torch.stack([g.norm() for g in exact.values()]).norm().item()
    for name, value in exact.items():
        size = value.norm().item()
        assert ours64[name].shape == value.shape, (name, where)
        error64 = (ours64[name] - value).norm().item()
        assert error64 <= 1e-10 * size + noise * whole, (name, error64, size, whole, where)
        if size > 1e-9 * whole:
            yield name, relative_error(ours32[name], value), relative_error(theirs32[name], value)


def check_float32(rows, floor=5e-7, exceptions=1 / 300):
    """Float32 errors no greater than theirs on the whole, and each within 2x of theirs but for a few, within 5x.

    The exceptions are small gradients, sums of few terms, where theirs happened to round well.

    Args:
        rows: (where, name, error of ours, error of theirs).
    """
    count, beyond, ratios = 0, [], []
    for where, name, ours, theirs in rows:
        count += 1
        if min(ours, theirs) > 0:
            ratios.append(math.log(ours / theirs))
        assert ours <= 5 * theirs + 4 * floor, (where, name, ours, theirs)
        if ours > 2 * theirs + floor:
            beyond.append((where, name, ours, theirs))
    assert len(beyond) <= count * exceptions, (count, beyond)
    assert math.exp(sum(ratios) / len(ratios)) < 1.15  # the geometric mean


def check_over_draws(rows, floor):
    """Errors of a kernel at most twice those of plain PyTorch, in the geometric mean over draws.

    How few numbers round is chance: one draw of them meets a bound on one machine's BLAS and misses it on another's.

    Args:
        rows: (name of the result, error of the kernel, error of plain PyTorch), of every draw.
        floor: added to both errors: of one draw, at most twice plain PyTorch's error and this.
    """
    ratios = {}
    for name, kernel, plain in rows:
        ratios.setdefault(name, []).append(math.log((kernel + floor) / (plain + floor)))
    assert ratios
    for name, logs in ratios.items():
        assert math.exp(sum(logs) / len(logs)) <= 2, (name, [round(math.exp(r), 2) for r in logs])


MEASURE = """
import torch, perceiver_fast as pf
def resident(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field + ":")) / 1024
{prepare}
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
{run}
assert out.isfinite().all()
print(resident("VmHWM") - before, resident("VmHWM"))
"""


def megabytes(prepare: str, run: str) -> list[float]:
    """Memory that ``run``, which sets ``out``, adds after ``prepare``, and the peak of the new process both run in."""
    command = [sys.executable, "-c", MEASURE.format(prepare=prepare, run=run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(number) for number in done.stdout.split()]


class NoSync(TorchDispatchMode):
    """Refuses whatever makes the host wait for values on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero"), name
        return function(*args, **(kwargs or {}))
