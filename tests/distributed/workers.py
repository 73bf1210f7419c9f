"""What the processes of a distributed test run: functions of a rank, which return what the test compares."""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import torch
import torch.distributed as dist
from cases import Case, cuts, make_case
from small import image_model, images, thirds
from torch import Tensor, nn
from wrong_calls import one_sided as one_sided
from wrong_calls import refusals as refusals

import perceiver_fast as pf


def gradients(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"input {i}": t.grad for i, t in enumerate(inputs) if t.grad is not None}


def run_one(
    case: Case, model: nn.Module, start: int, stop: int, seed: int, drops: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a call, and gradients of a loss."""
    for t in case.inputs:
        t.grad = None
    torch.manual_seed(drops)
    out = case.call(model, start, stop)
    if case.own_output:
        weight = torch.randn(
            out.shape[0], case.rows, *out.shape[2:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        weight = weight[:, start:stop]
    else:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (out * weight.to(out)).sum().backward()
    return out.detach(), {name: grad.clone() for name, grad in gradients(model, case.inputs).items()}


def difference(a: Tensor, b: Tensor, scale: float | None = None) -> float:
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    most = max(float(b.abs().max()), 1e-3) if scale is None else scale
    found = float((a - b).abs().max()) / most
    return found if found == found else float("inf")


def compare(
    rank: int, ranks: int, first: int, count: int, kind: str | None = None, single: bool = False
) -> list[tuple[str, float, str]]:
    """The largest relative difference of outputs and gradients from one process', of some cases."""
    found = []
    for seed in range(first, first + count):
        case = make_case(seed, kind, torch.float32 if single else torch.float64)
        whole = run_one(case, case.model, 0, case.rows, seed, drops=seed)
        model = copy.deepcopy(case.model)
        for p in model.parameters():
            p.grad = None
        pf.distributed.shard(model, shard_queries=case.shard_queries)
        start, stop = cuts(case, ranks, random.Random(seed))[rank]
        out, grads = run_one(case, model, start, stop, seed, drops=seed if rank == 0 else 999 + rank)
        expected = whole[0][:, start:stop] if case.own_output else whole[0]
        worst = [(difference(out, expected), "output")]
        missing = set(grads) ^ set(whole[1])
        if start == stop:  # the gradient of no tokens may be None
            missing = {name for name in missing if not name.startswith("input")}
        if missing:
            worst.append((float("inf"), f"gradients of {missing}"))
        for name in set(grads) & set(whole[1]):
            own = grads[name]
            other = whole[1][name]
            if name.startswith("input"):
                own, other = own[:, start:stop], other[:, start:stop]
            worst.append((difference(own, other), name))
        most = max(worst)
        found.append((case.name, most[0], most[1]))
    return found


def train(rank: int, ranks: int, how: str, steps: int = 20) -> list[tuple[str, float, str]]:
    """Twenty steps of a data x tokens mesh, against one process on the whole batch; how: ddp, fully_shard or compile."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tokens"))
    alone = image_model(depth=1 if how == "compile" else 2)
    model: nn.Module = copy.deepcopy(alone)
    pf.distributed.shard(model, mesh["tokens"])
    if how == "ddp":
        trained: nn.Module = nn.parallel.DistributedDataParallel(model, process_group=mesh["data"].get_group())
    elif how == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        for block in model.layers:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh["data"])
        trained = fully_shard(model, mesh=mesh["data"])
    else:
        trained = torch.compile(model, backend="aot_eager")
    rule = dict(lr=0.05, momentum=0.9)
    mine, theirs = torch.optim.SGD(trained.parameters(), **rule), torch.optim.SGD(alone.parameters(), **rule)
    data, token = mesh["data"].get_local_rank(), mesh["tokens"].get_local_rank()
    found = []
    for step in range(steps):
        batch = images(step, 4)
        target = torch.randn(4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        own = slice(2 * data, 2 * data + 2) if how != "compile" else slice(0, 4)
        part = batch[own, thirds(batch.shape[1], token, ranks // 2)]
        loss = (trained(part) - target[own]).square().mean()
        mine.zero_grad()
        loss.backward()
        mine.step()
        theirs.zero_grad()
        (alone(batch) - target).square().mean().backward()
        theirs.step()
    for (name, p), q in zip(model.named_parameters(), alone.parameters()):
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        found.append((name, difference(whole.detach(), q.detach()), how))
    return found


def accumulate(rank: int, ranks: int) -> list[tuple[str, float, str]]:
    """Two backwards, of which gradients add up, under autocast and without: as one process' do."""
    found = []
    for half in (False, True):
        alone = image_model().float()
        model = pf.distributed.shard(copy.deepcopy(alone))
        for each, part in ((alone, slice(0, 10)), (model, thirds(10, rank, ranks))):
            for seed in (1, 2):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    out = each(images(seed, 2).float()[:, part])
                out.float().square().mean().backward()
        for (name, p), q in zip(model.named_parameters(), alone.parameters()):
            tolerance = 2e-2 if half else 1e-5  # of the whole gradient, in half precision and in float32
            found.append(
                (name, difference(p.grad, q.grad, float(q.grad.norm()) + 1e-9) / tolerance, f"autocast {half}")
            )
    return found


class Added(nn.Module):
    """A linear layer with an adapter of low rank beside it, as peft has it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False).to(linear.weight)
        self.up = nn.Linear(2, linear.out_features, bias=False).to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def adapted(rank: int, ranks: int, hooked: bool = False) -> list[tuple[str, float, str]]:
    """Adapters (or hooks) on the layers of a cross-attention, which then are called on the own tokens."""
    alone = image_model(cross_heads=2)
    for block in alone.layers:
        fn = block.cross_attn.fn
        if hooked:
            fn.to_kv.register_forward_hook(lambda module, inputs, output: output * 1.5)
            block.cross_attn.norm_context.register_forward_pre_hook(lambda module, inputs: None)
        else:
            fn.to_kv, fn.to_q = Added(fn.to_kv), Added(fn.to_q)
    model = pf.distributed.shard(copy.deepcopy(alone))
    mask = torch.rand(2, 10, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[0] = False
    found = []
    cut = slice(0, 0) if rank == 0 else thirds(10, rank - 1, ranks - 1)
    for inverted in (False, True):
        for each in (alone, model):
            each.inverted_cross_attn = (inverted,) * 2
            each.zero_grad()
        whole = alone(images(1, 2), mask=mask)
        part = model(images(1, 2)[:, cut], mask=mask[:, cut])
        found.append(("output", difference(part.detach(), whole.detach()), f"inverted {inverted}"))
        for each in (whole, part):
            each.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), alone.parameters()):
            found.append((name, difference(p.grad, q.grad), f"inverted {inverted}"))
    return found


def streamed(rank: int, ranks: int) -> list[tuple[str, float, str]]:
    """Every process streams its own rows."""
    alone = image_model()
    model = pf.distributed.shard(copy.deepcopy(alone))
    own = images(1, 2)[:, thirds(10, rank, ranks)]
    whole, part = alone(images(1, 2)), model(pf.stream(own.numpy(), rows=2))
    for each in (whole, part):
        each.square().sum().backward()
    found = [("output", difference(part.detach(), whole.detach()), "")]
    return found + [
        (name, difference(p.grad, q.grad), "") for (name, p), q in zip(model.named_parameters(), alone.parameters())
    ]


def dtensors(rank: int, ranks: int) -> list[tuple[str, float, str]]:
    """A DTensor along the tokens is taken, its gradient is one too; others are refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    alone = image_model()
    model = pf.distributed.shard(copy.deepcopy(alone), mesh)
    data = images(1, 2).requires_grad_()
    shared = distribute_tensor(images(1, 2), mesh, [Shard(1)]).requires_grad_()
    whole, part = alone(data), model(shared)
    whole.square().sum().backward()
    part.square().sum().backward()
    found = [("output", difference(part.detach(), whole.detach()), "")]
    found.append(("input", difference(shared.grad.full_tensor(), data.grad), ""))
    for placement in (Replicate(), Shard(0)):
        try:
            model(distribute_tensor(images(1, 4), mesh, [placement]))
            found.append((str(placement), 1.0, "taken"))
        except ValueError as error:
            found.append((str(placement), 0.0 if "Shard(1)" in str(error) else 1.0, str(error)))
    return found


def kept(rank: int, ranks: int) -> list[tuple[str, float, str]]:
    """Copies are sharded, pickles are not, unshard undoes, and a model without tokens is refused on all."""
    import pickle

    alone = image_model()
    model = pf.distributed.shard(copy.deepcopy(alone))
    data, cut = images(1, 2), thirds(10, rank, ranks)
    whole = alone(data)
    found = [("copy", difference(copy.deepcopy(model)(data[:, cut]), whole), "")]
    found.append(("pickle", difference(pickle.loads(pickle.dumps(model))(data), whole), ""))
    found.append(("state", float(model.state_dict().keys() != alone.state_dict().keys()), ""))
    found.append(("unshard", difference(pf.distributed.unshard(model)(data), whole), ""))
    return found


def reviewed(rank: int, ranks: int) -> list[tuple[str, float, str]]:
    """Dropout that is on in a model in evaluation; adapters in half precision on no tokens; grids described by parts."""
    found = []
    alone = image_model(ff_dropout=0.3).eval()
    for module in alone.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    model = pf.distributed.shard(copy.deepcopy(alone))
    torch.manual_seed(5)
    whole = alone(images(1, 2))
    torch.manual_seed(5 + rank)
    found.append(
        (
            "dropout in evaluation",
            difference(model(images(1, 2)[:, thirds(10, rank, ranks)]).detach(), whole.detach()),
            "",
        )
    )
    alone = image_model()
    for block in alone.layers:
        block.cross_attn.fn.to_kv = Added(block.cross_attn.fn.to_kv)
    alone = alone.bfloat16()
    model = pf.distributed.shard(copy.deepcopy(alone))
    cut = slice(0, 0) if rank == 0 else thirds(10, rank - 1, ranks - 1)
    whole, part = alone(images(1, 2).bfloat16()), model(images(1, 2).bfloat16()[:, cut])
    part.sum().backward()
    found.append(("half precision", difference(part.detach(), whole.detach()) * 1e-11, ""))  # within 10 %
    torch.manual_seed(0)
    alone = pf.PerceiverIO(
        depth=1, dim=3 + 6, queries_dim=7, num_latents=4, latent_dim=8, seq_dropout_prob=0.4
    ).double()
    model = pf.distributed.shard(copy.deepcopy(alone))
    feat, start, stop = images(2, 2), 10 * rank // ranks, 10 * (rank + 1) // ranks
    codes: dict[str, Any] = dict(num_freq_bands=1, max_freq=4.0)
    description = pf.grid_tokens((10, 7), feat=feat, **codes)
    for training in (True, False):
        torch.manual_seed(3)
        whole = alone.train(training)(description)
        for name, own in (
            ("own rows", pf.grid_tokens((stop - start, 7), feat=feat[:, start:stop], **codes)),
            ("a part", description.part(start, stop)),
        ):
            torch.manual_seed(3 + rank)
            found.append(
                (f"{name}, training {training}", difference(model.train(training)(own).detach(), whole.detach()), "")
            )
    return found


def bytes_sent(rank: int, ranks: int) -> list[tuple[int, int, int]]:
    """Of a forward and a backward, for inputs of several sizes: tokens, messages, and bytes of them on this rank."""
    model, found = pf.distributed.shard(image_model()).float(), []
    sent: list[int] = []
    whole = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast")}

    def counted(name: str) -> Any:
        def call(first: Any, *others: Any, **keywords: Any) -> Any:
            tensor = others[0] if name == "all_gather" else first
            sent.append(tensor.numel() * tensor.element_size())
            return whole[name](first, *others, **keywords)

        return call

    for name in whole:
        setattr(dist, name, counted(name))
    try:
        for rows in (4, 40, 400):
            sent.clear()
            model(images(1, 1, rows).float()[:, thirds(rows, rank, ranks)]).sum().backward()
            found.append((rows * 7, len(sent), sum(sent)))
    finally:
        for name, call in whole.items():
            setattr(dist, name, call)
    return found


def lost(rank: int, ranks: int) -> str:
    """One rank dies; what the others are told."""
    model = pf.distributed.shard(image_model())
    model(images(1, 1)[:, thirds(10, rank, ranks)])
    if rank == 1:
        os._exit(3)
    try:
        model(images(1, 1)[:, thirds(10, rank, ranks)])
    except RuntimeError as error:
        return str(error)
    return "no error"


def several(rank: int, ranks: int, calls: list[tuple[str, dict]]) -> list[Any]:
    """The results of several functions, one after the other: processes take seconds to start."""
    return [globals()[name](rank, ranks, **arguments) for name, arguments in calls]


def main(rank: int, ranks: int, store: str, results: Any, function: str, arguments: dict) -> None:
    torch.set_num_threads(1)
    import datetime

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60)
    )
    try:
        results.put((rank, None, globals()[function](rank, ranks, **arguments)))
    except BaseException as error:  # the test says which
        import traceback

        results.put((rank, f"{error}\n{traceback.format_exc()}", None))
    finally:
        dist.destroy_process_group()
