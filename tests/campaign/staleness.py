"""Writes to parameters and buffers by every route, between inference calls: every output is that of a fresh copy.

A layer may keep what it computed from parameters. Whatever it keeps, an output has to be that of the parameters as they
are. A deep copy that is made after the write keeps nothing, so it says what is right.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .models import PLAIN as PLAIN_MODEL
from .models import build, draw_model
from .outcome import ERROR, STALE, Outcome

PLAIN = PLAIN_MODEL | {"mode": "no_grad"}
CLOSE = 1e-6  # of two ways to the same number: what is kept may have been rounded in another order


def places(p: Tensor, step: dict) -> tuple:
    """Where a step writes: everything, one element, a few, some rows, some columns, or one corner."""
    r, where = random.Random(step["at"]), step["where"]
    if where == "all" or p.numel() == 0:
        return (slice(None),)
    if where == "one":
        return tuple(r.randrange(n) for n in p.shape)
    if where == "few":
        count = r.choice([2, 3, 17])
        return tuple(torch.tensor([r.randrange(n) for _ in range(count)]) for n in p.shape)
    dim = {"rows": 0, "columns": p.dim() - 1, "corner": 0}[where]
    start = r.randrange(p.shape[dim])
    part = slice(start, r.choice([start, r.randrange(start, p.shape[dim]), p.shape[dim] - 1]) + 1)
    index = [slice(None)] * p.dim()
    index[dim] = part
    if where == "corner":
        index[-1] = slice(r.randrange(p.shape[-1]), None)
    return tuple(index)


def new_values(p: Tensor, at: tuple, step: dict) -> Tensor:
    """What is written there: numbers that differ from those that are there by a visible bit."""
    generator = torch.Generator().manual_seed(step["at"])
    return p.detach()[at] * 0.5 + torch.randn(p.detach()[at].shape, generator=generator).to(p.dtype)


def whole(p: Tensor, at: tuple, step: dict) -> Tensor:
    """A new tensor with new values in those places."""
    changed = p.detach().clone()
    changed[at] = new_values(p, at, step)
    return changed


def in_place(model: nn.Module, name: str, p: Tensor, at: tuple, step: dict) -> None:
    with torch.no_grad():
        p[at] = new_values(p, at, step)


def through_data(model: nn.Module, name: str, p: Tensor, at: tuple, step: dict) -> None:
    p.data[at] = new_values(p, at, step)


def data_set(model: nn.Module, name: str, p: Tensor, at: tuple, step: dict) -> None:
    p.data = whole(p, at, step)


def through_numpy(model: nn.Module, name: str, p: Tensor, at: tuple, step: dict) -> None:
    index = tuple(part.numpy() if torch.is_tensor(part) else part for part in at)
    p.detach().numpy()[index] = new_values(p, at, step).numpy()


def through_storage(model: nn.Module, name: str, p: Tensor, at: tuple, step: dict) -> None:
    alias = torch.empty(0, dtype=p.dtype).set_(p.untyped_storage(), p.storage_offset(), p.shape, p.stride())
    alias[at] = new_values(p, at, step)


def load_state_dict(model: nn.Module, name: str, p: Tensor, at: tuple, step: dict) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state[name] = whole(p, at, step)
    model.load_state_dict(state, assign=step["at"] % 2 == 0)


def optimizer_step(model: nn.Module, name: str, p: Tensor, at: tuple, step: dict) -> None:
    with torch.enable_grad():
        p.grad = torch.zeros_like(p)
        p.grad[at] = new_values(p, at, step)
        kind = torch.optim.SGD if step["at"] % 2 else torch.optim.Adam
        kind([p], lr=0.1).step()
        p.grad = None


def swapped(model: nn.Module, name: str, p: Tensor, at: tuple, step: dict) -> None:
    module, _, own = name.rpartition(".")
    setattr(model.get_submodule(module), own, nn.Parameter(whole(p, at, step)))


def storage_set(model: nn.Module, name: str, p: Tensor, at: tuple, step: dict) -> None:
    new = whole(p, at, step)
    with torch.no_grad():
        p.set_(new.untyped_storage(), 0, p.shape, new.stride())


def resizable(p: Tensor) -> torch.UntypedStorage:
    """The storage of a parameter, which gets one of its own where numpy has held on to the one it had."""
    if not p.untyped_storage().resizable():
        p.data = p.detach().clone()
    return p.untyped_storage()


def freed_and_back(model: nn.Module, name: str, p: Tensor, at: tuple, step: dict) -> None:
    new, storage = whole(p, at, step), resizable(p)
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    p.data.copy_(new)


def to_dtype_and_back(model: nn.Module, name: str, p: Tensor, at: tuple, step: dict) -> None:
    model.to(torch.float64)
    model.to(torch.float32)
    current = dict(model.named_parameters()) | dict(model.named_buffers())
    current[name].data[at] = new_values(current[name], at, step)


ROUTES: dict[str, Callable] = {
    route.__name__: route
    for route in (
        in_place, through_data, data_set, through_numpy, through_storage, load_state_dict, optimizer_step, swapped,
        storage_set, freed_and_back, to_dtype_and_back,
    )
}  # fmt: skip
SILENT = ("through_data", "through_numpy", "through_storage")  # torch counts no version for them
WHERE = ("all", "one", "few", "rows", "columns", "corner")


def draw(seed: int) -> dict:
    """A model, some of whose parameters are large, and steps: what is written, by which route, where."""
    r = random.Random(seed)
    case = dict(seed=seed, mode=r.choice(["no_grad", "inference_mode"])) | draw_model(r)
    case |= dict(values="normal", magnitude=1.0, sharp=1.0, sharp_self=1.0, mask="none", batch=1)
    own = case["latent_dim"]
    case["latents"], case["latent_dim"] = r.choice([1, 5, 8, 33]), r.choice([own, own, own, 64, 64, 64, 256, 512])
    case["cross_heads"], case["cross_dim_head"] = r.choice([1, 2, 4]), r.choice([8, 64])
    case["latent_heads"], case["latent_dim_head"] = r.choice([1, 2, 8]), r.choice([8, 64])
    routes = [*ROUTES] * 2 + [*SILENT] * 3 + ["hook"] * 2
    case["steps"] = [
        dict(
            route=r.choice(routes),
            parameter=r.random(),
            where=r.choice(WHERE),
            at=r.randrange(2**31),
            large=r.random() < 0.6,
        )
        for _ in range(r.choice([4, 8, 16]))
    ]
    if r.random() < 0.1:
        case["steps"].append(case["steps"].pop() | {"route": "freed"})
    return case


def chosen(model: nn.Module, step: dict) -> tuple[str, Tensor]:
    """The parameter or buffer that a step writes to; of the large ones if it says so."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    least = max(t.numel() for t in tensors.values()) // 8 if step["large"] else 0
    names = sorted(name for name, t in tensors.items() if t.numel() >= least)
    name = names[int(step["parameter"] * len(names))]
    return name, tensors[name]


