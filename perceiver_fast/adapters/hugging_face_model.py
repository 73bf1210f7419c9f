"""Hugging Face transformers' Perceiver: what is around its layers. Preprocessors hand on described tokens.

That is done only within a call of a ``PerceiverModel`` of which every module that sees the tokens is transformers' own and
has no hook: :class:`ModelForward` finds that out and tells preprocessors by a context variable. A preprocessor that
somebody else calls returns a plain tensor.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.adapters.conditions import why_not_now
from perceiver_fast.adapters.decoding import grid_steps
from perceiver_fast.adapters.described import ROWS, ComputedRows, DescribedTensor, by_rows, described, rows_of
from perceiver_fast.adapters.forwards import stand_ins
from perceiver_fast.adapters.hugging_face import MODELING, LayerForward, LayerStandIn, is_perceivers, modeling
from perceiver_fast.adapters.hugging_face_codes import grid_tokens, why_codes
from perceiver_fast.layers.fusing import is_called, why_not
from perceiver_fast.ops.library import learns
from perceiver_fast.ops.rounding import rounding_once
from perceiver_fast.tokens import DenseTokens, EmbeddedGrid, GridTokens, TokenGroups, Tokens
from perceiver_fast.tracing import own

PREPROCESSORS = "PerceiverImagePreprocessor", "PerceiverAudioPreprocessor", "PerceiverMultimodalPreprocessor"
DECODERS = (
    "PerceiverBasicDecoder", "PerceiverClassificationDecoder", "PerceiverOpticalFlowDecoder",
    "PerceiverBasicVideoAutoencodingDecoder", "PerceiverMultimodalDecoder", "PerceiverProjectionDecoder",
)  # fmt: skip
LARGE = 2**24  # numbers of a decoder's output, from which on it is computed where it is used

_model: ContextVar[nn.Module | None] = ContextVar("model", default=None)  # whose call the present one is in


def calling() -> nn.Module | None:
    """The model whose call the present one is in, and whose tokens are described; None if there is none."""
    return None if torch.compiler.is_compiling() else _model.get()


class ModelForward(LayerStandIn):
    """``PerceiverModel.forward`` itself, with masks that are not written for every latent, and described tokens inside."""

    kind = "model"

    def why_not(self, **arguments: Any) -> str | None:
        if torch.compiler.is_compiling():
            return "while a graph is traced, tokens are built"
        mask = arguments.get("attention_mask")
        found = why_not_now()
        if found is None and mask is not None and type(mask) is not Tensor:
            found = f"attention_mask is of class {type(mask).__name__}"
        return found

    def run(self, **arguments: Any) -> Any:
        model = self.module
        mask = arguments.get("attention_mask")
        makes_wide = hasattr(modeling(), "create_bidirectional_mask")
        if makes_wide and (mask is None or mask.dim() == 2) and not self.mask_is_seen():
            arguments["attention_mask"] = self.narrow_mask(mask)
        why = self.why_built()
        self.note("tokens are described" if why is None else f"tokens are built: {why}")
        token = _model.set(model if why is None else None)
        try:
            with rounding_once(next(model.parameters()).device, shared=model.config.num_blocks > 1):
                return self.original(**arguments)
        finally:
            _model.reset(token)

    def narrow_mask(self, mask: Tensor | None) -> Tensor:
        """A mask as transformers 5 makes it, of one row where it has a row for every latent."""
        like = self.module.embeddings.latents
        if mask is None:
            zeros = torch.zeros(1, 1, 1, 1, dtype=like.dtype, device=like.device)
            setattr(zeros, "says_nothing", True)
            return zeros
        keep = mask.to(device=like.device, dtype=torch.bool)[:, None, None, :]
        return torch.zeros(keep.shape, dtype=like.dtype, device=like.device).masked_fill(
            ~keep, torch.finfo(like.dtype).min
        )

    def mask_is_seen(self) -> bool:
        """Whether somebody might look at the mask: what is not transformers' own, or a hook."""
        encoder, decoder = (self.module._modules.get(name) for name in ("encoder", "decoder"))
        if not is_perceivers(encoder, "PerceiverEncoder"):
            return True
        if decoder is not None and not is_perceivers(decoder, *DECODERS):
            return True
        inside = [*encoder.modules(), *(() if decoder is None else decoder.modules())]
        return any(is_called(module) is not None for module in inside)

    def why_built(self) -> str | None:
        """Why preprocessors have to build their tokens; None if nobody could tell that they did not."""
        modules = self.module._modules
        encoder, decoder = modules["encoder"], modules.get("decoder")
        seeing = [
            ("encoder", encoder, ("PerceiverEncoder",)),
            ("input_preprocessor", modules.get("input_preprocessor"), PREPROCESSORS),
        ]
        if decoder is not None:
            seeing.append(("decoder", decoder, DECODERS))
        for name, module, kinds in seeing:
            if module is None or not is_perceivers(module, *kinds):
                return f"{name} is of class {type(module).__name__}"
            if (found := is_called(module)) is not None:
                return f"{name} {found}"
        layer = encoder._modules["cross_attention"]
        if not isinstance(layer.__dict__.get("forward"), LayerForward):
            return "encoder.cross_attention is not accelerated"
        for name, module in (("encoder.cross_attention", layer), ("decoder", decoder)):
            for inside, other in () if module is None else module.named_modules():
                if (found := is_called(other)) is not None:
                    return f"{name}.{inside} {found}"
        return None


