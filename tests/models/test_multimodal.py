"""The multimodal Perceiver against a plain statement of it: outputs, all gradients, masks, dropout, every way."""

import random

import plain_multimodal
import pytest
import torch
import torch.nn.functional as F
from support import check_float32, compare_models, relative_error

import perceiver_fast as pf
from perceiver_fast import Modality, MultimodalPerceiver
from perceiver_fast.layers.cross_attention import FusedCrossAttention
from perceiver_fast.layers.plan import Plan
from perceiver_fast.ops.cross_attention import CROSS_ATTENTION, CrossAttentionCall
from perceiver_fast.tokens import GridTokens, PointTokens

VIDEO = Modality("video", input_channels=3, input_axis=3, num_freq_bands=2, max_freq=6.0)
IMAGE = Modality("image", input_channels=2, input_axis=2, num_freq_bands=4, max_freq=10.0)
AUDIO = Modality("audio", input_channels=1, input_axis=1, num_freq_bands=5, max_freq=30.0)
CLOUD = Modality("cloud", input_channels=0, input_axis=3, num_freq_bands=3, max_freq=8.0)
MODALITIES = (VIDEO, IMAGE, AUDIO, CLOUD)
SIZES = dict(video=(2, 3, 4), image=(5, 4), audio=(23,), cloud=(17,))
SMALL = dict(
    depth=2, num_latents=6, latent_dim=12, latent_heads=2, latent_dim_head=5, cross_heads=2, cross_dim_head=4,
    num_classes=5,
)  # fmt: skip


class Flat(torch.nn.Module):
    """A model of either kind, called with one argument a tensor: data, ``_coords`` and ``_mask``."""

    def __init__(self, model, plain):
        super().__init__()
        self.model, self.plain = model, plain

    def forward(self, **tensors):
        data, mask = {}, {}
        for name, value in tensors.items():
            if name.endswith("_mask"):
                mask[name.removesuffix("_mask")] = value
            elif not name.endswith("_coords"):
                coords = tensors.get(f"{name}_coords")
                data[name] = value if coords is None else (value, coords)
        call = plain_multimodal.forward if self.plain else MultimodalPerceiver.__call__
        return call(self.model, data, mask or None)


def build(seed=0, modalities=MODALITIES, **keywords):
    """A model whose embeddings are not small, so that their gradients matter."""
    torch.manual_seed(seed)
    model = MultimodalPerceiver(modalities, **SMALL | keywords)
    for embedding in model.embeddings.values():
        torch.nn.init.normal_(embedding)
    return model


def draw(r, batch, names, masked=None):
    """Random inputs of these modalities; the first batch element is masked in all of them, or in some."""
    inputs = {}
    for modality in MODALITIES:
        name, sizes = modality.name, SIZES[modality.name]
        if name not in names:
            continue
        if name == "cloud" or r.random() < 0.25:  # at positions of its own
            tokens = torch.Size(sizes).numel()
            inputs[name] = torch.randn(batch, tokens, modality.input_channels)
            shape = (batch, tokens) if r.random() < 0.5 else (tokens,)
            inputs[f"{name}_coords"] = torch.rand(*shape, modality.input_axis) * 2 - 1
        else:
            inputs[name] = torch.randn(batch, *sizes, modality.input_channels)
        if masked is not None and (masked == "all" or r.random() < 0.7):
            mask = torch.rand(batch, *inputs[name].shape[1:-1]) > 0.4
            if masked == "all" or r.random() < 0.5:
                mask[0] = False
            inputs[f"{name}_mask"] = mask
    return inputs


def compare(model, inputs, where=None):
    for row in compare_models(Flat(model, True), Flat(model, False), inputs, noise=1e-13, where=where):
        yield where, *row


def test_random_configurations():
    def rows():
        for seed in range(40):
            r = random.Random(seed)
            keywords = dict(
                depth=r.choice([1, 2, 3]),
                modality_channels=r.choice([1, 4, 7]),
                num_latents=r.choice([1, 6, 17]),
                cross_heads=r.choice([1, 2, 3]),
                weight_tie_layers=r.random() < 0.4,
                self_per_cross_attn=r.choice([0, 1, 2]),
                final_classifier_head=r.random() < 0.7,
            )
            names = r.sample([m.name for m in MODALITIES], r.choice([1, 2, 3, 4]))
            model = build(seed, **keywords)
            inputs = draw(r, r.choice([1, 2, 3]), names, r.choice([None, "some", "all"]))
            where = (seed, keywords, {k: tuple(v.shape) for k, v in inputs.items()})
            yield from compare(model, inputs, where)

    check_float32(rows(), exceptions=1 / 100)


