"""A cache of what is computed from parameters alone: in inference, until one of them changes.

Every cached value has a stamp of each parameter it came from: the tensor itself, its memory, its version (every
in-place operation, optimizer step and load_state_dict raises it) and a hash of samples of its content. The hash is for
writes that torch does not count, through ``.data`` or a numpy view: it reads parameters up to 8 KiB whole and 1,024
words of large ones, so such a write to a few elements of a large parameter is the one change it can miss;
``clear_caches(model)`` is for whoever does that. Nothing is cached in training, for tensors that carry transforms, or
off the CPU (there CUDA graphs save the launches, and reading a hash would wait for the device).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from perceiver_fast import extension
from perceiver_fast.tracing import PLAIN, intercepted

T = TypeVar("T")


class _Stamp:
    """What a parameter looked like when a value was computed from it.

    Args:
        source: the parameter, on the CPU and contiguous.
    """

    def __init__(self, source: Tensor):
        self.source = source
        self.memory = source.detach()  # keeps the memory from being freed and given to another parameter
        self.version = source._version
        self.address = source.data_ptr()
        self.bytes = source.numel() * source.element_size()
        self.dtype, self.shape = source.dtype, source.shape
        self.content = extension.module.content_hash(self.address, self.bytes)

    def matches(self, source: Tensor) -> bool:
        """Whether ``source`` is the same tensor with the same content."""
        return (
            self.source is source
            and self.version == source._version
            and self.address == source.data_ptr()
            and self.dtype is source.dtype
            and self.shape == source.shape
            and self.content == extension.module.content_hash(self.address, self.bytes)
        )


class ParameterCache:
    """Values by name, each with the stamps of the parameters it was computed from.

    It is a plain attribute of a module. Copies and pickles of the module get an empty cache.
    """

    def __init__(self):
        self._entries: dict[str, tuple] = {}

    def get(self, name: str, sources: Sequence[Tensor], build: Callable[[], T], cache_key: object = None) -> T:
        """``build()``; or the cached result of an earlier call with the same ``sources`` and ``cache_key``.

        Args:
            name: which of the cache's values.
            sources: all tensors that the value depends on.
            build: computes the value.
            cache_key: all else that the value depends on; compared with ``==``. Default: nothing.
        """
        if torch.compiler.is_compiling():
            return build()
        self.clear_in_training()
        if not cacheable(sources):
            return build()
        entry = self._entries.get(name)
        if entry is not None and entry[1] == cache_key and len(entry[0]) == len(sources):
            if all(stamp.matches(source) for stamp, source in zip(entry[0], sources)):
                return entry[2]
        stamps = [_Stamp(source) for source in sources]  # made first, so that a change during build() shows
        with torch.inference_mode(False), torch.no_grad():  # so that the value can be used in every other mode, too
            value = build()
        self._entries[name] = stamps, cache_key, value
        return value

    def peek(self, name: str, source: Tensor) -> tuple | None:
        """Cache key and value under ``name``, of a value computed from ``source`` alone; None if it is not to be used.

        A faster :meth:`get` for callers who compare the cache key themselves.
        """
        entry = self._entries.get(name)
        if entry is None or torch.is_grad_enabled() or intercepted() or forward_ad._current_level >= 0:
            return None
        return entry[1:] if entry[0][0].matches(source) else None

    def holds(self, name: str, value: object) -> bool:
        """Whether ``value`` is the very object cached under ``name``; if so, what is computed from it can be cached, too."""
        if torch.compiler.is_compiling():
            return False
        entry = self._entries.get(name)
        return entry is not None and entry[2] is value

    def clear_in_training(self) -> None:
        """Drop all values if gradients are recorded, since the parameters are then about to change."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.clear()

    def clear(self) -> None:
        """Drop all values."""
        if self._entries:
            self._entries = {}

    def __deepcopy__(self, memo) -> ParameterCache:
        return ParameterCache()

    def __reduce__(self):
        return ParameterCache, ()


def cacheable(sources: Sequence[Tensor]) -> bool:
    """Whether a value computed from ``sources`` may be cached: only in inference, from plain contiguous CPU tensors."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or extension.error is not None:
        return False
    if intercepted() or forward_ad._current_level >= 0:
        return False
    return all(type(t) in PLAIN and t.device.type == "cpu" and t.is_contiguous() and _has_version(t) for t in sources)


def _has_version(tensor: Tensor) -> bool:
    """Whether torch counts the in-place writes to ``tensor``."""
    return not (tensor.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


class Cached(nn.Module):
    """A module with a :class:`ParameterCache`, emptied when the module's parameters move or change their dtype."""

    @property
    def cache(self) -> ParameterCache:
        """The module's cache; made here, as modules that perceiver-pytorch pickled come without one."""
        cache = self.__dict__.get("_parameter_cache")
        if cache is None:
            cache = self.__dict__["_parameter_cache"] = ParameterCache()
        return cache

    def _apply(self, fn, recurse=True):
        self.cache.clear()
        return super()._apply(fn, recurse)


def clear_caches(model: nn.Module) -> None:
    """Drop everything that ``model``'s layers cache between inference calls: packed weights, products of parameters.

    Only needed after a write to a few elements of a large parameter behind torch's back (``p.data[0, 0] = 1``, or
    through a numpy view); all other changes are noticed. It also frees the memory.

    Args:
        model: any module.

    Example:
        >>> import perceiver_fast as pf
        >>> model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
        >>> pf.clear_caches(model)
    """
    for module in model.modules():
        if isinstance(module, Cached):
            module.cache.clear()
