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

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import perceiver_fast as pf
from benchmarks.gpu.problem import Problem

OURS = "fast"
FLASH_HEAD_DIM = 256  # the largest that flash-attn takes


@dataclass(frozen=True)
class Side:
    """``apply(*inputs) -> output``, and the parameters by perceiver-pytorch's names."""

    apply: Callable[..., Tensor]
    parameters: dict[str, nn.Parameter]


@dataclass(frozen=True)
class Peer:
    """How to build a side, and ``reasons(problem) -> str``, why it cannot run ("" where it can).

    ``package`` is imported first: without it the side is absent. ``compiled`` sides take seconds to compile; ``op_only``
    ones are one cross-attention, no model.
    """

    build: Callable[[Problem], Side]
    reasons: Callable[[Problem], str] = lambda problem: ""
    package: str = ""
    compiled: bool = False
    op_only: bool = False


def absent(package: str) -> str:
    """Why ``package`` cannot be imported; "" where it can."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a broken installation raises whatever it likes
        return f"{package} is not there ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return ""


def _ours(problem: Problem) -> Side:
    model, layer = problem.model, problem.layer
    if problem.case.level == "model":
        return Side(model, dict(model.named_parameters()))
    return Side(lambda x, image: layer(x, context=model.describe(image)), dict(layer.named_parameters()))


def _ours_graphed(problem: Problem) -> Side:
    model, recorded = problem.model, []

    def apply(image: Tensor) -> Tensor:
        if not recorded:  # in the autocast of the first call, which is that of all
            recorded.append(pf.graph(model, image, copy=False))
        return recorded[0](image)

    return Side(apply, dict(model.named_parameters()))


def _ours_compiled(problem: Problem) -> Side:
    return Side(torch.compile(problem.model, dynamic=False), dict(problem.model.named_parameters()))


def _whole_models(problem: Problem) -> str:
    return "" if problem.case.level == "model" else "it is of whole models"


def _graph_reasons(problem: Problem) -> str:
    if problem.device.type != "cuda":
        return "it runs on CUDA tensors"
    if problem.case.pass_name != "forward":
        return "it records inference"
    return _whole_models(problem)


def _theirs(problem: Problem, sdpa: bool = False) -> Side:
    import perceiver_pytorch

    with torch.device(problem.device):
        model = perceiver_pytorch.Perceiver(**problem.arguments)
    model.load_state_dict(problem.model.state_dict())
    if sdpa:
        from benchmarks.peers import with_sdpa

        model = with_sdpa(model)
    if problem.case.level == "model":
        return Side(model, dict(model.named_parameters()))
    layer = model.layers[0].cross_attn
    return Side(lambda x, image: layer(x, context=problem.build_tokens(image)), dict(layer.named_parameters()))


def _compiled(problem: Problem) -> Side:
    side = _theirs(problem, sdpa=True)
    return Side(torch.compile(side.apply, dynamic=False), side.parameters)


def _dense(problem: Problem, keys_values: Callable[[Tensor], Tensor], attend: Callable[..., Tensor]) -> Side:
    """Our layer's weights around ``attend(q, k, v)``, all ``[B, rows, d]``: the geometries have one head."""
    layer, fn = problem.layer, problem.layer.fn

    def apply(x: Tensor, image: Tensor) -> Tensor:
        k, v = keys_values(image).chunk(2, dim=-1)
        return fn.to_out(attend(fn.to_q(layer.norm(x)), k, v))

    return Side(apply, dict(layer.named_parameters()))


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

    shape, layer = problem.shape, problem.layer
    attention = PatchedMHA(
        shape.latent_dim, kv_dim=shape.channels, num_heads=1, head_dim=shape.dim_head, cross_attn=True,
        qkv_proj_bias=False, use_flash_attn=True,
    ).to(problem.device)  # fmt: skip
    names = {"Wq": "fn.to_q", "Wkv": "fn.to_kv", "out_proj": "fn.to_out"}
    own = {f"{names[owner]}.{kind}": p for n, p in attention.named_parameters() for owner, kind in [n.rsplit(".", 1)]}
    theirs = dict(layer.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(theirs[name])

    def apply(x: Tensor, image: Tensor) -> Tensor:
        return attention(layer.norm(x), x_kv=layer.norm_context(problem.build_tokens(image)))

    return Side(apply, theirs | own)


def _tokens_projected(problem: Problem) -> Callable[[Tensor], Tensor]:
    layer = problem.layer
    return lambda image: layer.fn.to_kv(layer.norm_context(problem.build_tokens(image)))


def _tables_projected(problem: Problem) -> Callable[[Tensor], Tensor]:
    layer, model = problem.layer, problem.model
    return lambda image: model.describe(image).keys_values(layer.fn.to_kv, layer.norm_context)


def _needs_half(problem: Problem) -> str:
    if problem.device.type != "cuda":
        return "it runs on CUDA tensors"
    return "" if problem.case.dtype == "bf16" else "it takes bf16 and fp16, not fp32"


def _flash_reasons(problem: Problem) -> str:
    if problem.shape.dim_head > FLASH_HEAD_DIM:
        return f"it takes head dimensions to {FLASH_HEAD_DIM}, not {problem.shape.dim_head}"
    return _needs_half(problem)


PEERS = {
    OURS: Peer(_ours),
    "fast-graph": Peer(_ours_graphed, _graph_reasons),
    "fast-compile": Peer(_ours_compiled, _whole_models, compiled=True),
    "eager": Peer(_theirs, package="perceiver_pytorch"),
    "sdpa": Peer(lambda p: _theirs(p, sdpa=True), package="perceiver_pytorch"),
    "compile": Peer(_compiled, package="perceiver_pytorch", compiled=True),
    "flash-attn": Peer(lambda p: _dense(p, _tokens_projected(p), _flash), _flash_reasons, "flash_attn", op_only=True),
    "flash-perceiver": Peer(_flash_perceiver, _flash_reasons, "flash_perceiver", op_only=True),
    "smart": Peer(lambda p: _dense(p, _tables_projected(p), _sdpa), op_only=True),
    "smart-compile": Peer(lambda p: _dense(p, p.write_keys_values, _sdpa), compiled=True, op_only=True),
    "smart-cudnn": Peer(
        lambda p: _dense(p, p.write_keys_values, _cudnn), _needs_half, compiled=True, op_only=True
    ),
}  # fmt: skip


def least_bytes(problem: Problem, name: str) -> int:
    """Memory that side ``name`` cannot do without: what it must hold at one time. Real needs are larger."""
    shape, case = problem.shape, problem.case
    tokens, size = case.batch * shape.tokens, 2 if case.dtype == "bf16" else 4
    if name.startswith(OURS):
        return 0
    keys_values = tokens * 2 * shape.dim_head * size
    if name.startswith("smart"):
        return keys_values
    built = 2 * tokens * shape.channels * 4  # and normalised; autocast does both in float32
    logits = 2 * tokens * shape.latents * size if name == "eager" else 0  # and their softmax
    layers = problem.arguments["depth"] if case.pass_name == "step" else 1  # the backward needs those of every layer
    return built + layers * (keys_values + logits)


def reasons(problem: Problem, name: str, compile_mode: str, memory: int | None) -> tuple[str, str]:
    """Why side ``name`` is not measured, as an outcome and its reason; two empty strings where it is.

    Args:
        compile_mode: "all", "headline" or "none": where compiled peers are measured.
        memory: of the device, in bytes, or None where it does not count.
    """
    peer, case = PEERS[name], problem.case
    if why := peer.package and absent(peer.package):
        return "absent", why
    if peer.compiled and (compile_mode == "none" or (compile_mode == "headline" and not case.headline)):
        return "not run", f"--compile {compile_mode} leaves it out here"
    if name in ("compile", "fast-compile") and compile_mode == "headline" and case.batch != 8:
        return "not run", "--compile headline has it at batch 8 alone"
    if why := peer.reasons(problem):
        return "not run", why
    needed = least_bytes(problem, name)
    if memory is not None and needed > memory:
        return "out of memory", f"needs at least {needed / 2**30:.0f} GiB of {memory / 2**30:.0f}"
    return "", ""