def test_all_masked_is_uniform_over_all_tokens():
    model = build(depth=1).double()
    data = {"image": torch.randn(1, 5, 4, 2).double(), "audio": torch.randn(1, 23, 1).double()}
    nothing = {"image": torch.zeros(1, 5, 4) > 0, "audio": torch.zeros(1, 23) > 0}
    block, groups = model.layers[0], plain_multimodal.build_tokens(model, data)
    attention = block.cross_attn
    values = attention.fn.to_kv(attention.norm_context(torch.cat(groups, 1))).chunk(2, -1)[1]
    expected = attention.fn.to_out(values.mean(1, keepdim=True)).expand(-1, 6, -1)
    actual = attention(model.latents[None], context=model.describe(data, nothing))
    assert relative_error(actual, expected) < 1e-12
    one = nothing | {"audio": torch.ones(1, 23) > 0}
    assert relative_error(model(data, one), model({"audio": data["audio"]})) < 1e-12


@pytest.fixture(params=["as planned", "projected", "reference", "long axis"])
def way(request, monkeypatch):
    """Every way that a group can be attended to."""
    if request.param == "projected":

        def plan(self, tokens, queries, inverted=False, lse=False, masked=False):
            return Plan("projected", CROSS_ATTENTION.choose(CrossAttentionCall(tokens.compute, tokens.device, lse=lse)))

        monkeypatch.setattr(FusedCrossAttention, "plan", plan)
    if request.param == "long axis":
        monkeypatch.setattr("perceiver_fast.tokens.describe.ONE_AXIS_LIMIT", 22)
    with pf.use_backend("reference" if request.param == "reference" else "auto"):
        yield request.param


@pytest.mark.parametrize("masked", [None, "some"])
def test_every_way(way, masked):
    model = build()
    inputs = draw(random.Random(3), 2, [m.name for m in MODALITIES], masked)
    inputs = {k: v for k, v in inputs.items() if k == "cloud_coords" or not k.endswith("_coords")}
    for name, sizes in SIZES.items():
        inputs[name] = torch.randn(2, *sizes, inputs[name].shape[-1])
        if f"{name}_mask" in inputs:
            inputs[f"{name}_mask"] = inputs[f"{name}_mask"].view(2, *sizes)
    kinds = [type(group) for group in model.describe({k: inputs[k] for k in ("video", "audio")}).groups]
    assert kinds == [GridTokens, PointTokens if way == "long axis" else GridTokens]
    checked = list(compare(model, inputs))
    assert {f"model.embeddings.{m.name}" for m in MODALITIES} <= {row[1] for row in checked}
    beyond = [row for row in checked if row[2] > 2 * row[3] + 5e-7]  # of one draw, a gradient may have rounded well
    assert len(beyond) <= 1 and all(ours <= 5 * plain + 2e-6 for *_, ours, plain in beyond), beyond


def test_gradients_of_embeddings_by_differences():
    """First derivatives of the planned way against finite differences, through tables and LayerNorm's statistics."""
    model = build(modalities=[IMAGE, AUDIO], depth=1).double()
    data = {"image": torch.randn(1, 5, 4, 2).double(), "audio": torch.randn(1, 23, 1).double()}
    names = [m.name for m in model.modalities]

    def run(*embeddings):
        weights = {f"embeddings.{name}": embedding for name, embedding in zip(names, embeddings)}
        return torch.func.functional_call(model, weights, (data,))

    assert torch.autograd.gradcheck(run, tuple(model.embeddings[name] for name in names))


@pytest.mark.parametrize("way", ["as planned", "long axis"], indirect=True)
def test_attention_dropout_in_training(way):
    """Every way drops weights by the same hash of their indices; the plain model drops the same weights."""
    model = build(attn_dropout=0.4, self_per_cross_attn=0)  # self-attention draws torch's masks
    inputs = draw(random.Random(1), 2, ["image", "audio", "cloud"], "some")
    for _, name, ours, plain in compare(model, inputs):
        assert ours <= 2 * plain + 5e-7, (name, ours, plain)
    flat = Flat(model, False)
    assert not torch.equal(flat(**inputs), flat(**inputs))
    model.eval()
    assert torch.equal(flat(**inputs), flat(**inputs))


