"""What explain finds: paths, reasons, and counts that two other ways of counting agree with."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import perceiver_pytorch
import pytest
import torch
from perceiver_pytorch import experimental, gated, mixed_latents
from support import needs_extension
from torch.utils.flop_counter import FlopCounterMode

import perceiver_fast as pf
from perceiver_fast.insight.explanation import fold
from perceiver_fast.insight.geometries import GEOMETRIES
from perceiver_fast.insight.roofs import Roofs
from perceiver_fast.insight.shapes import on_shapes, shapes_mode
from perceiver_fast.insight.work import WorkCounter, total
from perceiver_fast.layers import observer
from perceiver_fast.ops.work import Work, binary, decimal
from perceiver_fast.tokens import fourier

SMALL = dict(
    num_freq_bands=4, depth=3, max_freq=10.0, num_latents=7, latent_dim=16, latent_heads=2, latent_dim_head=8,
    cross_heads=2, cross_dim_head=5, num_classes=6,
)  # fmt: skip
DENSE, IO = dict(fourier_encode_data=False), dict(depth=2, dim=9, queries_dim=6, num_latents=8, latent_dim=16)
STAND_IN = Roofs(multiply_adds=1e10, exponentials=1e9, copied_bytes=2e9, threads=1)


def multimodal():
    modalities = [pf.Modality("image", 3, 2, 3, 8.0), pf.Modality("audio", 1, 1, 5, 20.0)]
    return pf.MultimodalPerceiver(modalities, depth=2, num_latents=7, latent_dim=16, cross_dim_head=5, num_classes=4)


@pytest.mark.skipif(**needs_extension)
def test_it_names_paths_and_reasons():
    data = torch.randn(1, 5, 6, 3)
    model = pf.Perceiver(**SMALL | dict(inverted_cross_attn=(False, True, False)))
    text = str(pf.explain(model, data))
    assert "7 latents" in text and "5 x 6 tokens" in text
    layers = {path.layer: path for path in pf.explain(model, data).layers}
    assert all(layers[f"layers.{i}.cross_attn"].choice.op == "grid_attention" for i in range(3))
    assert layers["layers.0.cross_attn"].path == "grid" and "projected" in layers["layers.0.cross_attn"].plan.work
    assert "self_attention on cpu" in text and "with grid_scale on cpu" in text
    model = pf.Perceiver(**SMALL | dict(attn_dropout=0.1))
    assert "grid_attention on cpu" in str(pf.explain(model, data))  # dropout is the kernel's too
    sound = pf.Perceiver(**SMALL | dict(input_axis=1, num_freq_bands=32))
    text = str(pf.explain(sound, torch.randn(1, 2000, 3)))
    assert "cross_attention on cpu (projected" in text and "points are no grid" in text
    assert "with fourier_projection on cpu" in text
    assert "grid_attention on cpu" in str(pf.explain(sound, torch.randn(1, 200, 3)))
    few_bands = str(pf.explain(pf.Perceiver(**SMALL | dict(input_axis=1)), torch.randn(1, 2000, 3)))
    assert "cross_attention on cpu (absorbed" in few_bands and "with fourier_projection on cpu" in few_bands
    own = pf.Perceiver(**SMALL | DENSE | dict(cross_dim_head=16))
    text = str(pf.explain(own, data))
    assert "dense tokens are no grid" in text and "cross_attention on cpu (absorbed" in text and "more work" in text
    with pf.use_backend("reference"):
        assert "grid_attention on reference" in str(pf.explain(pf.Perceiver(**SMALL), data))
    with pytest.raises(TypeError, match="perceiver_fast model, got Linear"):
        pf.explain(torch.nn.Linear(2, 2), data)


@pytest.mark.skipif(**needs_extension)
def test_it_runs_every_model_on_shapes_alone():
    models = {
        "io": (pf.PerceiverIO(depth=1, dim=9, queries_dim=6, num_latents=8, latent_dim=16), torch.randn(2, 30, 9)),
        "lm": (
            pf.PerceiverLM(dim=12, num_tokens=50, max_seq_len=64, depth=1, num_latents=8, latent_dim=16),
            torch.randint(0, 50, (2, 30)),
        ),
    }
    for name in ("gated", "mixed_latents", "experimental"):
        models[name] = (getattr(pf, name).Perceiver(**SMALL), torch.randn(1, 5, 6, 3))
    for name, (model, data) in models.items():
        keywords = dict(queries=torch.randn(10, 6)) if name == "io" else {}
        cross = [path for path in pf.explain(model, data, **keywords).layers if path.path]
        assert all(path.choice.backend == "cpu" for path in cross), name
        assert len(cross) == {"io": 2, "lm": 2, "gated": 3, "mixed_latents": 3, "experimental": 5}[name]


def test_every_layer_that_works_is_there():
    layers = [path.layer for path in pf.explain(pf.Perceiver(**SMALL | dict(depth=1)), torch.randn(1, 5, 6, 3)).rows]
    first = "layers.0."
    expected = ["tokens", "cross_attn", "cross_ff", "self_attns.0.0", "self_attns.0.1", "to_logits"]
    assert layers == [expected[0], *(first + name for name in expected[1:5]), expected[5]]
    tied = pf.explain(pf.Perceiver(**SMALL | dict(weight_tie_layers=True)), torch.randn(2, 5, 6, 3)).layers
    names = [path.layer for path in tied if path.path]
    assert names == ["layers.0.cross_attn", "layers.1.cross_attn", "layers.2.cross_attn"]
    gates = [path.layer for path in pf.explain(pf.gated.Perceiver(**SMALL), torch.randn(1, 5, 6, 3)).layers]
    assert {"layers.1.0.fn", "layers.1.0.gru", "layers.1.1.fn", "layers.1.2.fn", "layers.1.3.fn"} <= set(gates)


OURS = ("grid_attention_forward", "cross_attention_forward", "fourier_projection_forward")
TORCH = "_scaled_dot_product_flash_attention_for_cpu"  # which FlopCounterMode has no formula for

MODELS = {
    "grid": (lambda: pf.Perceiver(**SMALL), (2, 9, 7, 3)),
    "inverted": (lambda: pf.Perceiver(**SMALL, inverted_cross_attn=True), (2, 9, 7, 3)),
    "residual": (lambda: pf.Perceiver(**SMALL, attn_residual=True, weight_tie_layers=True), (2, 9, 7, 3)),
    "points": (lambda: pf.Perceiver(**SMALL | dict(input_axis=1)), (2, 1500, 3)),
    "dense": (lambda: pf.Perceiver(**SMALL | DENSE), (2, 9, 7, 3)),
    "gated": (lambda: pf.gated.Perceiver(**SMALL), (2, 9, 7, 3)),
    "mixed_latents": (lambda: pf.mixed_latents.Perceiver(**SMALL), (2, 9, 7, 3)),
    "experimental": (lambda: pf.experimental.Perceiver(**SMALL), (2, 9, 7, 3)),
    "io": (lambda: pf.PerceiverIO(**IO), (2, 30, 9)),
}


@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_are_those_of_torchs_counter(name):
    build, size = MODELS[name]
    model, data = on_shapes(build, size)
    found = pf.explain(model, data)
    uncounted = [op for path in found.rows for op in path.operators if op.name == TORCH]
    model.requires_grad_(False)  # or the counter looks for gradients
    with shapes_mode(data), FlopCounterMode(display=False) as counter:
        model(data)
    assert counter.get_total_flops() > 0
    assert found.multiply_adds == counter.get_total_flops() // 2 + total(uncounted).multiply_adds


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        dict(inverted_cross_attn=True),
        DENSE,
        dict(input_axis=1),
        dict(self_per_cross_attn=0, weight_tie_layers=True),
    ],
    ids=str,
)
def test_the_original_is_perceiver_pytorch(extra, masked):
    arguments = SMALL | extra
    size = (2, 1500, 3) if "input_axis" in extra else (2, 9, 7, 3)
    mask = torch.ones(size[:-1], dtype=torch.bool) if masked else None
    found = pf.explain(pf.Perceiver(**arguments), torch.empty(size), mask)
    theirs, data = on_shapes(lambda: perceiver_pytorch.Perceiver(**arguments), size)
    mode = shapes_mode(data)
    with mode, torch.no_grad():
        mask = None if mask is None else mode.from_tensor(mask)
        with WorkCounter() as counter:
            theirs(data, mask=mask)
    counted = total(counter.operators)
    assert found.original == counted and counted.exponentials > 0
    with shapes_mode(data), FlopCounterMode(display=False) as flops:
        theirs.requires_grad_(False)(data)
    assert 2 * counted.multiply_adds == flops.get_total_flops()


@pytest.mark.parametrize("name", ["gated", "mixed_latents", "experimental", "io"])
def test_the_originals_of_the_variants(name):
    theirs = {"gated": gated, "mixed_latents": mixed_latents, "experimental": experimental, "io": perceiver_pytorch}
    arguments = SMALL | (DENSE if name == "experimental" else {})
    size = (2, 30, 9) if name == "io" else (2, 9, 7, 3)
    if name == "io":
        ours, build = pf.PerceiverIO(**IO), lambda: perceiver_pytorch.PerceiverIO(**IO)
    else:
        ours, build = getattr(pf, name).Perceiver(**arguments), lambda: theirs[name].Perceiver(**arguments)
    model, data = on_shapes(build, size)
    with shapes_mode(data), torch.no_grad(), WorkCounter() as counter:
        model(data)
    found, counted = pf.explain(ours, torch.empty(size)).original, total(counter.operators)
    assert (found.multiply_adds, found.exponentials) == (counted.multiply_adds, counted.exponentials)


N, D, H, HEAD, BATCH = 7, 16, 2, 5, 2  # of SMALL: latents, their channels, heads, channels of a head; and the batch
WAYS = {  # of docs/paths.md: model, input, multiply-adds of a query-token pair and of the projection, its exponentials
    "grid": ({}, (9, 7, 3), 2 * 3 + 2, 0, 0),
    "absorbed": (DENSE, (9, 7, 3), 2 * 3, 0, 0),
    "projected": (
        dict(input_axis=1, num_freq_bands=32),
        (1500, 1),
        2 * HEAD,
        1500 * (1 + 65) * 2 * H * HEAD,
        2 * 1500 * 32,
    ),
}


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize("way", WAYS)
def test_ways_count_what_the_documentation_says(way):
    extra, size, pair, projection, encoding = WAYS[way]
    model = pf.Perceiver(**SMALL | extra | dict(input_channels=size[-1]))
    path = pf.explain(model, torch.empty(BATCH, *size)).layers[0]
    assert path.path == way
    kernels = total([op for op in path.operators if op.name in OURS])
    pairs = N * H * math.prod(size[:-1])
    assert kernels.multiply_adds == BATCH * (pairs * pair + projection)
    assert kernels.exponentials == BATCH * pairs + encoding  # the batch shares its positions
    # The plan adds what queries and results take in the tokens' own terms; positions it takes to be each element's own.
    length = {"grid": 3 + sum(size[:-1]), "absorbed": 3, "projected": 0}[way]
    alone = Work(pairs * pair + projection, pairs + encoding)
    assert path.plan.work[way].arithmetic == BATCH * (alone.arithmetic + 2 * N * H * HEAD * length)


@pytest.mark.skipif(**needs_extension)
def test_a_batch_shares_what_it_can():
    model = pf.Perceiver(**SMALL)
    one, two = (pf.explain(model, torch.empty(batch, 5, 6, 3)) for batch in (1, 2))
    assert one.multiply_adds < two.multiply_adds < 2 * one.multiply_adds
    shared, own = two.layers[0].counts, next(p for p in two.layers if p.layer == "layers.1.cross_attn").counts
    assert own.multiply_adds - shared.multiply_adds == N * (D * H * HEAD + H * HEAD * (3 + 5 + 6))


def test_decoding_in_parts_is_one_layer():
    model = pf.PerceiverIO(depth=1, dim=9, queries_dim=6, num_latents=8, latent_dim=16)
    data = torch.randn(2, 30, 9)
    few, many = (pf.explain(model, data, queries=torch.empty(count, 6)) for count in (10_000, 100_000))
    few, many = ([p for p in found.layers if p.layer == "decoder_cross_attn"] for found in (few, many))
    assert len(few) == len(many) == 1
    assert 9.5 < many[0].counts.exponentials / few[0].counts.exponentials < 10.5
    attention = 2 * 64 * 8 + 2 * 6 * 64  # of a query: two products with the latents' keys and values, and projections
    assert many[0].original.multiply_adds - few[0].original.multiply_adds == 2 * 90_000 * attention


class Twice(torch.nn.Module):
    """One model on two inputs, and something else before it."""

    def __init__(self, model, before=lambda: None):
        super().__init__()
        self.model, self.before = model, before

    def forward(self, data):
        self.before()
        return self.model(data) + self.model(data.clone())


@pytest.mark.parametrize("extra", [{}, DENSE, dict(input_axis=1)], ids=str)
def test_a_model_that_is_called_twice_counts_twice(extra):
    model, data = pf.Perceiver(**SMALL | extra), torch.empty(*([1, 200, 3] if "input_axis" in extra else [1, 5, 6, 3]))
    once, twice = pf.explain(model, data), pf.explain(Twice(model), data)
    assert twice.multiply_adds == 2 * once.multiply_adds and twice.exponentials == 2 * once.exponentials
    assert twice.original.multiply_adds == 2 * once.original.multiply_adds
    assert [path.layer.removeprefix("model.") for path in twice.layers] == [path.layer for path in once.layers]


@pytest.mark.skipif(**needs_extension)
def test_groups_of_tokens_are_counted_apart():
    model = multimodal()
    data = {"image": torch.empty(2, 6, 5, 3), "audio": torch.empty(2, 2000, 1)}
    found = pf.explain(model, data)
    names = [path.layer for path in found.layers if path.path]
    assert names == [f"layers.{block}.cross_attn [{group}]" for block in (0, 1) for group in (0, 1)]
    image, audio = found.layers[:2]
    assert (image.path, audio.path) == ("grid", "projected")
    rows = 2 * 7  # batch and latents; one head
    assert image.counts.exponentials == rows * 30
    # Beside attention: positions, which the batch shares, and the logarithms and weights that merge two groups.
    assert audio.counts.exponentials == rows * 2000 + 2 * 2000 * 5 + rows * 2 + 2
    channels, width = model.input_dim, 5
    joined = 2 * (2030 * channels * 2 * width + 7 * 2030 * 2 * width + 7 * 16 * width * 2)
    assert image.original.multiply_adds + audio.original.multiply_adds == joined
    assert found.inputs[0].original.exponentials == 2 * (30 * 2 * 3 + 2000 * 5)


@pytest.mark.skipif(**needs_extension)
def test_inverted_attention_computes_its_logits_twice():
    plain, inverted = (
        pf.explain(pf.Perceiver(**SMALL, inverted_cross_attn=on), torch.empty(1, 5, 6, 3)).layers[0]
        for on in (False, True)
    )
    assert inverted.counts.exponentials == 2 * plain.counts.exponentials == 2 * N * H * 30


def test_models_without_content_are_explained_alike():
    geometry = GEOMETRIES["readme"].tiny()
    real = pf.explain(geometry.build(), geometry.input())
    shapes = pf.explain(*on_shapes(geometry.build, (1, *geometry.sizes, geometry.channels)))
    assert str(shapes) == str(real) and shapes.to_dict() == real.to_dict()
    half = pf.explain(*on_shapes(geometry.build, (1, *geometry.sizes, geometry.channels), torch.bfloat16))
    assert half.dtype == "bfloat16" and half.bytes < real.bytes and half.multiply_adds == real.multiply_adds
    with torch.inference_mode():
        assert str(pf.explain(geometry.build(), geometry.input())) == str(real)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_are_explained_for_devices_that_are_not_here(name):
    geometry = GEOMETRIES[name].tiny()
    model, data = on_shapes(geometry.build, (1, *geometry.sizes, geometry.channels), device="cuda")
    found = pf.explain(model, data)
    assert found.device == "cuda" and found.multiply_adds > 0
    assert not [op for path in found.layers for op in path.operators if "softmax" in op.name and "safe" in op.name]


def test_it_leaves_nothing_behind():
    model, data = pf.Perceiver(**SMALL), torch.randn(1, 5, 6, 3)
    codes = dict(fourier._cache)
    pf.explain(model, data)
    with pytest.raises(ValueError, match="channels"):
        pf.explain(model, torch.randn(1, 5, 6, 4))
    assert fourier._cache == codes
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert observer.observer() is None


def test_two_threads_explain_at_once():
    """Each finds what it finds alone, of one model too: codes of the axes count in both."""
    data, models = torch.empty(1, 5, 6, 3), [pf.Perceiver(**SMALL), pf.gated.Perceiver(**SMALL)]
    alone = [pf.explain(model, data) for model in models]
    start = threading.Barrier(4)

    def explain(model):
        start.wait(60)
        return [pf.explain(model, data) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(alone * 2, pool.map(explain, models * 2)):
            assert found == [expected] * 3
    assert not any(module._forward_pre_hooks for model in models for module in model.modules())


def test_a_forward_beside_it_runs_as_ever():
    """A forward of another thread in the midst of explain: neither sees the other."""
    model, data, results = pf.Perceiver(**SMALL).eval(), torch.randn(1, 5, 6, 3), []

    def forward():
        fourier._cache.clear()
        with torch.no_grad():
            results.append(model(data))

    def beside():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(forward).result(60)

    forward()
    assert pf.explain(Twice(model, before=beside), data) == pf.explain(Twice(model), data)
    assert len(results) == 2 and torch.equal(*results) and fourier._cache


@pytest.mark.skipif(**needs_extension)
def test_counts_add_up_and_are_the_same_every_time():
    model, data = pf.Perceiver(**SMALL), torch.randn(2, 5, 6, 3)
    model(data)  # codes of the axes are kept from here on
    found, again = pf.explain(model, data), pf.explain(model, data)
    assert found == again
    assert found.counts == sum((path.counts for path in found.rows), Work())
    assert (found.multiply_adds, found.exponentials, found.bytes) == (
        found.counts.multiply_adds,
        found.counts.exponentials,
        found.counts.bytes,
    )
    assert found.inputs[0].counts.exponentials == 2 * 4 * (5 + 6)  # sines and cosines of the codes
    assert found.original.multiply_adds > found.multiply_adds


def test_time_is_predicted_from_the_roofs():
    assert Work(multiply_adds=10**10).seconds(STAND_IN) == 1
    assert Work(multiply_adds=10**10, exponentials=10**9).seconds(STAND_IN) == 2  # both want the same units
    assert Work(10**10, 10**9, bytes=2 * 10**9).seconds(STAND_IN) == 2  # memory is read meanwhile
    assert Work(10**10, 10**9, bytes=8 * 10**9).seconds(STAND_IN) == 4
    found = pf.explain(pf.Perceiver(**SMALL), torch.empty(1, 5, 6, 3))
    assert found.seconds(STAND_IN) == pytest.approx(sum(path.seconds(STAND_IN) for path in found.rows))
    parts = [op.counts.seconds(STAND_IN) for op in found.layers[0].operators]
    assert found.layers[0].seconds(STAND_IN) == pytest.approx(sum(parts))
    for given in (None, STAND_IN):
        assert sum(found.shares(given)) == pytest.approx(1) and min(found.shares(given)) > 0
    assert found.shares(STAND_IN) != found.shares()


def test_as_json():
    found = pf.explain(pf.Perceiver(**SMALL), torch.empty(1, 5, 6, 3))
    stored = json.loads(json.dumps(found.to_dict(STAND_IN)))
    assert stored["total"]["counts"]["multiply_adds"] == found.multiply_adds
    assert stored["total"]["perceiver_pytorch"]["bytes"] == found.original.bytes
    assert sum(layer["share"] for layer in stored["layers"]) == pytest.approx(1)
    assert sum(layer["seconds"] for layer in stored["layers"]) == pytest.approx(stored["total"]["seconds"])
    assert sum(op["bytes"] for layer in stored["layers"] for op in layer["operators"]) == found.bytes
    assert stored["share_of"] == "predicted time" and found.to_dict()["share_of"] == "counted cost"
    assert "seconds" not in found.to_dict()["total"]


def test_repeated_blocks_are_one_line():
    geometry = GEOMETRIES["imagenet-lucid"]
    found = pf.explain(*on_shapes(geometry.build, (1, *geometry.sizes, geometry.channels)))
    lines = {line.name: len(line.rows) for line in found.folded()}
    assert lines == {
        "tokens": 1,
        "layers.{0..7}.cross_attn": 8,
        "layers.{0..7}.cross_ff": 8,
        "layers.{0..7}.self_attns.{0..5}.0": 48,
        "layers.{0..7}.self_attns.{0..5}.1": 48,
        "to_logits": 1,
    }
    items = ["a.0", "a.1", "a.2", "a.4", "b.0.x", "b.1.x", "b.1.y", "c"]
    folded = fold(items, name=str, key=lambda item: item != "a.1")
    assert [name for name, _ in folded] == ["a.0", "a.1", "a.2", "a.4", "b.0.x", "b.1.x", "b.1.y", "c"]
    folded = fold(items, name=str, key=lambda item: 0)
    assert [name for name, _ in folded] == ["a.{0..2}", "a.4", "b.0.x", "b.1.x", "b.1.y", "c"]
    assert [item for _, inner in folded for item in inner] == items


def test_numbers_for_people():
    assert [decimal(n) for n in (0, 999, 1000, 12_345, 3.2e9, 4e12)] == [
        "0",
        "999",
        "1.00 k",
        "12.3 k",
        "3.20 G",
        "4.00 T",
    ]
    assert [binary(n) for n in (0, 1023, 1024, 2**20 * 150)] == ["0 B", "1023 B", "1.00 KiB", "150 MiB"]
