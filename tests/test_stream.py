"""Inputs that are read in chunks: the numbers of the whole tensor, forward and backward."""

import numpy as np
import pytest
import torch

import perceiver_fast as pf
from perceiver_fast import experimental, gated, mixed_latents
from perceiver_fast.tokens.fourier import evenly_spaced
from perceiver_fast.tokens.streams import _shown

SMALL = dict(num_latents=5, latent_dim=12, latent_heads=2, latent_dim_head=5, cross_dim_head=6)
IMAGE = dict(SMALL, num_freq_bands=3, max_freq=8.0, depth=2, num_classes=3)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(model, call):
    """Output and gradients of a call; the same random numbers are dropped in every one."""
    model.zero_grad()
    torch.manual_seed(1)
    out = call()
    (out * numbers(*out.shape, seed=3)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same(model, streamed, whole):
    """Both calls give the same output and gradients."""
    (out, grads), (expected, wanted) = gradients(model, streamed), gradients(model, whole)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-11, atol=1e-12, msg=lambda text: f"{name}: {text}")
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(streamed(), whole(), rtol=1e-12, atol=1e-12)
        model.train()


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(inverted_cross_attn=True),
        dict(attn_dropout=0.3, ff_dropout=0.2),
        dict(inverted_cross_attn=True, attn_dropout=0.3, cross_heads=2),
        dict(checkpoint=True, weight_tie_layers=True, cross_heads=2),
        dict(num_freq_bands=0),
        dict(depth=1, attn_residual=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_images(options, masked):
    """A file on a disk, in rows, without a dimension for the batch."""
    model = pf.Perceiver(**(IMAGE | options)).double()
    image = numbers(11, 6, 3)
    mask = numbers(11, 6, seed=5) > 0 if masked else None
    source = pf.stream(image.numpy(), rows=4, mask=None if mask is None else mask.numpy())
    check_same(model, lambda: model(source), lambda: model(image[None], mask=None if mask is None else mask[None]))


def test_a_batch_whose_first_element_is_all_masked():
    model, images, mask = pf.Perceiver(**IMAGE).double(), numbers(2, 11, 6, 3), torch.ones(2, 11, 6, dtype=torch.bool)
    mask[0] = False
    mask[1, :5] = False  # whole chunks are
    source = pf.stream(images, rows=3, mask=mask)
    check_same(model, lambda: model(source), lambda: model(images, mask=mask))


@pytest.mark.parametrize("of", [gated, mixed_latents])
def test_variants(of):
    model, images = of.Perceiver(**IMAGE).double(), numbers(2, 11, 6, 3)
    check_same(model, lambda: model(pf.stream(images, rows=3)), lambda: model(images))


def test_points_from_arrays_and_from_pairs():
    model, data, coords = pf.Perceiver(**IMAGE).double(), numbers(2, 40, 3), numbers(2, 40, 2, seed=2).tanh()
    mask = numbers(2, 40, seed=5) > 0

    def whole():
        return model(data, mask=mask, coords=coords)

    check_same(model, lambda: model(pf.stream(data, rows=7, coords=coords, mask=mask)), whole)
    pairs = [(data[:, a : a + 9], coords[:, a : a + 9]) for a in range(0, 40, 9)]
    check_same(model, lambda: model(pf.stream(pairs, mask=mask)), whole)
    shared = coords[0]
    check_same(
        model,
        lambda: model(pf.stream(data, rows=7, coords=shared.numpy())),
        lambda: model(data, coords=shared),
    )


def test_chunks_of_an_iterable():
    model, images = pf.Perceiver(**IMAGE).double(), numbers(2, 11, 6, 3)
    chunks = list(images.split([3, 1, 7], 1))
    loader = torch.utils.data.DataLoader(chunks, batch_size=None)
    for source in (pf.stream(chunks), pf.stream(chunks, total=11), pf.stream(loader)):
        check_same(model, lambda source=source: model(source), lambda: model(images))


def test_an_iterator_does_where_nobody_reads_twice():
    once, twice = pf.Perceiver(**(IMAGE | dict(depth=1))).double(), pf.Perceiver(**IMAGE).double()
    images = numbers(2, 11, 6, 3)

    def chunks():
        yield from images.split([3, 1, 7], 1)

    with torch.no_grad():
        torch.testing.assert_close(once(pf.stream(chunks(), total=11)), once(images))
        with pytest.raises(ValueError, match="expected total"):
            once(pf.stream(chunks()))
        with pytest.raises(ValueError, match="11 rows in all, got 0"):
            twice(pf.stream(chunks(), total=11))
    with pytest.raises(RuntimeError, match="for the backward"):
        once(pf.stream(chunks(), total=11))


def test_dense_tokens_and_queries_of_perceiver_io():
    model = pf.PerceiverIO(dim=9, queries_dim=7, logits_dim=3, depth=1, **SMALL).double()
    data, queries, mask = numbers(2, 30, 9), numbers(2, 8, 7, seed=2), numbers(2, 30, seed=5) > 0
    source = pf.stream(data, rows=8, mask=mask)
    check_same(model, lambda: model(source, queries=queries), lambda: model(data, mask=mask, queries=queries))


def test_a_modality():
    """The gradient of its embedding comes from all chunks."""
    modalities = [pf.Modality("video", 3, 3, 1, 4.0), pf.Modality("dots", 2, 2, 1, 4.0)]
    model = pf.MultimodalPerceiver(modalities, depth=2, num_classes=3, attn_dropout=0.2, **SMALL).double()
    video, dots, coords = numbers(2, 7, 3, 2, 3), numbers(2, 20, 2), numbers(20, 2, seed=4).tanh()
    streams = {"video": pf.stream(video, rows=2), "dots": pf.stream(dots, rows=6, coords=coords)}
    check_same(model, lambda: model(streams), lambda: model({"video": video, "dots": (dots, coords)}))
    mixed = {"video": pf.stream(video, rows=2), "dots": (dots, coords)}
    check_same(model, lambda: model(mixed), lambda: model({"video": video, "dots": (dots, coords)}))


def test_long_signals_and_their_default_rows(tmp_path):
    """One axis longer than its tables; and of a file, chunks of a fixed size."""
    model = pf.Perceiver(**(IMAGE | dict(input_axis=1, input_channels=1))).double()
    signal = numbers(1, 3000, 1)
    check_same(model, lambda: model(pf.stream(signal, rows=700)), lambda: model(signal))
    path = tmp_path / "signal"
    mapped = np.memmap(path, "uint8", "w+", shape=(1, 3000, 1))
    mapped[:] = 7
    source = pf.stream(mapped, transform=lambda chunk: chunk.double() / 255)
    assert len(list(source.chunks(3))) == 1
    torch.testing.assert_close(model(source), model(torch.full((1, 3000, 1), 7.0, dtype=torch.float64) / 255))


def test_progress(monkeypatch):
    """A bar of all rows, for every time that they are read."""
    shown = []
    monkeypatch.setattr("perceiver_fast.tokens.streams._shown", lambda chunks, total: shown.append(total) or chunks)
    model = pf.Perceiver(**IMAGE).double()
    model(pf.stream(numbers(1, 11, 6, 3), rows=3, progress=True)).sum().backward()
    assert shown == [11] * 4  # two cross-attentions, forward and backward
    list(_shown(pf.stream(numbers(1, 11, 6, 3), rows=3).chunks(4), 11))  # what the bar does with chunks


def test_how_often_a_source_is_read():
    read = []

    class Chunks:
        def __iter__(self):
            read.append(0)
            yield from numbers(1, 11, 6, 3).split(4, 1)

    model = pf.Perceiver(**IMAGE).double()
    source = pf.stream(Chunks(), total=11)
    read.clear()
    out = model(source)
    assert len(read) == 2  # once a cross-attention
    out.sum().backward()
    assert len(read) == 4
    read.clear()
    with torch.no_grad():
        model(pf.stream(Chunks()))
    assert len(read) == 4  # its first chunk, and once more to count rows


def test_the_mode_of_the_forward_is_that_of_the_backward():
    """The backward reads the source again, whatever the model's mode is by then, and draws nothing."""
    model, images, results = (
        pf.Perceiver(**(IMAGE | dict(attn_dropout=0.4, ff_dropout=0.2))).double(),
        numbers(2, 11, 6, 3),
        [],
    )
    loader = torch.utils.data.DataLoader(list(images.split(4, 1)), batch_size=None)
    for source in (images, pf.stream(images, rows=3), pf.stream(loader)):
        model.zero_grad()
        torch.manual_seed(1)
        out = model.train()(source)
        drawn = torch.rand(1)
        model.eval()
        out.square().sum().backward()
        results.append([out.detach(), drawn, *(p.grad.clone() for p in model.parameters())])
    for expected, *others in zip(*results):
        for other in others:
            torch.testing.assert_close(other, expected, rtol=1e-11, atol=1e-12)


def test_a_transform_may_write_to_its_chunk():
    model, images = pf.Perceiver(**IMAGE).double(), numbers(1, 11, 6, 3)
    before = images.clone()
    torch.testing.assert_close(
        model(pf.stream(images, rows=4, transform=lambda chunk: chunk.div_(2))), model(images / 2)
    )
    assert torch.equal(images, before)


def test_rows_of_a_long_signal_are_described_alone(monkeypatch):
    """A chunk costs what it holds, not what the whole signal does."""
    sizes = []
    whole = evenly_spaced
    monkeypatch.setattr(
        "perceiver_fast.tokens.describe.evenly_spaced",
        lambda *place: sizes.append(len(whole(*place))) or whole(*place),
    )
    model = pf.Perceiver(**(IMAGE | dict(input_axis=1, input_channels=1, depth=1))).double()
    with torch.no_grad():
        model(pf.stream(numbers(1, 6000, 1), rows=1500))
    assert sizes == [1500] * 4


def test_compiled():
    model = pf.Perceiver(**(IMAGE | dict(depth=1))).double()
    images = numbers(1, 11, 6, 3)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(pf.stream(images, rows=3)), model(images))


