"""PerceiverIO, PerceiverLM and the variants against perceiver-pytorch: outputs, gradients, weights, import paths."""

import copy
import inspect
import random

import perceiver_pytorch
import pytest
import torch
from perceiver_pytorch import experimental as their_experimental
from perceiver_pytorch import gated as their_gated
from perceiver_pytorch import mixed_latents as their_mixed_latents
from perceiver_pytorch.perceiver_pytorch import fourier_encode
from support import check_float32, compare_models, random_config, relative_error

import perceiver_fast as pf
from perceiver_fast import experimental, gated, mixed_latents, perceiver_io
from perceiver_fast.layers.observer import Observer, observing
from perceiver_fast.layers.pre_norm import is_cross_attention

MODELS = {
    "io": (perceiver_pytorch.PerceiverIO, pf.PerceiverIO),
    "lm": (perceiver_pytorch.PerceiverLM, pf.PerceiverLM),
    "gated": (their_gated.Perceiver, gated.Perceiver),
    "mixed_latents": (their_mixed_latents.Perceiver, mixed_latents.Perceiver),
    "experimental": (their_experimental.Perceiver, experimental.Perceiver),
    "block": (perceiver_pytorch.PerceiverBlock, pf.PerceiverBlock),
}
GRID = dict(
    num_freq_bands=3, depth=3, max_freq=9.0, num_latents=6, latent_dim=12, latent_heads=2, latent_dim_head=5,
    cross_heads=2, cross_dim_head=4, num_classes=5,
)  # fmt: skip
IO = dict(
    depth=3, dim=9, queries_dim=7, logits_dim=4, num_latents=6, latent_dim=12, cross_heads=2, latent_heads=2,
    cross_dim_head=5, latent_dim_head=4,
)  # fmt: skip
LM = {k: v for k, v in IO.items() if k not in ("queries_dim", "logits_dim")} | dict(num_tokens=20, max_seq_len=30)
BLOCK = dict(dim=12, context_dim=9, cross_heads=2, latent_heads=2, cross_dim_head=5, latent_dim_head=4)
SMALL = {"io": IO, "lm": LM, "gated": GRID, "mixed_latents": GRID, "experimental": GRID, "block": BLOCK}
SMALL["experimental"] = GRID | dict(fourier_encode_data=False, input_channels=9)


def pair(name, **keywords):
    """Their model and ours, built from one seed: their initial weights are the same."""
    models = []
    for model in MODELS[name]:
        torch.manual_seed(7)
        models.append(model(**keywords))
    return models


def random_mask(r, batch, *sizes):
    if r.random() < 0.5:
        return None
    mask = torch.rand(batch, *sizes) > 0.4
    mask[0] = False
    return mask


def grid_case(name, seed):
    config, r = random_config(seed), random.Random(seed)
    keywords, batch, sizes = config["keywords"], config["batch"], config["sizes"]
    del keywords["self_per_cross_attn"]
    mask = random_mask(r, batch, *sizes)
    if name == "experimental":
        keywords |= dict(fourier_encode_data=False, input_channels=r.choice([4, 9, 12]))
        keywords["depth"] = 1 if mask is not None else keywords["depth"]  # theirs takes no mask with more
    if name == "mixed_latents":
        keywords |= dict(fourier_encode_data=False, anything=3)  # ignored
    return keywords, dict(data=torch.randn(batch, *sizes, keywords["input_channels"]), mask=mask)


def transformer_keywords(r):
    return dict(
        depth=r.choice([0, 1, 2, 3]),
        dim=r.choice([5, 8, 13]),
        num_latents=r.choice([1, 3, 8, 17]),
        latent_dim=r.choice([8, 16]),
        cross_heads=r.choice([1, 2, 3]),
        latent_heads=2,
        cross_dim_head=r.choice([4, 8]),
        latent_dim_head=8,
        weight_tie_layers=r.random() < 0.4,
        decoder_ff=r.random() < 0.5,
        seq_dropout_prob=r.choice([0.0, 0.0, 0.3, 0.8]),
        attn_residual=r.random() < 0.4,
        attn_residual_rank=3,
        inverted_cross_attn=r.random() < 0.3,
    )


def io_case(name, seed):
    r = random.Random(seed)
    keywords = transformer_keywords(r) | dict(queries_dim=r.choice([4, 7, 12]), logits_dim=r.choice([None, 3]))
    batch, tokens, queries = r.choice([1, 2, 3]), r.choice([1, 2, 17, 60]), r.choice([1, 5, 33])
    inputs = dict(data=torch.randn(batch, tokens, keywords["dim"]), mask=random_mask(r, batch, tokens))
    rank = r.choice([None, 2, 3])
    if rank is not None:
        inputs["queries"] = torch.randn(*[batch] * (rank - 2), queries, keywords["queries_dim"])
    latents = batch, keywords["num_latents"], keywords["latent_dim"]
    earlier = r.choice([None, "one", "two"])
    if earlier is not None:
        inputs["block_outputs"] = torch.randn(latents) if earlier == "one" else [torch.randn(latents)] * 2
    inputs["return_hiddens"] = r.random() < 0.4
    return keywords, inputs


