"""Models on several processes: ``pf.distributed.shard(model)`` shares the tokens out, and nothing else changes."""

from perceiver_fast.distributed.sharding import shard as shard
from perceiver_fast.distributed.sharding import unshard as unshard

__all__ = ["shard", "unshard"]
