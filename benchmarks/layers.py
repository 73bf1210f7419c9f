"""The implementations of one cross-attention layer: latents ``[B, N, D]`` and raw input to the layer's output.

Each library builds the tokens its own way, which counts: perceiver-pytorch and transformers compute position codes in every
call, perceiver-io keeps them, perceiver-fast builds none. All share one set of weights, by perceiver-pytorch's names, and
have what it has not (biases of queries, keys and values) at zero.

    eager, sdpa    perceiver-pytorch's PreNorm(Attention) as it is, and through scaled_dot_product_attention
    compile        torch.compile of sdpa
    transformers   PerceiverAttention after PerceiverFourierPositionEncoding
    perceiver-io   CrossAttention after FourierPositionEncoding
    smart-dense    this package's keys and values, written from tables of the axes, then scaled_dot_product_attention
    fast           perceiver-fast
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from perceiver_pytorch.perceiver_pytorch import Attention, PreNorm, fourier_encode
from torch import Tensor, nn

from benchmarks.geometries import token_channels
from benchmarks.peers import OURS, compile_reasons, compiled, fast_reasons, with_sdpa
from perceiver_fast.insight.geometries import Geometry

SHARPENING = 6.0  # of the queries: attention that is nearly uniform would hide a wrong key
PERTURBATION = 0.1  # of LayerNorms' weights and biases, whose initial ones and zeros would hide a missing term
IO_VERSION = "0.11.0"
NOT_A_PEER = "smart-dense"  # its keys and values come from this package: shown, and left out of "best"

Names = dict[str, tuple[str, ...]]  # a parameter of perceiver-pytorch's: the peer's, one after the other


def encoded(geometry: Geometry) -> bool:
    """Whether tokens have Fourier codes of positions."""
    return geometry.family != "io" and geometry.model.get("fourier_encode_data", True)


def latents(geometry: Geometry, batch: int) -> Tensor:
    """Random latents ``[batch, N, D]``, the same at every call."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, geometry.queries, geometry.model["latent_dim"], generator=generator)


class Original(nn.Module):
    """perceiver-pytorch's layer."""

    def __init__(self, geometry: Geometry):
        super().__init__()
        self.geometry, width, channels = geometry, geometry.model["latent_dim"], token_channels(geometry)
        head = geometry.model.get("cross_dim_head", 64)
        self.layer = PreNorm(
            width, Attention(width, channels, heads=geometry.heads, dim_head=head), context_dim=channels
        )

    def encode(self, data: Tensor) -> Tensor:
        """Tokens ``[B, M, C]``, as perceiver-pytorch's models build them."""
        if not encoded(self.geometry):
            return data.flatten(1, -2)
        code = partial(
            fourier_encode, max_freq=self.geometry.model["max_freq"], num_bands=self.geometry.model["num_freq_bands"]
        )
        if self.geometry.family == "points":
            return code(data).flatten(-2)
        axes = [torch.linspace(-1.0, 1.0, size, dtype=data.dtype) for size in data.shape[1:-1]]
        codes = code(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)).flatten(-2)
        return torch.cat([data, codes.expand(data.shape[0], *codes.shape)], -1).flatten(1, -2)

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        return self.layer(x, context=self.encode(data))


class SmartDense(Original):
    """Keys and values from this package's description of the tokens, then torch's attention."""

    def __init__(self, geometry: Geometry):
        super().__init__(geometry)
        self.describe = one_layer(geometry)[1]

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        attention, norm_context = self.layer.fn, self.layer.norm_context
        q = attention.to_q(self.layer.norm(x))
        kv = self.describe(data).keys_values(attention.to_kv, norm_context)
        q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, dim=-1)))
        return attention.to_out(F.scaled_dot_product_attention(q.to(k.dtype), k, v).transpose(1, 2).flatten(2))


def one_layer(geometry: Geometry) -> tuple[nn.Module, Callable]:
    """perceiver-fast's layer of a geometry, and what describes data to it."""
    from perceiver_fast.tokens import DenseTokens

    arguments = geometry.arguments | {"depth": 0 if geometry.family == "io" else 1}
    for key, few in {"self_per_cross_attn": 0, "num_classes": 1}.items():
        if key in arguments:
            arguments[key] = few
    model = Geometry(geometry.name, geometry.sizes, arguments, geometry.channels, geometry.family).build()
    if geometry.family == "io":
        return model.cross_attend_block.cross_attn, DenseTokens
    if geometry.family == "points":
        model = model.model
        return model.layers[0].cross_attn, lambda coords: model.describe(coords[..., :0], coords)
    return model.layers[0].cross_attn, model.describe


