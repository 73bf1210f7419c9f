"""One cross-attention layer: latents ``[B, N, D]`` and raw input to the layer's output, in every library that has one.

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

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from perceiver_pytorch.perceiver_pytorch import Attention, PreNorm, fourier_encode
from torch import Tensor, nn

from benchmarks.sides import DTYPES, OURS, SMART, Case, Level, Peer, Results, Side, compiled, ours, parameters, perturb
from benchmarks.suite.models import with_sdpa
from benchmarks.suite.plans import needs
from perceiver_fast.insight.geometries import Geometry
from perceiver_fast.tokens import DenseTokens

IO_VERSION = "0.11.0"
PERMUTED = ("norm_context", "fn.to_kv")  # whose last axis is the channels of tokens

Names = dict[str, tuple[str, ...]]  # a parameter of perceiver-pytorch's: the peer's, one after the other


class Original(nn.Module):
    """perceiver-pytorch's layer."""

    def __init__(self, geometry: Geometry):
        super().__init__()
        self.geometry, width, channels = geometry, geometry.model["latent_dim"], geometry.token_channels
        attention = Attention(width, channels, heads=geometry.heads, dim_head=geometry.dim_head)
        self.layer = PreNorm(width, attention, context_dim=channels)

    def encode(self, data: Tensor) -> Tensor:
        """Tokens ``[B, M, C]``, as perceiver-pytorch's models build them."""
        if not self.geometry.encoded:
            return data.flatten(1, -2)
        arguments = self.geometry.model
        code = partial(fourier_encode, max_freq=arguments["max_freq"], num_bands=arguments["num_freq_bands"])
        if self.geometry.family == "points":
            return code(data).flatten(-2)
        axes = [torch.linspace(-1.0, 1.0, size, dtype=data.dtype) for size in data.shape[1:-1]]
        codes = code(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)).flatten(-2)
        return torch.cat([data, codes.expand(data.shape[0], *codes.shape)], -1).flatten(1, -2)

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        return self.layer(x, context=self.encode(data))


def one_layer(geometry: Geometry) -> tuple[nn.Module, Callable]:
    """perceiver-fast's layer of a geometry, and what describes data to it."""
    model = geometry.one_layer().build()
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


class Foreign(nn.Module):
    """The layer of a library that has other names, and another order of the channels of tokens.

    A subclass makes ``layer``, and ``encode(data)`` which builds tokens, from the geometry's width, the channels of queries
    together, and the axes that codes are of.
    """

    names: Names

    def __init__(self, geometry: Geometry):
        super().__init__()
        self.geometry, self.axes = geometry, geometry.channels if geometry.family == "points" else len(geometry.sizes)
        self.encode = lambda data: data.flatten(1, -2)
        self.make(geometry, geometry.model["latent_dim"], geometry.heads * geometry.dim_head)

    def channels(self) -> Tensor:
        """Where the library has each of perceiver-pytorch's channels ``[C]``.

        It orders codes by positions, sines and cosines, then by axes; perceiver-pytorch by axes, then sines, cosines, position.
        """
        geometry, axes = self.geometry, self.axes
        channels = torch.arange(geometry.token_channels)
        if not geometry.encoded:
            return channels
        waves = 2 * axes * geometry.model["num_freq_bands"]
        raw, positions, waves = channels.split([len(channels) - axes - waves, axes, waves])
        sines, cosines = waves.view(2, axes, -1)
        return torch.cat([raw, torch.cat([sines, cosines, positions.unsqueeze(1)], 1).flatten()])

    def parts(self, name: str) -> tuple[list[str], bool]:
        """The parameters that make up perceiver-pytorch's ``name``, and whether their last axis is channels of tokens."""
        owner, kind = name.rsplit(".", 1)
        return [f"{part}.{kind}" for part in self.names[owner]], owner in PERMUTED

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take perceiver-pytorch's weights."""
        own, back = dict(self.named_parameters()), self.channels().argsort()
        for parameter in own.values():
            parameter.zero_()  # biases that perceiver-pytorch has not
        for name, weight in weights.items():
            parts, permuted = self.parts(name)
            for part, chunk in zip(parts, (weight[..., back] if permuted else weight).chunk(len(parts)), strict=True):
                own[part].copy_(chunk)

    def common(self, names: list[str], results: Results) -> Results:
        """The results with the gradients of perceiver-pytorch's parameters, in the order of ``names``."""
        if len(results) == 1:
            return results
        own, channels = dict(zip(parameters(self), results[2:], strict=True)), self.channels()
        found = ((torch.cat([own[part] for part in parts]), permuted) for parts, permuted in map(self.parts, names))
        return *results[:2], *(grad[..., channels] if permuted else grad for grad, permuted in found)


