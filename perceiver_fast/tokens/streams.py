"""An input that is read in chunks, whenever somebody attends to it: larger than memory, if it has to be.

A model describes every chunk as it would the whole input, with the codes of its rows, and merges what its latents find
(layers/streaming.py). So memory is that of one chunk, and the source is read once for every cross-attention, and again in
the backward.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from perceiver_fast.shards.agreement import Place
    from perceiver_fast.shards.shard import Shard
    from perceiver_fast.tokens.base import Tokens

_END = object()
CHUNK = 2**22  # numbers of a chunk, where its rows are not given: 16 MiB of float32


class Chunk(NamedTuple):
    """Some rows of a source.

    Attributes:
        data: ``[B, rows, .., F]``.
        coords: positions ``[B, rows, A]`` or ``[rows, A]``; or None.
        mask: bool ``[B, rows, ..]``; or None.
        start: index of the first row.
    """

    data: Tensor
    coords: Tensor | None
    mask: Tensor | None
    start: int


@dataclass(frozen=True, eq=False)
class Stream:
    """An input that is read in chunks; made by :func:`stream`, whose arguments the attributes are."""

    source: Any
    rows: int | None
    total: int | None
    transform: Callable[[Any], Tensor] | None
    coords: Any
    mask: Any
    progress: bool
    points: bool = False  # whether there are positions
    first_shape: tuple[int, ...] = ()  # of the first chunk of an iterable

    def shape_of(self) -> tuple[int, ...]:
        """Sizes of the source, or of the first chunk of an iterable."""
        return tuple(self.source.shape) if self.is_array else self.first_shape

    def batch(self, dims: int) -> int:
        """Elements of the batch; 1 where the source has no dimension for them. ``dims``: as of :meth:`length`."""
        shape = self.shape_of()
        return shape[0] if len(shape) == dims else 1

    def across(self, dims: int) -> int:
        """Tokens of a row. ``dims``: as of :meth:`length`."""
        return math.prod(self.shape_of()[2 - dims : -1])

    @property
    def is_array(self) -> bool:
        """Whether parts of the source can be asked for; else it is iterated over."""
        return hasattr(self.source, "shape") and hasattr(self.source, "__getitem__")

    @property
    def is_spent(self) -> bool:
        """Whether the source can be read once only: it is an iterator."""
        return not self.is_array and isinstance(self.source, Iterator)

    def length(self, dims: int) -> int:
        """Rows of the source along the first axis of its tokens; an iterable whose ``total`` is not given is read for it.

        Args:
            dims: dimensions of an input, with batch and channels.
        """
        if self.is_array:
            return self.source.shape[self._axis(dims)]
        if self.total is not None:
            return self.total
        if self.is_spent:
            raise ValueError(
                "stream: expected total, the number of rows, of an iterator, which can be read once only; give it, or a "
                "source that can be iterated over again, such as a list or a DataLoader"
            )
        return sum(self._read(item, dims).data.shape[1] for item in undrawn(self.source))

    def _axis(self, dims: int) -> int:
        """The axis that is cut: after the batch, which a source may lack."""
        if len(self.source.shape) not in (dims, dims - 1):
            raise ValueError(
                f"stream: expected a source of {dims} dimensions, or {dims - 1} without the batch, got "
                f"{tuple(self.source.shape)}; reshape it"
            )
        return 1 if len(self.source.shape) == dims else 0

    def first(self, dims: int) -> Chunk | None:
        """A row of an array, by which to check the others; None of an iterable, whose chunks are checked as they come."""
        if not self.is_array:
            return None
        return next(replace(self, rows=1, progress=False).chunks(dims, self.length(dims)), None)

    def chunks(self, dims: int, total: int | None = None) -> Iterator[Chunk]:
        """All chunks, one after the other.

        Args:
            dims: dimensions of an input, with batch and channels.
            total: :meth:`length`, where it is known.

        Raises:
            ValueError: an iterable has another number of rows than ``total``.
        """
        total = self.length(dims) if total is None else total
        return _shown(self._chunks(dims, total), total) if self.progress else self._chunks(dims, total)

    def _chunks(self, dims: int, total: int) -> Iterator[Chunk]:
        if self.is_array:
            axis = self._axis(dims)
            step = self.rows or max(1, CHUNK * total // max(1, math.prod(self.source.shape)))
            for start in range(0, total, step):
                stop = min(start + step, total)
                piece = (slice(None),) * axis + (slice(start, stop),)
                chunk = self._prepared(self.source[piece], start, dims, stop)
                for array in (self.source, self.coords, self.mask):
                    unmap(array)
                yield chunk
            return
        start = 0
        for item in undrawn(self.source):
            chunk = self._read(item, dims, start)
            start += chunk.data.shape[1]
            yield chunk
        if start != total:
            raise ValueError(f"stream: expected a source of {total} rows in all, got {start}; give the right total")

    def _read(self, item: Any, dims: int, start: int = 0) -> Chunk:
        """A chunk that was iterated over: data, or data and positions."""
        data, coords = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        return self._prepared(data, start, dims, coords=coords)

    def _transformed(self, piece: Any) -> Any:
        """What ``transform`` makes of a piece: of a copy, since it may write to it."""
        if self.transform is None:
            return as_tensor(piece)
        return self.transform(piece.clone() if isinstance(piece, Tensor) else as_tensor(piece))

    def check_lengths(self, dims: int, total: int) -> None:
        """Raise ValueError unless ``coords`` and ``mask`` are of ``total`` rows. ``dims``: as of :meth:`length`."""
        for name, array, least in (("coords", self.coords, 2), ("mask", self.mask, dims - 2)):
            if array is None:
                continue
            shape = tuple(array.shape)
            rows = shape[0 if len(shape) == least else 1]
            if rows != total:
                raise ValueError(f"stream: expected {name} of {total} rows, as the source has, got {shape}")

    def _prepared(self, piece: Any, start: int, dims: int, stop: int | None = None, coords: Any = None) -> Chunk:
        data = self._transformed(piece)
        if not isinstance(data, Tensor):
            raise TypeError(f"stream: expected transform to return a tensor, got {type(data).__name__}")
        if data.dim() == dims - 1:
            data = data.unsqueeze(0)
        if data.dim() != dims:
            raise ValueError(f"stream: expected chunks of {dims} dimensions, got {tuple(data.shape)}; reshape them")
        stop = start + data.shape[1] if stop is None else stop
        if data.shape[1] != stop - start:
            raise ValueError(
                f"stream: expected transform to keep {stop - start} rows, got {tuple(data.shape)}; it may change channels "
                "and numbers only"
            )
        if self.coords is not None:
            coords = self.coords[start:stop] if len(self.coords.shape) == 2 else self.coords[:, start:stop]
        mask = None
        if self.mask is not None:
            mask = self.mask[:, start:stop] if len(self.mask.shape) == dims - 1 else self.mask[start:stop]
            mask = as_tensor(mask)
            mask = mask if mask.dim() == dims - 1 else mask.unsqueeze(0)
        return Chunk(data, None if coords is None else as_tensor(coords), mask, start)


def as_tensor(piece: Any) -> Tensor:
    """A tensor of what a slice of an array is: read now, where it is on a disk."""
    if isinstance(piece, Tensor):
        return piece
    import numpy as np

    return torch.from_numpy(np.array(piece))  # a copy, since what a file maps may not be writable


def undrawn(source: Iterable[Any]) -> Iterator[Any]:
    """What is iterated over, while torch's generator stays as it is: a DataLoader draws from it for every new iteration.

    What it draws is the same every time, so the backward reads what the forward read.
    """
    with torch.random.fork_rng(devices=[]):
        items = iter(source)
    while True:
        with torch.random.fork_rng(devices=[]):
            item = next(items, _END)
        if item is _END:
            return
        yield item


def unmap(array: Any) -> None:
    """Let go of the pages of a mapped file that have been read: they would count as this process' memory.

    Pages of one's own (mode ``"c"``) are kept, as nothing else has them.
    """
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and getattr(array, "mode", "c") != "c" and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _shown(chunks: Iterator[Chunk], total: int) -> Iterator[Chunk]:
    """The chunks, with a bar that says how many rows are read."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("attending", total=total)
        for chunk in chunks:
            yield chunk
            bar.advance(task, chunk.data.shape[1])