def test_dropout_trains():
    model = build(attn_dropout=0.2, ff_dropout=0.1)
    model({"image": torch.randn(2, 5, 4, 2), "audio": torch.randn(2, 23, 1)}).sum().backward()
    for name, parameter in model.named_parameters():
        absent = name in ("embeddings.video", "embeddings.cloud")
        assert absent if parameter.grad is None else parameter.grad.isfinite().all(), name


def test_tokens_are_what_the_plain_statement_builds():
    model = build()
    data = {name: torch.randn(2, *sizes, c.input_channels) for (name, sizes), c in zip(SIZES.items(), MODALITIES)}
    data["cloud"] = (data["cloud"], torch.rand(2, 17, 3))
    tokens = model.describe(data)
    assert tokens.channels == model.input_dim == max(m.own_channels for m in MODALITIES) + 4
    assert relative_error(tokens.materialize(), torch.cat(plain_multimodal.build_tokens(model, data), 1)) < 1e-7
    other = model.describe({name: data[name] for name in reversed(data)})  # the order is the constructor's
    assert torch.equal(other.materialize(), tokens.materialize())


def test_state_dict_and_seeds():
    first, second = (build(3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert {f"embeddings.{m.name}" for m in MODALITIES} < first.state_dict().keys()
    build(4).load_state_dict(first.state_dict(), strict=True)


@pytest.mark.parametrize("depth", [0, 2])
def test_embeddings_and_empty_batches(depth):
    model = build(depth=depth)
    data = {"image": torch.randn(2, 5, 4, 2), "audio": torch.randn(2, 23, 1)}
    assert model(data, return_embeddings=True).shape == (2, 6, 12)
    assert model({name: value[:0] for name, value in data.items()}).shape == (0, 5)
    assert build(depth=depth, final_classifier_head=False)(data).shape == (2, 6, 12)


def test_explain_and_autocast():
    model = build()
    data = {"video": torch.randn(2, 2, 3, 4, 3), "audio": torch.randn(2, 2000, 1)}
    data["cloud"] = (torch.randn(2, 17, 0), torch.rand(17, 3))
    mask = {"audio": torch.rand(2, 2000) > 0.5}
    explained = pf.explain(model, data, mask)
    cross = [path for path in explained.layers if "cross_attn" in path.layer]
    assert len(cross) == 6 and len({path.layer for path in cross}) == 6
    assert [path.path for path in cross[:3]] == ["grid", "projected", "projected"]
    expected = model(data, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(model(data, mask), expected) < 0.05
    with pf.use_backend("reference"):
        assert relative_error(model(data, mask), expected) < 1e-5


def test_bfloat16():
    model = build()
    data = {"image": torch.randn(2, 5, 4, 2), "cloud": (torch.randn(2, 17, 0), torch.rand(17, 3))}
    expected = model(data)
    data["image"], data["cloud"] = data["image"].bfloat16(), (data["cloud"][0].bfloat16(), data["cloud"][1])
    actual = model.bfloat16()(data)
    assert actual.dtype == torch.bfloat16 and relative_error(actual, expected) < 0.05


def test_compiles_to_one_graph():
    torch.use_deterministic_algorithms(False)  # inductor's own code has no use for NaN-filled memory
    torch._dynamo.reset()
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    data = {"image": torch.randn(2, 5, 4, 2), "audio": torch.randn(2, 2000, 1)}
    data["cloud"] = (torch.randn(2, 17, 0), torch.rand(17, 3, requires_grad=True))
    mask = {"image": torch.rand(2, 5, 4) > 0.3}
    results = []
    for run in (model, compiled):
        model.zero_grad()
        data["cloud"][1].grad = None
        out = run(data, mask)
        out.square().sum().backward()
        present = [p.grad for name, p in model.named_parameters() if name != "embeddings.video"]
        results.append([out.detach(), data["cloud"][1].grad, *present])
    for actual, expected in zip(*reversed(results)):
        assert (actual - expected).norm() <= 1e-4 * expected.norm() + 1e-6
    torch._dynamo.reset()


def test_inverted_attention():
    """Over the tokens of all modalities, some of them masked: as to the joined tokens."""
    model = build().double()
    data = {"image": torch.randn(2, 5, 4, 2).double(), "audio": torch.randn(2, 23, 1).double()}
    masks = {"image": torch.rand(2, 20) > 0.4, "audio": torch.zeros(2, 23, dtype=torch.bool)}
    joined, mask = (
        torch.cat(plain_multimodal.build_tokens(model, data), 1),
        torch.cat([masks["image"], masks["audio"]], 1),
    )
    x, block, results = model.latents.detach().expand(2, -1, -1), model.layers[0], []
    for context, keep in ((model.describe(data, masks), None), (joined, mask)):
        out = block(x, context, mask=keep, inverted_attention=True)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(block.parameters()))])
    for actual, expected in zip(*results):
        assert (actual - expected).norm() <= 1e-12 * expected.norm() + 1e-12


