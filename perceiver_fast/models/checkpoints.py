"""Checkpoints of older perceiver-pytorch releases, renamed while they load."""

from __future__ import annotations

import re
import warnings
from collections.abc import MutableMapping

from torch import nn

# Old keys of a Perceiver, and what takes their place. Until 0.9 a block was a list [cross_attn, cross_ff, self_attns].
_RENAMES = (
    (re.compile(r"^(layers\.\d+)\.0\."), r"\1.cross_attn."),
    (re.compile(r"^(layers\.\d+)\.1\."), r"\1.cross_ff."),
    (re.compile(r"^(layers\.\d+)\.2\.(\d+\.[01]\.)"), r"\1.self_attns.\2"),
    (re.compile(r"\.fn\.to_out\.0\."), ".fn.to_out."),  # until 0.7: a Sequential with dropout
    (re.compile(r"\.fn\.net\.3\."), ".fn.net.2."),  # until 0.7: dropout before the last linear
)

# The same of PerceiverIO. In 0.8 its blocks were lists: [cross_attn, cross_ff], then [self_attn, self_ff] for each layer.
_IO_RENAMES = (
    (re.compile(r"^cross_attend_blocks\.0\."), "cross_attend_block.cross_attn."),
    (re.compile(r"^cross_attend_blocks\.1\."), "cross_attend_block.cross_ff."),
    (re.compile(r"^(layers\.\d+)\.([01])\."), r"\1.self_attns.0.\2."),
)


def _own_keys(model: nn.Module) -> set[str]:
    """Keys of the model's state_dict, without calling ``state_dict()``, whose hooks may talk to other processes."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name for name, _ in named}


def _rename(model: nn.Module, state_dict: MutableMapping, prefix: str, starts: tuple[str, ...], renames: tuple) -> None:
    """Rename keys in place by patterns, see :func:`upgrade_state_dict`; ``starts`` are what an old key may start with."""
    starts = tuple(prefix + start for start in starts)
    own = _own_keys(model)
    for key in [k for k in state_dict if k.startswith(starts)]:
        old = key[len(prefix) :]
        name = old
        for pattern, replacement in renames:
            name = pattern.sub(replacement, name)
        if name != old and old not in own and name in own:
            state_dict[prefix + name] = state_dict.pop(key)


def upgrade_io_state_dict(model: nn.Module, state_dict: MutableMapping, prefix: str = "") -> None:
    """Rename, in place, the keys of a PerceiverIO of perceiver-pytorch 0.8 to those of 0.10 and later.

    Args:
        model: what loads. A key is renamed only if the model has the new key and not the old one.
        state_dict: the checkpoint.
        prefix: what the model's keys start with, when it is part of a larger one.
    """
    _rename(model, state_dict, prefix, ("layers.", "cross_attend_blocks."), _IO_RENAMES)


def upgrade_state_dict(model: nn.Module, state_dict: MutableMapping, prefix: str = "") -> None:
    """Rename, in place, the keys of a perceiver-pytorch 0.3 to 0.9 checkpoint to those of 0.10 and later.

    Args:
        model: what loads. A key is renamed only if the model has the new key and not the old one, so that models with
            layers of the user's own load what they saved.
        state_dict: the checkpoint.
        prefix: what the model's keys start with, when it is part of a larger one.

    Warns:
        UserWarning: the checkpoint is from 0.7.0 or earlier. Those releases spaced frequencies logarithmically, so the
            weights fit but were trained with other position codes. (So did 0.7.1 to 0.7.3, but their checkpoints cannot
            be told from later ones.)
    """
    own = _own_keys(model)
    head_moved = "to_logits.0.weight" not in own and {"to_logits.1.weight", "to_logits.2.weight"} <= own
    if head_moved and prefix + "to_logits.0.weight" in state_dict:  # until 0.7.0 the pooling was not part of the head
        warnings.warn(
            "this checkpoint is from perceiver-pytorch 0.7.0 or earlier, which spaced its Fourier frequencies "
            "logarithmically; it loads, but outputs will differ, because frequencies are spaced linearly since 0.7.4",
            stacklevel=2,
        )
        for new in ("2", "1"):
            for name in ("weight", "bias"):
                old = f"{prefix}to_logits.{int(new) - 1}.{name}"
                if old in state_dict:
                    state_dict[f"{prefix}to_logits.{new}.{name}"] = state_dict.pop(old)
    _rename(model, state_dict, prefix, ("layers.",), _RENAMES)
