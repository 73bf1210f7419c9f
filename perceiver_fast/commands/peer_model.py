"""Where perceiver-pytorch's model of a geometry was built; :mod:`perceiver_fast.insight.peer` does it now."""

from perceiver_fast.insight.peer import peer_model  # noqa: F401
