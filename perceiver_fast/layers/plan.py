"""Which way a cross-attention layer takes: the planner.

There are three ways to attend N queries of d channels (H heads) to M tokens of C channels:

    grid       tokens ``[x ; e_1(i_1) ; ..]`` on a grid, never built: F raw channels, one table entry per query and index
    absorbed   the projections move into the queries and results, and attention runs over the C channels themselves; over
               the fewer channels of a description where a linear layer makes tokens of them
    projected  keys and values are built, and attention runs over d channels

The work of each is counted from shapes, as ops declare theirs and as explain counts operators (ops/work.py), and the
least is taken among those that a backend can run without an N x M matrix. It is the forward's work; the backward's is
about 2.5 times as much on every way, so the order is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

from perceiver_fast.backends import Choice, forced_backend, require
from perceiver_fast.ops.cross_attention import CROSS_ATTENTION, CrossAttentionCall
from perceiver_fast.ops.grid_attention import GRID_ATTENTION, GridAttentionCall, grid_attention_work
from perceiver_fast.ops.library import half_dtype, projected_dtype
from perceiver_fast.ops.work import Work, attention_work
from perceiver_fast.tokens import GridTokens, Tokens
from perceiver_fast.tracing import known

FLOAT = 4  # bytes
# Multiply-adds an element of the batch, a fraction of a millisecond: below, the grid's way is taken, whose error is least.
SMALL = 2e7


@dataclass(frozen=True)
class Plan:
    """The way taken, the op and backend that run it, and the work counted for every way that was open.

    Args:
        path: the way.
        taken: the op and backend on that way, and why other backends were passed over.
        work: of every way that was open.
        uses: ops beside attention.
        grid: what would run the grid's way, and why nothing can.
    """

    path: str
    taken: Choice
    work: dict[str, Work] = field(default_factory=dict)
    uses: tuple[Choice, ...] = ()
    grid: Choice | None = None

    @property
    def choice(self) -> Choice:
        """The op and backend, and why other ways and backends were passed over: put into words when somebody asks."""
        rejected: dict[str, list[str]] = {}
        if self.grid is not None and self.path != "grid":
            rejected |= {f"grid_attention[{name}]": why for name, why in self.grid.rejected.items()}
        for path, work in self.work.items():
            if path != self.path:
                more = work.cost > self.work[self.path].cost
                rejected[path] = [f"{'more work' if more else 'small: the grid has the least error'}: {work}"]
        return Choice(self.taken.op, self.taken.backend, rejected | self.taken.rejected)

    def __str__(self) -> str:
        text = f"{self.path}: {self.taken.op} on {self.taken.backend}"
        return f"{text}, {self.work[self.path]}" if self.path in self.work else text


@dataclass(frozen=True)
class Layer:
    """What the plan depends on beside the tokens: N, H, d (of values, where it is another) and the mode."""

    queries: int
    heads: int
    dim_head: int
    dropout: float = 0.0
    inverted: bool = False
    lse: bool = False
    queries_contribute_kv: bool = False
    masked: bool = False
    dim_value: int | None = None

    @property
    def dims(self) -> int:
        """Channels of a head's keys and values together."""
        return self.dim_head + (self.dim_head if self.dim_value is None else self.dim_value)


def count_work(path: str, tokens: Tokens, layer: Layer) -> Work:
    """The work of one forward on one way, beyond what all ways share: the projections of latents and results.

    Raises:
        KeyError: the tokens do not offer this way.
    """
    return _WAYS[path](tokens, layer, known(tokens.batch), known(layer.queries) * layer.heads, known(tokens.count))


def _grid_work(tokens: GridTokens, layer: Layer, batch: int, rows: int, count: int) -> Work:
    sizes = tuple(known(size, len(tokens.sizes)) for size in tokens.sizes)
    # Inverted, there is one more channel, with the keys' bias; and there is one in any case.
    return grid_work(batch, rows, sizes, max(1, tokens.elements + layer.inverted), layer.dims, layer.inverted)


def grid_work(batch: int, rows: int, sizes: tuple[int, ...], features: int, dims: int, inverted: bool = False) -> Work:
    """The work on the grid's way, of ``rows`` queries (heads folded in) of ``dims`` channels of keys and values together."""
    length, count = features + sum(sizes), prod(sizes)
    attention = grid_attention_work((batch, rows, length), (batch, *sizes, features), inverted)
    # The tables of queries and of results are products, written and read; and the tokens are read.
    tables = batch * rows * dims * length
    return attention + Work(tables, bytes=FLOAT * batch * (4 * rows * length + count * (features + 2)))