class Fast(nn.Module):
    """perceiver-fast's layer."""

    def __init__(self, geometry: Geometry):
        super().__init__()
        self.layer, self.describe = one_layer(geometry)

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        return self.layer(x, context=self.describe(data))


class Transformers(nn.Module):
    """The layer of transformers' Perceiver models."""

    names: Names = {
        "norm": ("layer.self.layernorm1",),
        "norm_context": ("layer.self.layernorm2",),
        "fn.to_q": ("layer.self.query",),
        "fn.to_kv": ("layer.self.key", "layer.self.value"),
        "fn.to_out": ("layer.output.dense",),
    }

    def __init__(self, geometry: Geometry):
        super().__init__()
        from transformers import PerceiverConfig
        from transformers.models.perceiver import modeling_perceiver as theirs

        width, inner = geometry.model["latent_dim"], geometry.heads * geometry.model.get("cross_dim_head", 64)
        self.layer = theirs.PerceiverAttention(
            PerceiverConfig(attention_probs_dropout_prob=0.0), is_cross_attention=True, qk_channels=inner,
            v_channels=inner, num_heads=geometry.heads, q_dim=width, kv_dim=token_channels(geometry),
            use_query_residual=False,
        )  # fmt: skip
        self.encode = lambda data: data.flatten(1, -2)
        if geometry.family == "points":  # its encoding module takes grids alone
            resolution = (geometry.model["max_freq"],) * geometry.channels
            bands = geometry.model["num_freq_bands"]
            one = partial(theirs.generate_fourier_features, num_bands=bands, max_resolution=resolution)
            self.encode = lambda coords: torch.cat(
                [one(c) for c in coords.split(1)]
            )  # it looks at the first of a batch
        elif encoded(geometry):
            resolution = (geometry.model["max_freq"],) * len(geometry.sizes)
            codes = theirs.PerceiverFourierPositionEncoding(geometry.model["num_freq_bands"], resolution)
            self.encode = lambda data: torch.cat(
                [data.flatten(1, -2), codes(data.shape[1:-1], data.shape[0], data.device, data.dtype)], -1
            )

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        return self.layer(x, inputs=self.encode(data))[0]


class PerceiverIO(nn.Module):
    """The layer of the package perceiver-io."""

    names: Names = {
        "norm": ("layer.q_norm",),
        "norm_context": ("layer.kv_norm",),
        "fn.to_q": ("layer.attention.q_proj",),
        "fn.to_kv": ("layer.attention.k_proj", "layer.attention.v_proj"),
        "fn.to_out": ("layer.attention.o_proj",),
    }

    def __init__(self, geometry: Geometry):
        super().__init__()
        from perceiver.model.core.modules import CrossAttention
        from perceiver.model.core.position import FourierPositionEncoding

        width, inner = geometry.model["latent_dim"], geometry.heads * geometry.model.get("cross_dim_head", 64)
        self.layer = CrossAttention(
            geometry.heads, width, token_channels(geometry), num_qk_channels=inner, num_v_channels=inner, qkv_bias=False
        )
        self.encode = lambda data: data.flatten(1, -2)
        if encoded(geometry):
            points = geometry.family == "points"
            axes = geometry.channels if points else len(geometry.sizes)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch.meshgrid, that its indexing will have to be given
                codes = FourierPositionEncoding(
                    (2,) * axes if points else geometry.sizes, geometry.model["num_freq_bands"]
                )
                # Its own highest frequency is the size of an axis.
                encode = partial(codes._position_encodings, max_frequencies=(geometry.model["max_freq"],) * axes)
                codes.position_encoding = encode(codes._positions()).flatten(0, -2)
            self.encode = encode if points else lambda data: torch.cat([data.flatten(1, -2), codes(data.shape[0])], -1)

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        return self.layer(x, self.encode(data)).last_hidden_state


def foreign_channels(geometry: Geometry) -> Tensor:
    """Where transformers and perceiver-io have each of perceiver-pytorch's channels ``[C]``.

    They order codes by positions, sines and cosines, then by axes; perceiver-pytorch by axes, then sines, cosines, position.
    """
    if not encoded(geometry):
        return torch.arange(token_channels(geometry))
    axes = geometry.channels if geometry.family == "points" else len(geometry.sizes)
    raw = 0 if geometry.family == "points" else geometry.channels
    bands = geometry.model["num_freq_bands"]
    order = list(range(raw))
    for axis in range(axes):
        sines = raw + axes + axis * bands
        order += [*range(sines, sines + bands), *range(sines + axes * bands, sines + (axes + 1) * bands), raw + axis]
    return torch.tensor(order)