@pytest.mark.parametrize(
    "wrong, match",
    [
        (lambda model: pf.stream(3), "an array with a shape and slices"),
        (lambda model: pf.stream([]), "at least one chunk"),
        (lambda model: pf.stream(numbers(1, 4, 6, 3), rows=0), "rows of at least 1"),
        (lambda model: pf.stream([numbers(1, 4, 6, 3)], rows=2), "rows for an array alone"),
        (lambda model: model(pf.stream(numbers(2, 2, 4, 6, 3))), "source of 4 dimensions, or 3 without the batch"),
        (lambda model: model(pf.stream(numbers(1, 4, 6, 5))), "3 channels last"),
        (lambda model: model(pf.stream(numbers(1, 4, 6, 3).numpy().astype("uint8"))), "real floating-point data"),
        (lambda model: model(pf.stream(numbers(1, 4, 6, 3).float())), "dtype torch.float64"),
        (lambda model: model(pf.stream(numbers(1, 4, 6, 3)), mask=torch.ones(1, 24, dtype=torch.bool)), "of pf.stream"),
        (lambda model: model(pf.stream([numbers(1, 4, 6, 3), numbers(2, 4, 6, 3)])), "chunks for a batch of 1"),
        (lambda model: model(pf.stream([numbers(1, 4, 6, 3)], total=5)), "source of 5 rows in all, got 4"),
        (lambda model: model(pf.stream(numbers(1, 4, 6, 3), transform=lambda t: t[:, :1])), "transform to keep"),
        (lambda model: model(pf.stream(numbers(1, 4, 6, 3), mask=torch.ones(9, 6) > 0)), "mask of 4 rows"),
        (lambda model: model(pf.stream(numbers(1, 9, 3), coords=numbers(20, 2))), "coords of 9 rows"),
        (lambda model: pf.explain(model, pf.stream(numbers(1, 4, 6, 3))), "got a stream"),
        (lambda model: pf.attention_map(model, pf.stream(numbers(1, 4, 6, 3))), "got a stream"),
    ],
)
def test_wrong_calls(wrong, match):
    model = pf.Perceiver(**IMAGE).double()
    with pytest.raises((TypeError, ValueError), match=match):
        wrong(model)


def test_layers_that_have_to_be_called_say_so():
    model = pf.Perceiver(**IMAGE).double()
    model.layers[0].cross_attn.fn.to_kv.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(RuntimeError, match="that has to be called on the whole tensor"):
        model(pf.stream(numbers(1, 4, 6, 3)))
    rewriting = experimental.Perceiver(**IMAGE).double()
    with pytest.raises(ValueError, match="rewrites its tokens"):
        rewriting(pf.stream(numbers(1, 4, 6, 3)))
    dropping = pf.PerceiverIO(dim=9, queries_dim=7, depth=1, seq_dropout_prob=0.5, **SMALL).double()
    with pytest.raises(ValueError, match="seq_dropout_prob=0"):
        dropping(pf.stream(numbers(1, 30, 9)))
    data = numbers(1, 30, 9)
    torch.testing.assert_close(dropping.eval()(pf.stream(data, rows=7)), dropping(data))