class Transformers(Foreign):
    """The layer of transformers' Perceiver models."""

    names = {
        "norm": ("layer.self.layernorm1",),
        "norm_context": ("layer.self.layernorm2",),
        "fn.to_q": ("layer.self.query",),
        "fn.to_kv": ("layer.self.key", "layer.self.value"),
        "fn.to_out": ("layer.output.dense",),
    }

    def make(self, geometry: Geometry, width: int, inner: int) -> None:
        from transformers import PerceiverConfig
        from transformers.models.perceiver import modeling_perceiver as theirs

        self.layer = theirs.PerceiverAttention(
            PerceiverConfig(attention_probs_dropout_prob=0.0), is_cross_attention=True, qk_channels=inner,
            v_channels=inner, num_heads=geometry.heads, q_dim=width, kv_dim=geometry.token_channels,
            use_query_residual=False,
        )  # fmt: skip
        if not geometry.encoded:
            return
        bands, resolution = geometry.model["num_freq_bands"], (geometry.model["max_freq"],) * self.axes
        if geometry.family == "points":  # its encoding module takes grids alone, and looks at the first of a batch
            one = partial(theirs.generate_fourier_features, num_bands=bands, max_resolution=resolution)
            self.encode = lambda coords: torch.cat([one(c) for c in coords.split(1)])
            return
        codes = theirs.PerceiverFourierPositionEncoding(bands, resolution)
        self.encode = lambda data: torch.cat(
            [data.flatten(1, -2), codes(data.shape[1:-1], data.shape[0], data.device, data.dtype)], -1
        )

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        return self.layer(x, inputs=self.encode(data))[0]


class PerceiverIO(Foreign):
    """The layer of the package perceiver-io."""

    names = {
        "norm": ("layer.q_norm",),
        "norm_context": ("layer.kv_norm",),
        "fn.to_q": ("layer.attention.q_proj",),
        "fn.to_kv": ("layer.attention.k_proj", "layer.attention.v_proj"),
        "fn.to_out": ("layer.attention.o_proj",),
    }

    def make(self, geometry: Geometry, width: int, inner: int) -> None:
        from perceiver.model.core.modules import CrossAttention
        from perceiver.model.core.position import FourierPositionEncoding

        self.layer = CrossAttention(
            geometry.heads, width, geometry.token_channels, num_qk_channels=inner, num_v_channels=inner, qkv_bias=False
        )
        if not geometry.encoded:
            return
        points = geometry.family == "points"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.meshgrid, that its indexing will have to be given
            sizes = (2,) * self.axes if points else geometry.sizes
            codes = FourierPositionEncoding(sizes, geometry.model["num_freq_bands"])
            # Its own highest frequency is the size of an axis.
            encode = partial(codes._position_encodings, max_frequencies=(geometry.model["max_freq"],) * self.axes)
            codes.position_encoding = encode(codes._positions()).flatten(0, -2)
        self.encode = encode if points else lambda data: torch.cat([data.flatten(1, -2), codes(data.shape[0])], -1)

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        return self.layer(x, self.encode(data)).last_hidden_state


def weights(geometry: Geometry) -> dict[str, Tensor]:
    """What all peers share, by perceiver-pytorch's names."""
    torch.manual_seed(0)
    layer = Original(geometry).layer
    perturb(layer, layer.norm, layer.norm_context)
    return dict(sorted(layer.state_dict().items()))


def side(module: nn.Module, case: Case) -> Side:
    """``module`` with the weights that all peers share, on the case's latents and input."""
    shared = weights(case.geometry)
    latents = case.batch, case.geometry.queries, case.geometry.model["latent_dim"]
    x = torch.randn(latents, generator=torch.Generator().manual_seed(3)).requires_grad_(case.step)
    inputs = x, case.geometry.input(case.batch)
    if isinstance(module, Foreign):
        module.load(shared)
        return Side(module, inputs, parameters(module), common=partial(module.common, list(shared)))
    module.layer.load_state_dict(shared)
    return Side(module, inputs, parameters(module.layer))


def _sdpa(case: Case) -> Side:
    return side(with_sdpa(Original(case.geometry)), case)


def truth(case: Case) -> Side:
    """perceiver-pytorch's layer in float64, its attention through torch's."""
    found = _sdpa(case)
    module = found.apply.double()
    x, data = (t.detach().double() for t in found.inputs)
    return Side(module, (x.requires_grad_(case.step), data), parameters(module.layer))


def _on_a_grid(case: Case) -> bool:
    """Whether tokens have codes of several axes, which is what tables of the axes are good for."""
    return case.geometry.family == "perceiver" and case.geometry.encoded and len(case.geometry.sizes) > 1


def _peer(layer: type[nn.Module], **options: object) -> Peer:
    return Peer(lambda case: side(layer(case.geometry), case), **options)


PEERS = {
    "eager": _peer(Original),
    "sdpa": Peer(_sdpa),
    OURS: ours(lambda case: side(Fast(case.geometry), case)),
    "compile": compiled(_sdpa),
    "transformers": _peer(Transformers, packages=("transformers",), install="pip install -e '.[bench]'"),
    "perceiver-io": _peer(
        PerceiverIO,
        packages=("fairscale", "perceiver"),
        install=f"make peers (pip cannot resolve perceiver-io {IO_VERSION}'s pins)",
    ),
    SMART: _peer(SmartDense, fits=_on_a_grid),
    "flash-perceiver": _peer(
        Original,
        reasons=lambda case: [
            "flash-perceiver runs on CUDA tensors alone, through flash-attn; these benchmarks measure the CPU"
        ],
    ),
}
LEVEL = Level(PEERS, truth, lambda geometry: 1, op=False, needs=needs, dtypes=DTYPES)