def named(module: nn.Module, geometry: Geometry) -> dict[str, Callable[[Callable[[str], Tensor]], Tensor]]:
    """For every parameter of perceiver-pytorch's layer, how it is put together from the peer's by their names."""
    module = getattr(module, "_orig_mod", module)
    foreign = getattr(module, "names", None)
    channels = foreign_channels(geometry) if foreign else None
    found = {}
    for name, _ in sorted(Original(geometry).layer.named_parameters()):
        if foreign is None:
            found[name] = lambda get, name=name: get(f"layer.{name}")
            continue
        owner, kind = name.rsplit(".", 1)
        parts = [f"{part}.{kind}" for part in foreign[owner]]
        permute = owner in ("norm_context", "fn.to_kv")
        found[name] = lambda get, parts=parts, permute=permute: (
            torch.cat([get(part) for part in parts])[..., channels] if permute else torch.cat([get(p) for p in parts])
        )
    return found


@torch.no_grad()
def load(module: nn.Module, geometry: Geometry) -> nn.Module:
    """``module`` with the weights that all peers share."""
    torch.manual_seed(0)
    original = Original(geometry)
    original.layer.fn.to_q.weight *= SHARPENING
    for norm in (original.layer.norm, original.layer.norm_context):
        for parameter in norm.parameters():
            parameter += PERTURBATION * torch.randn_like(parameter)
    weights = dict(original.layer.named_parameters())
    foreign, own = getattr(module, "names", None), dict(module.named_parameters())
    if foreign is None:
        module.layer.load_state_dict(original.layer.state_dict())
        return module
    for parameter in own.values():
        parameter.zero_()  # biases that perceiver-pytorch has not
    back = foreign_channels(geometry).argsort()
    for name, weight in weights.items():
        owner, kind = name.rsplit(".", 1)
        weight = weight[..., back] if owner in ("norm_context", "fn.to_kv") else weight
        for part, chunk in zip(foreign[owner], weight.chunk(len(foreign[owner])), strict=True):
            own[f"{part}.{kind}"].copy_(chunk)
    return module


def absent(*modules: str, install: str) -> list[str]:
    """Why a library cannot be imported, and how to get it; empty where it can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken installation raises whatever it likes
            return [
                f"{module} cannot be imported ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}): {install}"
            ]
    return []


def flash_reasons() -> list[str]:
    """flash-perceiver is a package of CUDA kernels."""
    return ["flash-perceiver runs on CUDA tensors alone, through flash-attn; these benchmarks measure the CPU"]


@dataclass(frozen=True)
class LayerPeer:
    """How to build a layer, ``reasons()`` why it cannot run here, and ``fits(geometry)`` whether it is another one there."""

    build: Callable[[Geometry], nn.Module]
    reasons: Callable[[], list[str]] = list
    fits: Callable[[Geometry], bool] = lambda geometry: True


def _sdpa(geometry: Geometry) -> nn.Module:
    return with_sdpa(load(Original(geometry), geometry))


PEERS = {
    "eager": LayerPeer(lambda geometry: load(Original(geometry), geometry)),
    "sdpa": LayerPeer(_sdpa),
    OURS: LayerPeer(lambda geometry: load(Fast(geometry), geometry), fast_reasons),
    "compile": LayerPeer(lambda geometry: compiled(_sdpa(geometry)), compile_reasons),
    "transformers": LayerPeer(
        lambda geometry: load(Transformers(geometry), geometry),
        partial(absent, "transformers", install="pip install -e '.[bench]'"),
    ),
    "perceiver-io": LayerPeer(
        lambda geometry: load(PerceiverIO(geometry), geometry),
        partial(
            absent,
            "fairscale",
            "perceiver",
            install=f"make peers (pip cannot resolve perceiver-io {IO_VERSION}'s pins)",
        ),
    ),
    NOT_A_PEER: LayerPeer(
        lambda geometry: load(SmartDense(geometry), geometry),
        fits=lambda geometry: geometry.family == "perceiver" and encoded(geometry) and len(geometry.sizes) > 1,
    ),
    "flash-perceiver": LayerPeer(Original, flash_reasons),
}


def truth(geometry: Geometry) -> nn.Module:
    """perceiver-pytorch's layer in float64, its attention through torch's."""
    return _sdpa(geometry).double()
