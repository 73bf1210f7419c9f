"""transformers' own common model tests, on its Perceiver heads as they are and accelerated."""