def stream(
    source: Any,
    *,
    rows: int | None = None,
    total: int | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    coords: Any = None,
    mask: Any = None,
    progress: bool = False,
) -> Stream:
    """An input that is read in chunks, in the place of a model's ``data``: memory is that of one chunk.

    The latents attend to one chunk after the other, and what they find is merged exactly; the backward reads the source
    again. A :class:`perceiver_fast.Perceiver` of depth d reads it d times a forward. Gradients reach parameters, not the
    source.

    Args:
        source: an array ``[B, n_1, .., n_A, F]`` with a shape and slices (numpy.memmap, zarr, h5py, a tensor), cut along
            n_1; without the batch it is of one element. Or something that can be iterated over again and again, with
            chunks of it in their order: tensors ``[B, rows, .., F]``, or pairs of data and positions. An iterator, which
            can be read once, does where nobody reads twice: in inference, for one cross-attention, with ``total``.
        rows: of a chunk, along n_1, for arrays. Default: 16 MiB of float32.
        total: rows of all chunks, n_1, for an iterable. Default: it is read once more, to count them.
        transform: called with every chunk, to make floating point of it, for instance
            ``lambda chunk: chunk.float() / 255``. Default: none.
        coords: positions ``[B, M, A]`` or ``[M, A]`` of points, an array with slices, read with the source. Default: a grid.
        mask: bool ``[B, n_1, .., n_A]``, or without the batch, an array with slices: True where a token may be attended
            to. Default: all.
        progress: show a bar, for every time that the source is read. Default: False.

    Returns:
        What :class:`perceiver_fast.Perceiver`, its variants (but for experimental), :class:`perceiver_fast.PerceiverIO` and
        (as one modality's data) :class:`perceiver_fast.MultimodalPerceiver` take as data. Their ``mask`` and ``coords``
        are given here. With :func:`perceiver_fast.distributed.shard`, every process streams its own part.

    Raises:
        TypeError, ValueError: a wrong type or number; the message says expected, got and what to do.

    Example:
        >>> import numpy, torch, perceiver_fast as pf
        >>> image = numpy.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype="uint8")  # or numpy.memmap
        >>> model = pf.Perceiver(num_freq_bands=6, depth=1, max_freq=10.0, num_latents=8, latent_dim=16, num_classes=5)
        >>> chunks = pf.stream(image, rows=64, transform=lambda chunk: chunk.float() / 255)
        >>> whole = torch.from_numpy(image).float().unsqueeze(0) / 255
        >>> bool((model(chunks) - model(whole)).abs().max() < 1e-5)
        True
    """
    found = Stream(source, rows, total, transform, coords, mask, progress)
    if not found.is_array and not isinstance(source, Iterable):
        raise TypeError(
            f"stream: expected an array with a shape and slices, or an iterable of chunks, got {type(source).__name__}"
        )
    for name, value in (("rows", rows), ("total", total)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"stream: expected {name} of at least 1, got {value!r}")
    if found.is_array:
        return replace(found, points=coords is not None)
    if rows is not None:
        raise ValueError("stream: expected rows for an array alone, got an iterable, whose chunks are what they are")
    chunks = undrawn(source)
    first = next(chunks, None)
    if first is None:
        raise ValueError("stream: expected at least one chunk, got an iterable without any")
    pair = isinstance(first, (tuple, list)) and len(first) == 2
    shape = tuple(found._transformed(first[0] if pair else first).shape)
    if found.is_spent:  # an iterator, which cannot be asked for its first chunk again
        found = replace(found, source=chain([first], source))
    return replace(found, points=pair or coords is not None, first_shape=shape)


