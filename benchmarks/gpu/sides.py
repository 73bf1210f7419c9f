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


def _whole_models(problem: Problem) -> list[str]:
    return [] if problem.case.level == "model" else ["it is of whole models"]


def _on_cuda(problem: Problem) -> list[str]:
    return [] if problem.device.type == "cuda" else ["it runs on CUDA tensors"]


def _graph_reasons(problem: Problem) -> list[str]:
    inference = [] if problem.case.pass_name == "forward" else ["it records inference"]
    return _on_cuda(problem) + inference + _whole_models(problem)


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


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION)


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


def _tokens_projected(problem: Problem) -> Callable[[Tensor], Tensor]:
    layer = problem.layer
    return lambda image: layer.fn.to_kv(layer.norm_context(problem.build_tokens(image)))


def _tables_projected(problem: Problem) -> Callable[[Tensor], Tensor]:
    layer, model = problem.layer, problem.model
    return lambda image: model.describe(image).keys_values(layer.fn.to_kv, layer.norm_context)


def _needs_half(problem: Problem) -> list[str]:
    half = [] if problem.case.dtype == "bf16" else ["it takes bf16 and fp16, not fp32"]
    return _on_cuda(problem) + half


def _flash_reasons(problem: Problem) -> list[str]:
    head = problem.geometry.dim_head
    wide = [] if head <= FLASH_HEAD_DIM else [f"it takes head dimensions to {FLASH_HEAD_DIM}, not {head}"]
    return wide + _needs_half(problem)


def _of_ops(build: Callable[[Problem], Side], **options: object) -> Peer:
    """A peer that is one cross-attention, no model."""
    return Peer(build, fits=lambda case: case.level == "op", **options)


PEERS = {
    OURS: Peer(_ours),
    "fast-graph": Peer(_ours_graphed, _graph_reasons),
    "fast-compile": compiled(_ours, reasons=_whole_models),
    "eager": Peer(_theirs, packages=PYTORCH),
    "sdpa": Peer(lambda p: _theirs(p, sdpa=True), packages=PYTORCH),
    "compile": compiled(lambda p: _theirs(p, sdpa=True), reasons=lambda p: [], packages=PYTORCH),
    "flash-attn": _of_ops(
        lambda p: _dense(p, _tokens_projected(p), _flash), reasons=_flash_reasons, packages=("flash_attn",)
    ),
    "flash-perceiver": _of_ops(_flash_perceiver, reasons=_flash_reasons, packages=("flash_perceiver",)),
    "smart": _of_ops(lambda p: _dense(p, _tables_projected(p), _sdpa)),
    "smart-compile": _of_ops(lambda p: _dense(p, p.write_keys_values, _sdpa), compiled=True),
    "smart-cudnn": _of_ops(lambda p: _dense(p, p.write_keys_values, _cudnn), reasons=_needs_half, compiled=True),
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
    layers = geometry.model["depth"] if case.pass_name == "step" else 1  # the backward needs those of every layer
    return built + layers * (keys_values + logits)


def reasons(problem: Problem, name: str, compile_mode: str, memory: int | None) -> tuple[str, str]:
    """Why side ``name`` is not measured, as an outcome and its reason; two empty strings where it is.

    Args:
        compile_mode: "all", "headline" or "none": where compiled peers are measured.
        memory: of the device, in bytes, or None where it does not count.
    """
    peer, case = PEERS[name], problem.case
    if why := peer.absent():
        return "absent", why[0]
    if peer.compiled and (compile_mode == "none" or (compile_mode == "headline" and not case.headline)):
        return "not run", f"--compile {compile_mode} leaves it out here"
    if name in ("compile", "fast-compile") and compile_mode == "headline" and case.batch != 8:
        return "not run", "--compile headline has it at batch 8 alone"
    if why := peer.reasons(problem):
        return "not run", why[0]
    needed = least_bytes(problem, name)
    if memory is not None and needed > memory:
        return "out of memory", f"needs at least {needed / 2**30:.0f} GiB of {memory / 2**30:.0f}"
    return "", ""