def lm_case(name, seed):
    r = random.Random(seed)
    batch, length = r.choice([1, 2, 3]), r.choice([1, 9, 30])
    keywords = transformer_keywords(r) | dict(num_tokens=11, max_seq_len=30)
    return keywords, dict(x=torch.randint(0, 11, (batch, length)), mask=random_mask(r, batch, length))


def block_case(name, seed):
    r = random.Random(seed)
    batch, tokens, channels = r.choice([1, 2, 3]), r.choice([1, 7, 40]), r.choice([None, 5])
    keywords = BLOCK | dict(context_dim=channels, has_cross_attn=r.random() < 0.8, self_per_cross_attn=r.choice([0, 2]))
    return keywords, dict(
        x=torch.randn(batch, r.choice([1, 6]), 12),
        context=torch.randn(batch, tokens, channels or 12),
        mask=random_mask(r, batch, tokens),
        inverted_attention=r.random() < 0.3,
    )


CASES = {
    "io": (io_case, 80),
    "lm": (lm_case, 30),
    "gated": (grid_case, 25),
    "mixed_latents": (grid_case, 25),
    "experimental": (grid_case, 25),
    "block": (block_case, 30),
}


@pytest.mark.parametrize("name", CASES)
def test_random_configurations(name):
    case, count = CASES[name]

    def rows():
        for seed in range(count):
            torch.manual_seed(seed)
            keywords, inputs = case(name, seed)
            theirs, ours = pair(name, **keywords)
            exact_positions = name in ("gated", "mixed_latents")
            where = (seed, keywords, {k: getattr(v, "shape", v) for k, v in inputs.items()})
            for row in compare_models(theirs, ours, inputs, 1e-13, exact_positions=exact_positions, where=where):
                yield where, *row

    check_float32(rows(), exceptions=1 / 100)  # one unlucky sum shows in several gradients of its model


@pytest.mark.parametrize("name", ["gated", "mixed_latents", "experimental"])
def test_dropout_draws_what_theirs_draws(name):
    """Dropout of feed-forwards drops what perceiver-pytorch drops; attention draws other masks."""
    keywords = SMALL[name] | dict(ff_dropout=0.3)
    theirs, ours = pair(name, **keywords)
    data = torch.randn(2, 5, 4, keywords.get("input_channels", 3))
    list(compare_models(theirs, ours, dict(data=data), exact_positions=name != "experimental"))
    assert not torch.equal(ours(data), ours.eval()(data))


VARIATIONS = [
    *[(name, {}) for name in MODELS],
    *[(name, dict(weight_tie_layers=True, depth=4)) for name in MODELS if name != "block"],
    ("io", dict(attn_residual=True, decoder_ff=True, logits_dim=None)),
    ("io", dict(attn_residual=True, weight_tie_layers=True)),
    ("lm", dict(attn_residual=True, decoder_ff=True)),
    ("io", dict(depth=0)),
    ("block", dict(has_cross_attn=False)),
    ("block", dict(context_dim=None, self_per_cross_attn=0)),
]


@pytest.mark.parametrize("name, extra", VARIATIONS, ids=str)
def test_state_dicts_go_both_ways_and_seeds_agree(name, extra):
    theirs, ours = pair(name, **SMALL[name] | extra)
    expected, actual = theirs.state_dict(), ours.state_dict()
    assert list(actual) == list(expected)
    for key, value in actual.items():
        assert torch.equal(value, expected[key]), key
    # Tied weights are one parameter, and an optimizer's state is by position.
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    theirs.load_state_dict(actual, strict=True)
    ours.load_state_dict(expected, strict=True)


@pytest.mark.parametrize("name", MODELS)
def test_constructors_take_the_same_arguments(name):
    expected, actual = (dict(inspect.signature(model).parameters) for model in MODELS[name])
    if (checkpoint := actual.pop("checkpoint", None)) is not None:  # ours alone
        assert checkpoint.kind is inspect.Parameter.KEYWORD_ONLY and checkpoint.default is False
    missing = {"queries_contribute_kv"} & expected.keys() - actual.keys()
    assert {k: v.default for k, v in actual.items()} == {k: v.default for k, v in expected.items() if k not in missing}
    assert {k: v.kind for k, v in actual.items()} == {k: v.kind for k, v in expected.items() if k not in missing}
    expected, actual = (dict(inspect.signature(model.forward).parameters) for model in MODELS[name])
    if (coords := actual.pop("coords", None)) is not None:  # ours alone
        assert coords.kind is inspect.Parameter.KEYWORD_ONLY and coords.default is None
    assert {k: v.default for k, v in actual.items()} == {k: v.default for k, v in expected.items()}


def test_import_paths():
    assert perceiver_io.PerceiverIO is pf.PerceiverIO and perceiver_io.PerceiverLM is pf.PerceiverLM
    assert len({pf.Perceiver, gated.Perceiver, mixed_latents.Perceiver, experimental.Perceiver}) == 4