def test_learns_which_modality_a_token_is_of():
    """Two modalities that differ in their embeddings alone: without these the model could not tell them apart."""
    left, right = (Modality(name, 1, 1, 2, 4.0) for name in ("left", "right"))
    model = build(modalities=[left, right], depth=1, num_classes=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        data, labels = torch.zeros(32, 2, 4, 1), torch.randint(0, 2, (32,))
        data[torch.arange(32), labels] = 1.0
        loss = F.cross_entropy(model({"left": data[:, 0], "right": data[:, 1]}), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


IMAGES, SOUNDS = torch.randn(2, 5, 4, 2), torch.randn(2, 23, 1)


@pytest.mark.parametrize(
    "data, mask, error, words",
    [
        (IMAGES, None, TypeError, "data to be a dict.*got Tensor.*'video': data"),
        ({}, None, ValueError, "at least one of 'video', 'image', 'audio', 'cloud', got none"),
        ({"smell": IMAGES}, None, ValueError, "data of 'video', 'image', 'audio', 'cloud' alone, got 'smell'"),
        ({"image": [IMAGES]}, None, TypeError, r"data\['image'\] to be a torch.Tensor on a grid, or a pair.*got list"),
        ({"image": IMAGES[0]}, None, ValueError, r"data\['image'\] of 4 dimensions.*input_axis=2.*got 3"),
        ({"image": IMAGES[..., :1]}, None, ValueError, "2 channels last.*input_channels=1"),
        ({"image": IMAGES.double()}, None, TypeError, r"data\['image'\] of dtype torch.float32"),
        ({"image": IMAGES.to("meta")}, None, ValueError, r"data\['image'\] on cpu.*got meta"),
        ({"image": IMAGES, "audio": SOUNDS[:1]}, None, ValueError, "one batch size.*2 of 'image' and 1 of 'audio'"),
        ({"cloud": (torch.randn(2, 9, 0), torch.rand(9, 2))}, None, ValueError, r"data\['cloud'\]\[1\].*got \(9, 2\)"),
        ({"cloud": (torch.randn(2, 9, 1), torch.rand(9, 3))}, None, ValueError, r"\['cloud'\]\[0\] with 0 channels"),
        ({"image": IMAGES}, torch.ones(2, 20) > 0, TypeError, "mask to be a dict"),
        ({"image": IMAGES}, {"audio": torch.ones(2, 23) > 0}, ValueError, "mask of 'image' alone, got 'audio'"),
        ({"image": IMAGES}, {"image": torch.ones(2, 19) > 0}, ValueError, r"mask of shape \(2, 20\) or \(2, 5, 4\)"),
        ({"image": IMAGES}, {"image": torch.ones(2, 20)}, TypeError, "image: expected a bool mask"),
    ],
)
def test_errors_of_calls(data, mask, error, words):
    with pytest.raises(error, match=words):
        build()(data, mask)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: MultimodalPerceiver([], **SMALL), ValueError, "at least one Modality, got none"),
        (lambda: MultimodalPerceiver([IMAGE, IMAGE], **SMALL), ValueError, "different names, got 'image', 'image'"),
        (lambda: MultimodalPerceiver([3], **SMALL), TypeError, "perceiver_fast.Modality, got 3"),
        (lambda: MultimodalPerceiver([IMAGE], modality_channels=0, **SMALL), ValueError, "modality_channels.*least 1"),
        (lambda: Modality("a.b", 1, 1, 2, 4.0), ValueError, "got 'a.b'.*without a dot"),
        (lambda: Modality("values", 1, 1, 2, 4.0), ValueError, "got 'values'"),
        (lambda: Modality("a", 1, 0, 2, 4.0), ValueError, "input_axis to be an int of at least 1, got 0"),
        (lambda: Modality("a", -1, 1, 2, 4.0), ValueError, "input_channels to be an int of at least 0, got -1"),
        (lambda: Modality("a", 1, 1, 2, float("inf")), ValueError, "finite max_freq"),
    ],
)
def test_errors_of_constructors(make, error, words):
    with pytest.raises(error, match=words):
        make()
