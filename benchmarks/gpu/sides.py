"""The sides of a comparison: perceiver-fast, perceiver-pytorch in three forms, and the strongest dense attention known.

    fast             perceiver-fast, whichever way and backend it takes
    fast-graph       a whole model's inference as one CUDA graph (pf.graph)
    fast-compile     torch.compile of the whole model
    eager            perceiver-pytorch as it is
    sdpa             the same through torch's scaled_dot_product_attention
    compile          torch.compile of sdpa
    flash-attn       the flash-attn package on built tokens
    flash-perceiver  the attention module of flash-perceiver on built and normalised tokens (its own blocks do not normalise)
    smart            keys and values written from the axis tables by this package, then scaled_dot_product_attention
    smart-compile    the same written by one compiled function, head dimensions padded to a multiple of 8
    smart-cudnn      the same, attention by cuDNN

The smart sides use this package's identity: users of perceiver-pytorch do not have them. They are the baseline that a
kernel for grid attention has to beat.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import perceiver_fast as pf
from benchmarks.gpu.problem import Problem
from benchmarks.sides import OURS, Peer, Side, compiled, parameters
from perceiver_fast.insight.peer import peer_model

FLASH_HEAD_DIM = 256  # the largest that flash-attn takes
PYTORCH = ("perceiver_pytorch",)


def _side(problem: Problem, model: nn.Module, tokens: Callable[[Tensor], object]) -> Side:
    """A whole ``model``, or its first cross-attention on the ``tokens`` of an image."""
    if problem.case.level == "model":
        return Side(model, parameters=parameters(model))
    layer = model.layers[0].cross_attn
    return Side(lambda x, image: layer(x, context=tokens(image)), parameters=parameters(layer))


def _ours(problem: Problem) -> Side:
    return _side(problem, problem.model, problem.model.describe)


def _ours_graphed(problem: Problem) -> Side:
    model, recorded = problem.model, []

    def apply(image: Tensor) -> Tensor:
        if not recorded:  # in the autocast of the first call, which is that of all
            recorded.append(pf.graph(model, image, copy=False))
        return recorded[0](image)

    return Side(apply, parameters=parameters(model))


def _theirs(problem: Problem, sdpa: bool = False) -> Side:
    with torch.device(problem.device):
        model = peer_model(problem.geometry, problem.model.state_dict())
    if sdpa:
        from benchmarks.suite.models import with_sdpa  # needs perceiver-pytorch

        model = with_sdpa(model)
    return _side(problem, model, problem.build_tokens)


def _dense(problem: Problem, keys_values: Callable[[Tensor], Tensor], attend: Callable[..., Tensor]) -> Side:
    """Our layer's weights around ``attend(q, k, v)``, all ``[B, rows, d]``: the geometries have one head."""
    layer, fn = problem.layer, problem.layer.fn

    def apply(x: Tensor, image: Tensor) -> Tensor:
        k, v = keys_values(image).chunk(2, dim=-1)
        return fn.to_out(attend(fn.to_q(layer.norm(x)), k, v))

    return Side(apply, parameters=parameters(layer))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> Tensor:
    width = q.shape[-1]
    q = F.pad(q, (0, k.shape[-1] - width)) if k.shape[-1] > width else q
    with nullcontext() if backend is None else sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*(t.unsqueeze(1) for t in (q, k, v)), scale=width**-0.5)
    return out.squeeze(1)[..., :width]


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(t.unsqueeze(2) for t in (q, k, v))).squeeze(2)


def _flash_perceiver(problem: Problem) -> Side:
    from flash_perceiver.perceiver import PatchedMHA

    geometry, layer = problem.geometry, problem.layer
    attention = PatchedMHA(
        geometry.model["latent_dim"], kv_dim=geometry.token_channels, num_heads=1, head_dim=geometry.dim_head,
        cross_attn=True, qkv_proj_bias=False, use_flash_attn=True,
    ).to(problem.device)  # fmt: skip
    names = {"Wq": "fn.to_q", "Wkv": "fn.to_kv", "out_proj": "fn.to_out"}
    own = {f"{names[owner]}.{kind}": p for n, p in attention.named_parameters() for owner, kind in [n.rsplit(".", 1)]}
    theirs = parameters(layer)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(theirs[name])

    def apply(x: Tensor, image: Tensor) -> Tensor:
        return attention(layer.norm(x), x_kv=layer.norm_context(problem.build_tokens(image)))

    return Side(apply, parameters=theirs | own)


