"""What is computed from parameters alone, kept in inference until one of them changes.

A value is kept with a stamp of every parameter it came from: the tensor itself, its memory, its version (every
in-place operation, optimizer step and load_state_dict raises it) and a hash of samples of its content. The hash is for
writes that torch does not count, through ``.data`` or a numpy view: it reads parameters up to 8 KiB whole and 1,024
words of large ones, so such a write to a few elements of a large parameter is the one change it can miss;
``clear_caches(model)`` is for whoever does that. Nothing is stored in training, for tensors that carry transforms, or
off the CPU (where CUDA graphs take the launches away and reading a hash would wait for the device).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from perceiver_fast import extension

T = TypeVar("T")
PLAIN = (Tensor, nn.Parameter)


class _Stamp:
    """What tells whether a parameter is still what it was."""

    def __init__(self, source: Tensor):
        self.source = source
        self.memory = source.detach()  # holds the memory, so that no other parameter can come to lie there
        self.version = source._version
        self.address = source.data_ptr()
        self.bytes = source.numel() * source.element_size()
        self.dtype, self.shape = source.dtype, source.shape  # contiguous, as all that is kept
        self.content = extension.module.content_hash(self.address, self.bytes)

    def holds(self, source: Tensor) -> bool:
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

    It belongs to a module as a plain attribute: copies and pickles of the module get an empty one.
    """

    def __init__(self):
        self._entries: dict[str, tuple] = {}

    def get(self, name: str, sources: Sequence[Tensor], build: Callable[[], T], key: object = None) -> T:
        """``build()``, or what it returned when ``sources`` and ``key`` were last the same.

        Args:
            name: which of the cache's values.
            sources: all tensors that the value depends on.
            build: computes the value.
            key: all else that the value depends on; compared with ``==``.
        """
        if torch.compiler.is_compiling():
            return build()
        self.clear_in_training()
        if not cacheable(sources):
            return build()
        entry = self._entries.get(name)
        if entry is not None and entry[1] == key and len(entry[0]) == len(sources):
            if all(stamp.holds(source) for stamp, source in zip(entry[0], sources)):
                return entry[2]
        stamps = [_Stamp(source) for source in sources]  # before the value: a change meanwhile shows
        with torch.inference_mode(False), torch.no_grad():  # usable in any mode whichever it was first asked for in
            value = build()
        self._entries[name] = stamps, key, value
        return value

    def kept(self, name: str, source: Tensor) -> tuple | None:
        """Key and value under ``name``, made from ``source`` alone, if they still hold: :meth:`get` for the hurried."""
        entry = self._entries.get(name)
        if entry is None or torch.is_grad_enabled() or _watched() or not entry[0][0].holds(source):
            return None
        return entry[1:]

    def holds(self, name: str, value: object) -> bool:
        """Whether ``value`` is the very one that is kept under ``name``: then what is computed from it can be, too."""
        if torch.compiler.is_compiling():
            return False
        entry = self._entries.get(name)
        return entry is not None and entry[2] is value

    def clear_in_training(self) -> None:
        """Forget all values where gradients are recorded: the parameters are about to change."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.clear()

    def clear(self) -> None:
        """Forget all values."""
        if self._entries:
            self._entries = {}

    def __deepcopy__(self, memo) -> ParameterCache:
        return ParameterCache()

    def __reduce__(self):
        return ParameterCache, ()


def cacheable(sources: Sequence[Tensor]) -> bool:
    """Whether a value computed from ``sources`` may be kept: inference on plain CPU tensors, outside of any tracing."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or extension.error is not None:
        return False
    if _watched():
        return False
    return all(type(t) in PLAIN and t.device.type == "cpu" and t.is_contiguous() and _counted(t) for t in sources)


def _watched() -> bool:
    """Whether operations do not simply run: modes, forward-mode derivatives and tracers look on."""
    if torch._C._len_torch_dispatch_stack() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch._C._get_tracing_state() is not None


def _counted(tensor: Tensor) -> bool:
    return not (tensor.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


class Cached(nn.Module):
    """A module with a :class:`ParameterCache`, emptied when the module's parameters move or change their dtype."""

    @property
    def cache(self) -> ParameterCache:
        """Made when it is first asked for: modules that perceiver-pytorch pickled come without."""
        cache = self.__dict__.get("_parameter_cache")
        if cache is None:
            cache = self.__dict__["_parameter_cache"] = ParameterCache()
        return cache

    def _apply(self, fn, recurse=True):
        self.cache.clear()
        return super()._apply(fn, recurse)


def clear_caches(model: nn.Module) -> None:
    """Forget everything that ``model``'s layers keep between inference calls: packed weights, products of parameters.

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