class BuildInputs(LayerStandIn):
    """``_build_network_inputs`` of image and audio preprocessors: positions of a grid are described, not joined."""

    method = "_build_network_inputs"
    kind = "preprocessor"

    def why_not(
        self,
        inputs: Tensor,
        network_input_is_1d: bool = True,
        interpolate_pos_encoding: bool = False,
        **others: Any,
    ) -> str | None:
        module = self.module
        if calling() is None or others or not network_input_is_1d:
            return "its result may be seen by others than the encoder"
        if module.position_encoding_type != "fourier" or module.concat_or_add_pos != "concat":
            return "positions are learned" if module.position_encoding_type == "trainable" else "positions are added"
        found = why_not_now(inputs)
        return found or why_codes(
            module._modules["position_embeddings"], module._modules["positions_projection"], inputs.dim() - 2
        )

    def run(self, inputs: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        tokens = grid_tokens(self.module._modules["position_embeddings"], own(inputs.contiguous()))
        self.note(f"a grid of {' x '.join(map(str, tokens.sizes))}, {tokens.features} channels, described")
        without = inputs.reshape(inputs.shape[0], tokens.count, -1)
        return described(tokens, inputs.dtype, inputs.device), without


class MultimodalPreprocess(LayerStandIn):
    """``PerceiverMultimodalPreprocessor.forward``: modalities are groups of tokens, their padding a bias."""

    kind = "preprocessor"

    def why_not(
        self, inputs: Any = None, pos: Tensor | None = None, network_input_is_1d: bool = True, **_: Any
    ) -> str | None:
        if calling() is None or pos is not None or not network_input_is_1d:
            return "its result may be seen by others than the encoder"
        for name, module in self.module.modalities.items():
            if not is_perceivers(module, *PREPROCESSORS[:2], "PerceiverOneHotPreprocessor") or is_called(module):
                return f"modalities.{name} {is_called(module) or 'is of class ' + type(module).__name__}"
        if any(p not in (0.0, 1.0) for p in self.module.mask_probs.values()):
            return "some tokens of a modality are masked at random"
        return why_not_now(*self.module.padding.values(), *self.module.mask.values())

    def run(self, inputs: Any, **_: Any) -> tuple[Tensor, dict, dict]:
        module, sizes, without = self.module, {}, {}
        groups: dict[str, Tokens] = {}
        mask: Any  # None for modalities that are never masked
        for name, preprocessor in module.modalities.items():
            output, _, without[name] = preprocessor(inputs[name], pos=None, network_input_is_1d=True)
            batch, count, _ = output.shape
            if name in module.mask_probs:  # transformers draws here too: what is drawn afterwards stays the same
                torch.bernoulli(torch.full([batch, count], module.mask_probs[name], device=module.mask[name].device))
            padding, mask = module.padding[name], module.mask[name] if name in module.mask_probs else None
            if module.mask_probs.get(name) == 1.0:
                token = mask + unused(padding)
                groups[name] = DenseTokens(token.expand(batch, count, -1).to(output.dtype))
            else:
                groups[name] = padded(output, padding if mask is None else padding + unused(mask))
            sizes[name] = count
        tokens = TokenGroups([groups[name] for name in sorted(groups)])
        self.note(", ".join(f"{name}: {groups[name].kind}" for name in sorted(groups)))
        return described(tokens, output.dtype, output.device), sizes, without


def unused(parameter: Tensor) -> Tensor | float:
    """Zero: adds nothing, but gives a parameter that has no say here the gradient of zero that it has in transformers."""
    return 0.0 * parameter.sum() if learns(parameter) else 0.0


def padded(output: Tensor, padding: Tensor) -> Tokens:
    """The tokens ``[output ; padding]``, the padding ``[1, P]`` the same for all.

    Args:
        output: ``[B, M, C]``, a tensor or described as a grid.
        padding: ``[1, P]``.
    """
    tokens = output.source.tokens if type(output) is DescribedTensor else None
    if not isinstance(tokens, GridTokens):
        whole = output.build() if type(output) is DescribedTensor else output
        return DenseTokens(torch.cat([whole, padding.expand(*whole.shape[:2], -1)], -1))
    # y = W z + b: W brings z's channels, which stand in the grid's own order, into the expected one; b is the padding.
    channels, extra = tokens.channels, padding.shape[1]
    weight = torch.zeros(channels + extra, channels, dtype=tokens.feat.dtype, device=tokens.device)
    weight[torch.arange(channels, device=tokens.device), tokens.order] = 1
    bias = torch.cat([padding.new_zeros(channels), padding[0]]).to(tokens.feat.dtype)
    plain = GridTokens(tokens.feat, tokens.codes)
    plain.dtype = tokens.dtype
    return EmbeddedGrid(plain, weight, bias)


class DecoderForward(LayerStandIn):
    """``PerceiverBasicDecoder.forward`` in inference: queries some at a time, so that memory is that of the output."""

    kind = "decoder"

    def why_not(
        self,
        query: Tensor | None = None,
        z: Tensor | None = None,
        output_attentions: bool | None = False,
        **others: Any,
    ) -> str | None:
        module = self.module._modules
        if output_attentions:
            return "attention weights are asked for"
        if query is None or z is None or set(others) - {"query_mask"}:
            return "unknown arguments"
        if query.dim() != 3 or query.shape[1] <= ROWS:
            return "few queries: nothing to divide"
        if torch.compiler.is_compiling():
            return "while a graph is traced, queries are not divided"
        layer = module.get("decoding_cross_attention")
        if torch.is_grad_enabled() and (learns(query, z) or any(p.requires_grad for p in self.module.parameters())):
            return "in training, all queries at once"
        if not isinstance(layer.__dict__.get("forward"), LayerForward):
            return "its layer is not accelerated"
        found = why_not("final_layer", module["final_layer"], nn.Linear, nn.Identity)
        return found or why_rows(layer) or self.layer.why_not(hidden_states=query, inputs=z)

    @property
    def layer(self) -> LayerForward:
        """The stand-in of the decoder's layer."""
        found: Any = stand_ins(self.module._modules["decoding_cross_attention"])["forward"]
        return found

    def run(self, query: Any, z: Tensor, **_: Any) -> Any:
        layer, final = self.layer, self.module._modules["final_layer"]
        residual = layer.module._modules["attention"].use_query_residual
        decoder = layer.decoder(query, z)
        model, count = calling(), query.shape[1]
        if decoder is not None:
            self.note("described queries, some at a time")
            logits = self.by_grid(decoder, layer, final, query.build() if residual else None)
        else:

            def compute(start: int, stop: int) -> Tensor:
                part = rows_of(query, start, stop)
                part = query.build()[:, start:stop] if part is None else part
                return final(layer.run(hidden_states=part, inputs=z)[0])

            self.note("queries some at a time")
            width = getattr(final, "out_features", query.shape[2])
            if model is not None and self.goes_to_postprocessor(model) and query.shape[0] * count * width >= LARGE:
                shape = query.shape[0], count, width
                logits = DescribedTensor(shape, z.dtype, z.device, ComputedRows(compute, count))
            else:
                logits = by_rows(compute, count)
        return modeling().PerceiverDecoderOutput(logits=logits, cross_attentions=None)

    def by_grid(self, decoder: Any, layer: LayerForward, final: nn.Module, residual: Tensor | None) -> Tensor:
        """The output for queries on a grid, some indices of the first axis at a time."""
        out: Any = None
        for start, stop, first, last in grid_steps(decoder.tokens, 2 * ROWS):
            part = None if residual is None else residual[:, first:last]
            part = final(layer.after(decoder.rows(start, stop), None, part))
            if out is None:
                out = part.new_empty(part.shape[0], decoder.tokens.count, part.shape[2])
            out[:, first:last] = part
        return out

    def goes_to_postprocessor(self, model: nn.Module) -> bool:
        """Whether the output goes through a decoder without hooks to the plain postprocessor of modalities."""
        modules: dict[str, Any] = model._modules
        outer, post = modules.get("decoder"), modules.get("output_postprocessor")
        if outer is None or not is_perceivers(outer, "PerceiverMultimodalDecoder"):
            return False
        if post is None or not is_perceivers(post, "PerceiverMultimodalPostprocessor"):
            return False
        inside = [post, *post.modalities.values(), self.module]
        return outer.decoder is self.module and all(is_called(module) is None for module in inside)


def why_rows(layer: nn.Module) -> str | None:
    """Why a layer might treat rows otherwise than one by one, in words; None if it does not."""
    for name, module in layer.named_modules():
        known = type(module) in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity)
        where = type(module).__module__
        if not known and where not in (MODELING, "transformers.activations", "torch.nn.modules.activation"):
            return f"{name} is of class {type(module).__name__}"
        if (found := is_called(module)) is not None:
            return f"{name} {found}"
    return None


