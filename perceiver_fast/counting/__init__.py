"""What a forward does, counted: its operators, by layer, beside perceiver-pytorch's. :func:`perceiver_fast.explain` is its face."""