def test_checkpoints_of_io_from_0_8():
    theirs, ours = pair("io", **IO | dict(weight_tie_layers=True))
    state = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("cross_attend_block.cross_attn.", "cross_attend_blocks.0.")
        name = name.replace("cross_attend_block.cross_ff.", "cross_attend_blocks.1.").replace(".self_attns.0.", ".")
        state[name] = value
    assert "layers.0.0.fn.to_q.weight" in state and "cross_attend_blocks.0.fn.to_kv.weight" in state
    for parameter in ours.parameters():
        torch.nn.init.zeros_(parameter)
    ours.load_state_dict(state, strict=True)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_experimental_with_fourier_codes_is_theirs_on_encoded_data(tied):
    keywords = GRID | dict(weight_tie_layers=tied)
    ours = experimental.Perceiver(**keywords).double()
    encoded = keywords | dict(fourier_encode_data=False, input_channels=3 + 2 * (2 * 3 + 1))
    theirs = their_experimental.Perceiver(**encoded).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    data = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    axes = [torch.linspace(-1.0, 1.0, size, dtype=torch.float64) for size in (5, 4)]
    codes = fourier_encode(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1), 9.0, 3).flatten(2)
    out = theirs(torch.cat([data, codes.expand(2, -1, -1, -1)], -1))
    expected = torch.autograd.grad(out.square().sum(), [data, theirs.data_proj.weight, theirs.latents])
    actual = ours(data)
    assert relative_error(actual, out) < 1e-12
    gradients = torch.autograd.grad(actual.square().sum(), [data, ours.data_proj.weight, ours.latents])
    for a, b in zip(gradients, expected):
        assert relative_error(a, b) < 1e-10


def test_experimental_leaves_masked_tokens_out():
    ours = experimental.Perceiver(**SMALL["experimental"]).double()
    data, mask = torch.randn(1, 5, 4, 9, dtype=torch.float64), torch.rand(1, 5, 4) > 0.4
    alone = data[mask].view(1, -1, 1, 9)
    assert relative_error(ours(data, mask=mask), ours(alone)) < 1e-12
    assert relative_error(ours(data, mask=mask.flatten(1)), ours(data)) > 1e-3
    nothing = torch.zeros_like(mask)
    assert ours(data, mask=nothing).isfinite().all()


WHOLE_MODELS = [name for name in MODELS if name != "block"]


def small_input(name, batch=2, dtype=torch.float32):
    if name == "lm":
        return torch.randint(0, 20, (batch, 8))
    sizes = (11,) if name == "io" else (5, 4)
    return torch.randn(batch, *sizes, 3 if name in ("gated", "mixed_latents") else 9, dtype=dtype)


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_describe_is_what_the_first_cross_attention_sees(name):
    ours = MODELS[name][1](**SMALL[name])
    paths = {"gated": "layers.0.0.fn", "io": "cross_attend_block.cross_attn"}
    paths["lm"] = "perceiver_io." + paths["io"]
    module, seen = ours.get_submodule(paths.get(name, "layers.0.0")), []
    assert is_cross_attention(module)

    class Look(Observer):
        def attends(self, layer, z, tokens=None, mask=None, inverted=False, fused=True):
            seen.append((layer, tokens, fused))

    data = small_input(name)
    with observing(Look()):
        ours(data)
    layer, tokens, fused = seen[0]
    assert layer is module and fused
    assert torch.equal(tokens.materialize(), ours.describe(data).materialize())


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_other_ways_to_run(name):
    """The reference backend, autocast, and torch.compile give what the ordinary path gives."""
    theirs, ours = pair(name, **SMALL[name])
    data = small_input(name)
    mask = torch.rand(data.shape[:2] if name in ("io", "lm") else data.shape[:-1]) > 0.3
    keywords = dict(queries=torch.randn(6, 7)) if name == "io" else {}
    expected = ours(data, mask=mask, **keywords)
    with pf.use_backend("reference"):
        assert relative_error(ours(data, mask=mask, **keywords), expected) < 1e-5
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert relative_error(compiled(data, mask=mask, **keywords), expected) < 1e-5
    exact = theirs(data, **keywords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, plain = ours(data, **keywords), theirs(data, **keywords)
    assert actual.dtype == plain.dtype
    assert relative_error(actual, exact) <= 2 * relative_error(plain, exact)


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_empty_batch_and_copies(name):
    ours = MODELS[name][1](**SMALL[name]).eval()
    data = small_input(name)
    assert torch.equal(copy.deepcopy(ours)(data), ours(data))
    assert ours(data[:0]).shape[0] == 0


@pytest.mark.parametrize("ff", [False, True])
def test_decoding_in_parts_changes_nothing(ff, monkeypatch):
    from perceiver_fast.models import perceiver_io as module

    _, ours = pair("io", **IO | dict(decoder_ff=ff))
    ours.double()
    data = torch.randn(2, 11, 9, dtype=torch.float64)
    monkeypatch.setattr(module, "DECODER_ROWS", 5)
    for queries in (torch.randn(12, 7).double(), torch.randn(2, 10, 7).double(), torch.randn(0, 7).double()):
        whole = ours(data, queries=queries)
        with torch.no_grad():
            assert relative_error(ours(data, queries=queries), whole) < 1e-14
        assert whole.shape == (2, queries.shape[-2], 4)
