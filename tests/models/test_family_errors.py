"""What the models of the family say about bad input: expected, got, what to do."""

import pytest
import torch

import perceiver_fast as pf
from perceiver_fast import experimental, gated, mixed_latents

GRID = dict(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8, num_classes=3)
IO = dict(depth=1, dim=9, queries_dim=7, logits_dim=4, num_latents=4, latent_dim=8)
DATA = torch.randn(2, 11, 9)


@pytest.mark.parametrize("model", [gated.Perceiver, mixed_latents.Perceiver, experimental.Perceiver])
@pytest.mark.parametrize(
    "data, mask, error, words",
    [
        (torch.randn(1, 5, 3), None, ValueError, r"4 dimensions \[batch, n_1, n_2, 3\].*got 3: \(1, 5, 3\)"),
        (torch.randn(1, 3, 5, 6), None, ValueError, "3 channels last.*got 6.*permute"),
        (torch.ones(1, 5, 6, 3, dtype=torch.uint8), None, TypeError, "floating-point.*uint8.*float"),
        (torch.randn(1, 5, 6, 3).double(), None, TypeError, "dtype torch.float32.*float64.*convert"),
        (torch.randn(1, 5, 6, 3), torch.ones(1, 29, dtype=torch.bool), ValueError, r"\(1, 30\) or \(1, 5, 6\).*29"),
        (torch.randn(1, 5, 6, 3), torch.ones(1, 30), TypeError, r"bool mask.*float32.*mask\.bool"),
    ],
)
def test_grids(model, data, mask, error, words):
    with pytest.raises(error, match=words):
        model(**GRID)(data, mask=mask)


@pytest.mark.parametrize(
    "inputs, error, words",
    [
        (dict(data=[1.0]), TypeError, "data to be a torch.Tensor, got list"),
        (dict(data=DATA[0]), ValueError, r"data of 3 dimensions \[batch, n_1, 9\], got 2.*flatten the positions"),
        (dict(data=DATA[:, None]), ValueError, "got 4.*flatten the positions"),
        (dict(data=DATA[..., :5]), ValueError, "9 channels last.*got 5.*dim=5"),
        (dict(data=DATA[:, :0]), ValueError, "at least one position"),
        (dict(data=DATA.double()), TypeError, "data of dtype torch.float32.*float64"),
        (dict(data=DATA.int()), TypeError, "real floating-point data, got torch.int32"),
        (dict(data=DATA.to("meta")), ValueError, "data on cpu.*got meta"),
        (dict(data=DATA, mask=torch.ones(2, 12) > 0), ValueError, r"mask of shape \(2, 11\), got \(2, 12\)"),
        (dict(data=DATA, mask=torch.ones(2, 11)), TypeError, "bool mask"),
        (dict(data=DATA, queries=[1.0]), TypeError, "queries to be a torch.Tensor, got list"),
        (dict(data=DATA, queries=torch.randn(7)), ValueError, r"2 or 3 dimensions \[Q, 7\] or \[batch, Q, 7\], got 1"),
        (dict(data=DATA, queries=torch.randn(2, 3, 4, 7)), ValueError, "got 4.*flatten"),
        (dict(data=DATA, queries=torch.randn(3, 8)), ValueError, "queries with 7 channels last.*queries_dim=8"),
        (dict(data=DATA, queries=torch.randn(3, 5, 7)), ValueError, r"batch of 2.*got \(3, 5, 7\).*2-dimensional"),
        (dict(data=DATA, queries=torch.randn(5, 7).double()), TypeError, "queries of dtype torch.float32"),
        (dict(data=DATA, queries=torch.randn(5, 7, device="meta")), ValueError, "queries on cpu"),
    ],
)
def test_io(inputs, error, words):
    with pytest.raises(error, match=words):
        pf.PerceiverIO(**IO)(**inputs)


@pytest.mark.parametrize(
    "ids, mask, error, words",
    [
        ([1], None, TypeError, "x to be a torch.Tensor, got list"),
        (torch.randn(2, 5), None, TypeError, r"token ids of dtype torch.int64 or int32, got torch.float32.*x\.long"),
        (torch.ones(5).long(), None, ValueError, r"2 dimensions \[batch, n\].*got \(5,\).*batch dimension"),
        (torch.ones(2, 0).long(), None, ValueError, r"got \(2, 0\)"),
        (torch.ones(2, 9).long(), None, ValueError, "at most 8 tokens.*got 9.*max_seq_len=9"),
        (torch.tensor([[1, 20]]), None, IndexError, r"in 0\.\.19 \(num_tokens=20\), got 1\.\.20"),
        (torch.tensor([[-1, 3]]), None, IndexError, r"got -1\.\.3"),
        (torch.ones(2, 5, device="meta").long(), None, ValueError, "x on cpu.*got meta"),
        (torch.ones(2, 5).long(), torch.ones(2, 6) > 0, ValueError, r"mask of shape \(2, 5\), got \(2, 6\)"),
        (torch.ones(2, 5).long(), torch.ones(2, 5), TypeError, "bool mask"),
    ],
)
def test_lm(ids, mask, error, words):
    model = pf.PerceiverLM(dim=6, num_tokens=20, max_seq_len=8, depth=1, num_latents=4, latent_dim=8)
    with pytest.raises(error, match=words):
        model(ids, mask=mask)


@pytest.mark.parametrize(
    "inputs, error, words",
    [
        (dict(x=torch.randn(2, 4, 8)), ValueError, "context.*to attend to, got None.*has_cross_attn=False"),
        (dict(x=torch.randn(2, 4, 7), context=DATA), ValueError, "x with 8 channels last.*got 7"),
        (dict(x=torch.randn(2, 4, 8), context=DATA[0]), ValueError, "context of 3 dimensions.*got 2"),
        (dict(x=torch.randn(2, 4, 8), context=DATA[..., :3]), ValueError, "context_dim=3"),
        (dict(x=torch.randn(3, 4, 8), context=DATA), ValueError, r"batch of 2.*got \(3, 4, 8\)"),
        (dict(x=torch.randn(2, 4, 8), context=DATA.double()), TypeError, "context of dtype torch.float32"),
        (dict(x=torch.randn(2, 4, 8), context=DATA, mask=torch.ones(2, 11)), TypeError, "bool mask"),
    ],
)
def test_block(inputs, error, words):
    with pytest.raises(error, match=words):
        pf.PerceiverBlock(dim=8, context_dim=9)(**inputs)
