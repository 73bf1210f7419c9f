"""perceiver_fast: Perceiver models whose tokens are described, never built.

>>> import perceiver_fast as pf
>>> model = pf.Perceiver(num_freq_bands=6, depth=1, max_freq=10.0, num_latents=8, latent_dim=16)
"""

from typing import TYPE_CHECKING

from perceiver_fast import installation
from perceiver_fast.version import __version__ as __version__

if TYPE_CHECKING or not installation.deferred():
    from perceiver_fast import backends, distributed, experimental, gated, mixed_latents, ops, reference
    from perceiver_fast.adapters import Report, accelerate, restore
    from perceiver_fast.backends import BackendError, use_backend
    from perceiver_fast.extension import shared_library
    from perceiver_fast.graph import graph
    from perceiver_fast.insight.attention_map import attention_map, contrasting_latents
    from perceiver_fast.insight.explain import explain
    from perceiver_fast.insight.plot import plot_attention_map
    from perceiver_fast.layers import PerceiverBlock
    from perceiver_fast.models import Modality, MultimodalPerceiver, Perceiver, PerceiverIO, PerceiverLM
    from perceiver_fast.ops.linear_choice import use_linear
    from perceiver_fast.ranges import ranges
    from perceiver_fast.tokens import grid_queries, grid_tokens, point_queries, point_tokens, stream
else:  # the command line reads its arguments before torch is imported
    __getattr__ = installation.attribute

__all__ = [
    "BackendError",
    "Modality",
    "MultimodalPerceiver",
    "Perceiver",
    "PerceiverBlock",
    "PerceiverIO",
    "PerceiverLM",
    "Report",
    "accelerate",
    "attention_map",
    "backends",
    "contrasting_latents",
    "distributed",
    "experimental",
    "explain",
    "gated",
    "graph",
    "grid_queries",
    "grid_tokens",
    "mixed_latents",
    "ops",
    "plot_attention_map",
    "point_queries",
    "point_tokens",
    "ranges",
    "reference",
    "restore",
    "shared_library",
    "stream",
    "use_backend",
    "use_linear",
]