def closely(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    return bool(torch.allclose(a, b, rtol=0, atol=CLOSE * b.abs().max().clamp_min(1e-30).item(), equal_nan=True))


def add_hook(model: nn.Module, step: dict) -> str:
    """Give one of the model's Linears a forward-pre-hook that writes to its input; returns its name."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    name, module = linears[int(step["parameter"] * len(linears))]

    def scaled(module, args):
        args[0].mul_(1.25)

    module.register_forward_pre_hook(scaled)
    return name


def matters(model: nn.Module, name: str, p: Tensor, infer: Callable) -> bool:
    """Whether the output hangs on a parameter: whether NaN in it shows."""
    probe = copy.deepcopy(model)
    (dict(probe.named_parameters()) | dict(probe.named_buffers()))[name].data.fill_(float("nan"))
    return bool(infer(probe).isnan().any())


def free(outcome: Outcome, model: nn.Module, name: str, p: Tensor, infer: Callable) -> None:
    """Free a parameter's storage, as sharding libraries do, and call: that is an error, not a number and no crash."""
    used, storage = matters(model, name, p, infer), resizable(p)
    content, size = p.detach().clone(), storage.nbytes()
    storage.resize_(0)
    try:
        infer(model)
        if used and size:
            outcome.find(ERROR, f"{name} has no storage, and the model answers")
    except (RuntimeError, TypeError, ValueError) as error:
        outcome.counts[f"raised {type(error).__name__}"] += 1
    storage.resize_(size)
    p.data.copy_(content)


def run(case: dict) -> Outcome:
    """Call, write, call again, and compare with a copy that is made then."""
    outcome = Outcome()
    built = build(case, case["seed"])
    model, mode = built.ours.eval(), getattr(torch, case["mode"])

    def infer(model: nn.Module) -> Tensor:
        with mode():  # with copies: a hook may write to what its layer was given, which may be an input
            return built.run(model, **copy.deepcopy(built.inputs)).clone()

    infer(model)
    for step in case["steps"]:
        name, p = chosen(model, step)
        route = step["route"]
        if route == "freed":
            free(outcome, model, name, p, infer)
        elif route == "hook":
            name = add_hook(model, step)
        else:
            ROUTES[route](model, name, p, places(p, step), step)
        first, again = infer(model), infer(model)
        fresh = infer(copy.deepcopy(model))
        outcome.counts[f"{route} writes"] += 1
        what = f"{route} to {step['where'] if route in ROUTES else 'all'} of {name} {list(p.shape)}"
        for call, out in (("first", first), ("second", again)):
            if not closely(out, fresh):
                error = (out - fresh).norm().item() / max(fresh.norm().item(), 1e-30)
                outcome.find(STALE, f"{what}: the {call} output after it is off by {error:.1e}")
    return outcome