class MultimodalQueries(LayerStandIn):
    """``PerceiverMultimodalDecoder.decoder_query`` in inference: queries that are built some at a time."""

    method = "decoder_query"
    kind = "decoder's queries"

    def why_not(
        self,
        inputs: Tensor,
        modality_sizes: dict | None = None,
        inputs_without_pos: dict | None = None,
        subsampled_points: dict | None = None,
        **others: Any,
    ) -> str | None:
        if calling() is None or others or modality_sizes is None:
            return "its result may be seen by others than the decoder"
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()):
            return "in training, all queries at once"
        points = [p for p in (subsampled_points or {}).values() if p is not None]
        if sum(map(len, points)) <= ROWS:
            return "few queries: nothing to divide"
        return why_not_now(inputs)

    def run(self, inputs: Tensor, modality_sizes: dict, inputs_without_pos=None, subsampled_points=None) -> Tensor:
        module, start = self.module, 0
        parts: list[tuple[Any, ...]] = []
        for name in sorted(module.modalities):
            points = subsampled_points.get(name)
            if points is None or len(points) == 0:
                whole = self.queries(name, inputs, modality_sizes, inputs_without_pos, points)
                parts.append((name, start, start + whole.shape[1], whole, None))
            else:
                parts.append((name, start, start + len(points), None, points))
            start = parts[-1][2]

        def compute(first: int, last: int) -> Tensor:
            found = []
            for name, begin, end, whole, points in parts:
                a, b = max(first, begin) - begin, min(last, end) - begin
                if a >= b:
                    continue
                if points is not None:
                    part = self.queries(name, inputs, modality_sizes, inputs_without_pos, points[a:b])
                else:
                    part = whole[:, a:b]
                found.append(part)
            return torch.cat(found, 1)

        self.note("queries are built some at a time")
        shape = inputs.shape[0], start, module.num_query_channels
        return DescribedTensor(shape, inputs.dtype, inputs.device, ComputedRows(compute, start))

    def queries(self, name, inputs, modality_sizes, inputs_without_pos, points) -> Tensor:
        """One modality's queries as transformers' own code makes them, padded."""
        module = self.module
        start = sum(modality_sizes[other] for other in sorted(modality_sizes) if other < name)
        query = module.modalities[name].decoder_query(
            inputs=inputs[:, start : start + modality_sizes[name]],
            modality_sizes=None,
            inputs_without_pos=None if inputs_without_pos is None else inputs_without_pos.get(name),
            subsampled_points=points,
        )
        query = query.reshape(query.shape[0], -1, query.shape[-1])
        padding = module.padding[name].expand(*query.shape[:2], -1)
        return torch.cat([query, padding.to(query.dtype)], 2)