class TokenStream:
    """Tokens that are read and described in chunks, for layers.

    Args:
        source: what is read.
        dims: dimensions of an input, with batch and channels.
        describe: a chunk and its place, and ``parameters``, to a description of its tokens and their mask.
        parameters: tensors that tokens are made of, beside what is read, and whose gradients are wanted.
        place: of the source's rows among those of all processes.
        batch, channels: B and C.
        device: where latents are.
        length: rows of the source.
    """

    kind = "streamed tokens"
    shard: Shard | None = None  # see Tokens.shard
    first = 0  # see Tokens.first
    total = 0  # see Tokens.total

    def __init__(
        self,
        source: Stream,
        dims: int,
        describe: Callable[..., tuple[Tokens, Tensor | None]],
        parameters: tuple[Tensor, ...],
        place: Place,
        batch: int,
        channels: int,
        device: torch.device,
        length: int,
    ):
        self.source, self.dims, self._describe, self.parameters, self.place = source, dims, describe, parameters, place
        self.batch, self.channels, self.device = batch, channels, device
        self.length, self.count = length, length * source.across(dims)

    def chunks(self, parameters: tuple[Tensor, ...]) -> Iterator[tuple[Tokens, Tensor | None]]:
        """Descriptions of all chunks and their masks, computed from ``parameters`` in the places of those given."""
        count = 0
        for chunk in self.source.chunks(self.dims, self.length):
            tokens, mask = self._describe(chunk, self.place, *parameters)
            if tokens.batch != self.batch:
                raise ValueError(f"stream: expected chunks for a batch of {self.batch}, got {tuple(chunk.data.shape)}")
            tokens.first = self.first + count
            count += tokens.count
            yield tokens, mask

    def sources(self) -> tuple[Tensor, ...]:
        """The tensors that the tokens are made of, beside what is read."""
        return self.parameters

    def learns(self) -> bool:
        """Whether a gradient flows to any of :meth:`sources`."""
        return any(source.requires_grad for source in self.parameters)

    def tensor(self) -> Tensor:
        """There is none: that is what streams are for.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "stream: expected cross-attention layers whose tokens' side is plain, got one that has to be called on the whole "
            "tensor of tokens (hooks, adapters or replaced layers: pf.explain says which); give the model a tensor, or merge "
            "the adapters"
        )


def is_read(tokens: object) -> bool:
    """Whether tokens are read when they are attended to: a stream, or groups with one."""
    return isinstance(tokens, TokenStream) or any(
        isinstance(group, TokenStream) for group in getattr(tokens, "groups", ())
    )