def _absorbed_work(tokens: Tokens, layer: Layer, batch: int, rows: int, count: int) -> Work:
    # A channel of ones, where weights are counted.
    channels = (tokens.absorbed_channels or 0) + (layer.inverted or layer.dropout > 0)
    wide, many = (batch, rows, channels), (batch, count, channels)
    products = batch * rows * layer.dims * channels + int(batch * tokens.absorbed_operations())
    return attention_work(wide, many, many, layer.inverted) + Work(products, bytes=FLOAT * 3 * prod(many))


def _projected_work(tokens: Tokens, layer: Layer, batch: int, rows: int, count: int) -> Work:
    q, k = (batch, rows, layer.dim_head), (batch, count, layer.dim_head)
    v = (batch, count, layer.dims - layer.dim_head)
    width = layer.heads * layer.dims
    projection = int(batch * tokens.projection_operations(width))
    # The tokens that exist are read; keys and values are written and read.
    return attention_work(q, k, v, layer.inverted) + Work(
        projection, bytes=FLOAT * batch * count * (tokens.stored_channels + 2 * width)
    )


_WAYS: dict[str, Callable[..., Work]] = {"grid": _grid_work, "absorbed": _absorbed_work, "projected": _projected_work}


def plan_cross_attention(tokens: Tokens, layer: Layer) -> Plan:
    """The way with the least counted work among those that can run.

    A forced backend that can run the grid decides for it, as it does where a backend has but one way.

    Raises:
        perceiver_fast.backends.BackendError: a forced backend cannot run any way.
    """
    grid = _grid_choice(tokens, layer)
    ways = {"projected": _dense_choice("projected", tokens, layer)}
    if grid.backend is not None:
        ways["grid"] = grid
    if tokens.absorbed_channels is not None and not layer.queries_contribute_kv:
        ways["absorbed"] = _dense_choice("absorbed", tokens, layer)
    require(*ways.values(), grid)
    work = {path: count_work(path, tokens, layer) for path, choice in ways.items() if choice.backend is not None}
    small = SMALL * known(tokens.batch)
    if "grid" in work and (forced_backend() != "auto" or work["grid"].cost < small):
        path = "grid"
    else:
        path = next(iter(work))
        for other in work:  # min() with a key does not trace
            path = other if work[other].cost < work[path].cost else path
    return Plan(path, ways[path], work, tokens.uses(path, layer.heads * layer.dims), grid)


def _dense_choice(path: str, tokens: Tokens, layer: Layer) -> Choice:
    heads, queries, channels, values = layer.heads, layer.queries, layer.dim_head, layer.dims - layer.dim_head
    if path == "projected":
        dtype = projected_dtype(tokens.feat)
    else:  # heads are queries; a channel of ones rides along where weights have to be counted
        dtype = half_dtype(tokens.device, tokens.feat.dtype) or tokens.compute
        channels = values = (tokens.absorbed_channels or 0) + (layer.inverted or layer.dropout > 0)
        if not layer.inverted:
            heads, queries = 1, heads * queries
    return CROSS_ATTENTION.choose(
        CrossAttentionCall(
            dtype, tokens.device, layer.dropout, layer.inverted, layer.lse, layer.masked,
            tokens.batch, heads, queries, channels, values,
        )
    )  # fmt: skip


def _grid_choice(tokens: Tokens, layer: Layer) -> Choice:
    if layer.queries_contribute_kv:
        return Choice("grid_attention", None, {"any": ["queries join the keys and values"]})
    if not isinstance(tokens, GridTokens):
        return Choice("grid_attention", None, {"any": [f"{tokens.kind} are no grid"]})
    choice = GRID_ATTENTION.choose(
        GridAttentionCall(
            tokens.compute, tokens.device, tokens.sizes, max(1, tokens.elements), layer.inverted,
            half_dtype(tokens.device, tokens.dtype), layer.dropout,
        )
    )  # fmt: skip
    if forced_backend() != "auto" or choice.backend is None:
        return choice
    if choice.backend == "reference":
        why = "it forms the N x M logits, which attention on built keys and values need not"
        return Choice(choice.op, None, choice.rejected | {choice.backend: [why]})
    return choice
