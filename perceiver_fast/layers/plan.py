"""Which way a cross-attention layer takes: the planner.

There are three ways to attend N queries of d channels (H heads) to M tokens of C channels:

    grid       tokens ``[x ; e_1(i_1) ; ..]`` on a grid, never built: F raw channels, one table entry per query and index
    absorbed   the projections move into the queries and results, and attention runs over the C channels themselves
    projected  keys and values are built, and attention runs over d channels

The work of each is counted in multiply-adds and in bytes that pass through memory, and the least is taken among those
that a backend can run without an N x M matrix. Counts are of the forward; the backward's are about 2.5 times as large on
every way, so the order is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from perceiver_fast.backends import Choice, forced_backend, require
from perceiver_fast.ops.cross_attention import CrossAttentionCall, choose_cross_attention
from perceiver_fast.ops.grid_attention import GridAttentionCall, choose_grid_attention
from perceiver_fast.ops.library import autocast_dtype, half_dtype
from perceiver_fast.tokens import DenseTokens, GridTokens, Tokens
from perceiver_fast.tracing import known

PAIR = 12  # multiply-adds in whose time a query-token pair's exponential and sums are done: 11 to 14 instructions
BYTE = 4  # multiply-adds in whose time a byte passes through memory: 4 to 10 on two to sixteen cores
FLOAT = 4  # bytes
SMALL = 2e7  # multiply-adds, a fraction of a millisecond: below it the grid's way is taken, whose error is the least


@dataclass(frozen=True)
class Work:
    """Counted work of one forward of one batch element: multiply-adds, and bytes through memory."""

    operations: float
    bytes: float

    @property
    def cost(self) -> float:
        """Both in multiply-adds: what ways are compared by."""
        return self.operations + BYTE * self.bytes

    def __str__(self) -> str:
        return f"{self.operations / 1e9:.2f} G multiply-adds, {self.bytes / 2**20:.0f} MiB"


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
        rejected = {}
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
    """What the plan depends on beside the tokens: N, H, d and the mode."""

    queries: int
    heads: int
    dim_head: int
    dropout: float = 0.0
    inverted: bool = False
    lse: bool = False
    queries_contribute_kv: bool = False
    masked: bool = False


def count_work(path: str, tokens: Tokens, layer: Layer) -> Work:
    """The forward's work on one way; raises KeyError for a way that the tokens do not offer."""
    rows, width, count = known(layer.queries) * layer.heads, 2 * layer.heads * layer.dim_head, known(tokens.count)
    pairs = rows * count
    if path == "grid":
        length = tokens.features + sum(map(known, tokens.sizes))
        operations = pairs * (2 * tokens.features + len(tokens.sizes) + PAIR) + 2 * rows * layer.dim_head * length
        # The tables of queries and of results, written and read; and the tokens.
        return Work(operations, FLOAT * (4 * rows * length + count * (tokens.features + 2)))
    if path == "absorbed":
        channels = tokens.channels
        operations = pairs * (2 * channels + PAIR) + 2 * rows * layer.dim_head * channels
        return Work(operations, FLOAT * 3 * count * channels)
    if path == "projected":
        operations = tokens.projection_operations(width) + pairs * (2 * layer.dim_head + PAIR)
        return Work(operations, FLOAT * count * (tokens.stored_channels + 2 * width))
    raise KeyError(path)


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
    if isinstance(tokens, DenseTokens) and not layer.queries_contribute_kv:
        ways["absorbed"] = _dense_choice("absorbed", tokens, layer)
    require(*ways.values(), grid)
    work = {path: count_work(path, tokens, layer) for path, choice in ways.items() if choice.backend is not None}
    if "grid" in work and (forced_backend() != "auto" or work["grid"].cost < SMALL):
        path = "grid"
    else:
        path = next(iter(work))
        for other in work:  # min() with a key does not trace
            path = other if work[other].cost < work[path].cost else path
    return Plan(path, ways[path], work, tokens.uses(path), grid)


def _dense_choice(path: str, tokens: Tokens, layer: Layer) -> Choice:
    dtype, heads, queries, channels = tokens.compute, layer.heads, layer.queries, layer.dim_head
    if path == "projected":
        dtype = autocast_dtype(tokens.device) or dtype
    else:  # heads are queries; a channel of ones rides along where weights have to be counted
        dtype = half_dtype(tokens.device, tokens.context.dtype) or dtype
        channels = tokens.channels + (layer.inverted or layer.dropout > 0)
        if not layer.inverted:
            heads, queries = 1, heads * queries
    return choose_cross_attention(
        CrossAttentionCall(
            dtype, tokens.device, layer.dropout, layer.inverted, layer.lse, layer.masked,
            tokens.batch, heads, queries, channels, channels,
        )
    )  # fmt: skip


def _grid_choice(tokens: Tokens, layer: Layer) -> Choice:
    if layer.queries_contribute_kv:
        return Choice("grid_attention", None, {"any": ["queries join the keys and values"]})
    if not isinstance(tokens, GridTokens):
        return Choice("grid_attention", None, {"any": [f"{tokens.kind} are no grid"]})
    choice = choose_grid_attention(
        GridAttentionCall(tokens.compute, tokens.device, tokens.sizes, tokens.features, layer.inverted)
    )
    if forced_backend() != "auto" or choice.backend is None:
        return choice
    if choice.backend == "reference":
        why = "it forms the N x M logits, which attention on built keys and values need not"
        return Choice(choice.op, None, choice.rejected | {choice.backend: [why]})
    return choice