def _needs(*what: str) -> Callable[[Problem], list[str]]:
    """The reasons of a peer that runs only where all of ``what`` is so."""

    def reasons(problem: Problem) -> list[str]:
        case, head = problem.case, problem.geometry.dim_head
        facts = {
            "flash": (head <= FLASH_HEAD_DIM, f"it takes head dimensions to {FLASH_HEAD_DIM}, not {head}"),
            "cuda": (problem.device.type == "cuda", "it runs on CUDA tensors"),
            "half": (case.dtype == "bf16", "it takes bf16 and fp16, not fp32"),
            "inference": (not case.step, "it records inference"),
            "model": (case.level == "model", "it is of whole models"),
        }
        return [why for fits, why in map(facts.get, what) if not fits]

    return reasons


def _of_ops(build: Callable[[Problem], Side], **options: object) -> Peer:
    """A peer that is one cross-attention, no model."""
    return Peer(build, fits=lambda case: case.level == "op", **options)


CUDNN = partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION)
FLASH = _needs("flash", "cuda", "half")
PEERS = {
    OURS: Peer(_ours),
    "fast-graph": Peer(_ours_graphed, _needs("cuda", "inference", "model")),
    "fast-compile": compiled(_ours, reasons=_needs("model")),
    "eager": Peer(_theirs, packages=PYTORCH),
    "sdpa": Peer(lambda p: _theirs(p, sdpa=True), packages=PYTORCH),
    "compile": compiled(lambda p: _theirs(p, sdpa=True), reasons=_needs(), packages=PYTORCH),
    "flash-attn": _of_ops(lambda p: _dense(p, p.project_tokens, _flash), reasons=FLASH, packages=("flash_attn",)),
    "flash-perceiver": _of_ops(_flash_perceiver, reasons=FLASH, packages=("flash_perceiver",)),
    "smart": _of_ops(lambda p: _dense(p, p.project_tables, _sdpa)),
    "smart-compile": _of_ops(lambda p: _dense(p, p.write_keys_values, _sdpa), compiled=True),
    "smart-cudnn": _of_ops(
        lambda p: _dense(p, p.write_keys_values, CUDNN), reasons=_needs("cuda", "half"), compiled=True
    ),
}


def least_bytes(problem: Problem, name: str) -> int:
    """Memory that side ``name`` cannot do without: what it must hold at one time. Real needs are larger."""
    geometry, case = problem.geometry, problem.case
    tokens, size = case.batch * geometry.tokens, 2 if case.dtype == "bf16" else 4
    if name.startswith(OURS):
        return 0
    keys_values = tokens * 2 * geometry.dim_head * size
    if name.startswith("smart"):
        return keys_values
    built = 2 * tokens * geometry.token_channels * 4  # and normalised; autocast does both in float32
    logits = 2 * tokens * geometry.queries * size if name == "eager" else 0  # and their softmax
    layers = geometry.model["depth"] if case.step else 1  # the backward needs those of every layer
    return built + layers * (keys_values + logits)


def reasons(problem: Problem, name: str, compile_mode: str, memory: int | None) -> dict[str, str]:
    """Why side ``name`` is not measured: the ``outcome`` and its ``reason``; empty where it is.

    Args:
        compile_mode: "all", "headline" or "none": where compiled peers are measured.
        memory: of the device, in bytes, or None where it does not count.
    """
    peer, case, needed = PEERS[name], problem.case, least_bytes(problem, name)
    headline, outcome, why = compile_mode == "headline", "not run", None
    if absent := peer.absent():
        outcome, why = "absent", absent[0]
    elif peer.compiled and (compile_mode == "none" or (headline and not case.headline)):
        why = f"--compile {compile_mode} leaves it out here"
    elif name in ("compile", "fast-compile") and headline and case.batch != 8:
        why = "--compile headline has it at batch 8 alone"
    elif cannot := peer.reasons(problem):
        why = cannot[0]
    elif memory is not None and needed > memory:
        outcome, why = "out of memory", f"needs at least {needed / 2**30:.0f} GiB of {memory / 2**30:.0f}"
    return {"outcome": outcome, "reason": why} if why else {}
