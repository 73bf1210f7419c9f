"""What processes that share a model's tokens send each other; :mod:`perceiver_fast.distributed` is the way in."""
