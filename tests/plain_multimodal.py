"""The multimodal Perceiver in plain PyTorch: all tokens built and joined, one softmax over all of them."""

import torch

from perceiver_fast import reference
from perceiver_fast.ops.library import dropout_seed


def build_tokens(model, data):
    """The tokens ``[B, M_g, C]`` of every modality that is there, positions and codes in float64, then rounded."""
    groups = []
    for modality in model.modalities:
        if modality.name not in data:
            continue
        given = data[modality.name]
        if torch.is_tensor(given):
            axes = [torch.linspace(-1.0, 1.0, size, dtype=torch.float64) for size in given.shape[1:-1]]
            coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
            given = given.flatten(1, -2)
        else:
            given, coords = given
        frequency = torch.linspace(1.0, modality.max_freq / 2, modality.num_freq_bands, dtype=torch.float64)
        code = reference.fourier_encode(coords.double(), frequency.expand(modality.input_axis, -1)).to(given.dtype)
        parts = [given, model.embeddings[modality.name].expand(*given.shape[:2], -1)]
        groups.append(torch.cat([*parts, code.expand(given.shape[0], -1, -1)], -1))
    return groups


def cross_attention(module, x, groups, mask):
    """``module``, a PreNorm with a context, of latents ``x [B, N, D]`` to the tokens of all groups joined."""
    fn, tokens = module.fn, torch.cat(groups, 1)
    split = (fn.heads, fn.dim_head)
    q = fn.to_q(module.norm(x)).unflatten(-1, split)
    k, v = (t.unflatten(-1, split) for t in fn.to_kv(module.norm_context(tokens)).chunk(2, -1))
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * fn.dim_head**-0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.finfo(logits.dtype).max)
    weight, dropout = logits.softmax(-1), fn.active_dropout
    if dropout > 0:
        weight = reference.apply_dropout(weight, dropout_seed(dropout, weight.device), dropout)
    return fn.to_out(torch.einsum("bhnm,bmhd->bnhd", weight, v).flatten(2))


def forward(model, data, mask=None):
    """What ``model(data, mask)`` is."""
    groups, joined = build_tokens(model, data), None
    if mask is not None:
        present = [modality.name for modality in model.modalities if modality.name in data]
        masks = [mask.get(name) for name in present]
        ones = [torch.ones(group.shape[:2], dtype=torch.bool) for group in groups]
        joined = torch.cat([one if m is None else m.flatten(1).expand_as(one) for m, one in zip(masks, ones)], 1)
    x = model.latents.expand(groups[0].shape[0], -1, -1)
    for block in model.layers:
        x = cross_attention(block.cross_attn, x, groups, joined) + x
        x = block.cross_ff(x) + x
        for attention, feed_forward in block.self_attns:
            x = attention(x) + x
            x = feed_forward(x) + x
    return model.to_logits(x)
