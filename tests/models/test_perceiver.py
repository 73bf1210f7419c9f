"""The model against perceiver-pytorch: outputs, gradients, options, checkpoints, bad input."""

import warnings

import pytest
import torch
from support import (
    check_float32,
    compare_models,
    model_pair,
    needs_extension,
    outputs_and_gradients,
    random_config,
    relative_error,
)

import perceiver_fast as pf
from perceiver_fast import reference

SMALL = dict(
    num_freq_bands=4, depth=2, max_freq=10.0, num_latents=7, latent_dim=16, latent_heads=2, latent_dim_head=8,
    cross_dim_head=5, num_classes=6,
)  # fmt: skip


def compare(config, prepare=lambda state, data: data, seed=0, noise=1e-14):
    """:func:`support.compare_models` of a random configuration; ``prepare`` may change weights and data."""
    torch.manual_seed(seed)
    theirs, ours = model_pair(torch.float64, **config["keywords"])
    data = torch.randn(config["batch"], *config["sizes"], config["keywords"]["input_channels"])
    state = {k: v.float() for k, v in theirs.state_dict().items()}
    data = prepare(state, data)
    mask = torch.rand(config["batch"], *config["sizes"]) > 0.4 if config["masked"] else None
    if config["masked"] and config["batch"] > 1:
        mask[0] = False
    weight = torch.randn(config["batch"], config["keywords"]["num_classes"])
    for model in (theirs, ours):
        model.load_state_dict(state)
    yield from compare_models(theirs, ours, dict(data=data, mask=mask), noise, weight, where=config)


def check(seeds, prepare=lambda state, data: data, floor=5e-7, exceptions=1 / 300):
    """Every float64 result within 1e-10; float32 results as :func:`support.check_float32` asks."""
    check_float32(
        ((seed, *row) for seed in seeds for row in compare(random_config(seed), prepare, seed)), floor, exceptions
    )


@pytest.mark.parametrize("block", range(8))
def test_random_configurations(block):
    check(range(block * 30, block * 30 + 30))  # 240 in all


def test_constant_input():
    check(range(300, 320), lambda state, data: torch.full_like(data, 3.7))


def test_input_far_from_zero():
    check(range(320, 340), lambda state, data: data + 100, floor=5e-6, exceptions=1 / 50)


def test_extreme_logits():
    def scale_queries(state, data):
        for name in state:
            if "cross_attn.fn.to_q" in name:
                state[name] = state[name] * 1e4
        return data

    for seed in range(340, 370):
        config = random_config(seed)
        config["keywords"]["depth"] = 1  # a second layer would multiply the first one's rounding by 1e4
        # float64 rounds to 1e-16 of the whole; behind the scaled weights that is up to 1e4 times more.
        list(compare(config, scale_queries, seed, noise=1e-13))


@pytest.mark.parametrize("sizes, latents", [((1, 1), 5), ((1,), 1), ((6, 5), 1), ((1, 1, 1), 1), ((1, 9), 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_one_token_or_one_latent(sizes, latents, masked):
    keywords = SMALL | dict(input_axis=len(sizes), num_latents=latents, input_channels=3)
    list(compare(dict(keywords=keywords, sizes=sizes, batch=2, masked=masked)))


OPTIONS = {
    "own encoding": dict(fourier_encode_data=False, input_channels=9),
    "inverted": dict(inverted_cross_attn=(True, False)),
    "attention residual": dict(attn_residual=True, attn_residual_rank=3),
    "tied": dict(weight_tie_layers=True, depth=4),
    "tied with residual": dict(weight_tie_layers=True, depth=3, attn_residual=True),
    "no head": dict(final_classifier_head=False),
    "no bands": dict(num_freq_bands=0),
    "wide input": dict(input_channels=40),
    "many heads": dict(cross_heads=4),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_options(option, masked, backend):
    keywords = dict(input_channels=3) | SMALL | OPTIONS[option]
    theirs, ours = model_pair(torch.float64, **keywords)
    data = torch.randn(2, 5, 6, keywords["input_channels"], dtype=torch.float64)
    mask = torch.rand(2, 5, 6) > 0.4 if masked else None
    if masked:
        mask[0] = False
    out = theirs(data, mask=mask)
    weight = torch.randn_like(out)
    expected, expected_gradients = outputs_and_gradients(theirs, data, mask, weight)
    with pf.use_backend(backend):
        actual, gradients = outputs_and_gradients(ours, data, mask, weight)
    assert relative_error(actual, expected) < 1e-12
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 1e-10 * expected_gradients[name].norm() + 1e-14, name


@pytest.mark.parametrize("masked", [False, True])
def test_a_long_axis_builds_keys_and_values(masked):
    """Where one axis holds all tokens, keys and values come from the tables, never from the encoding."""
    theirs, ours = model_pair(torch.float64, **SMALL | dict(input_axis=1, input_channels=2, cross_heads=2))
    data = torch.randn(2, 1500, 2, dtype=torch.float64)
    assert pf.explain(ours, data).layers[0].choice.op == "cross_attention"
    mask = torch.rand(2, 1500) > 0.4 if masked else None
    if masked:
        mask[0] = False
    expected, expected_gradients = outputs_and_gradients(theirs, data, mask)
    actual, gradients = outputs_and_gradients(ours, data, mask)
    assert relative_error(actual, expected) < 1e-12
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 1e-10 * expected_gradients[name].norm() + 1e-14, name


def test_forward_arguments():
    theirs, ours = model_pair(torch.float64, **SMALL | dict(attn_residual=True))
    data = torch.randn(2, 5, 6, 3, dtype=torch.float64)
    earlier = [torch.randn(2, 7, 16, dtype=torch.float64) for _ in range(2)]
    calls = [
        dict(return_embeddings=True),
        dict(return_hiddens=True),
        dict(block_outputs=earlier),
        dict(block_outputs=earlier[0], return_hiddens=True, return_embeddings=True),
        dict(mask=torch.rand(2, 30) > 0.5),
    ]
    for call in calls:
        expected, actual = theirs(data, **call), ours(data, **call)
        if call.get("return_hiddens"):
            (expected, hiddens), (actual, our_hiddens) = expected, actual
            assert len(hiddens) == len(our_hiddens)
            for a, b in zip(our_hiddens, hiddens):
                assert a.shape == b.shape and relative_error(a, b) < 1e-12
        assert relative_error(actual, expected) < 1e-12
    assert len(earlier) == 2  # the caller's list is not grown


class SeededDropout(torch.nn.Module):
    """What perceiver-pytorch's attention needs to drop the weights that ours drops."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, weight):
        if not self.training:
            return weight
        return reference.apply_dropout(weight, torch.randint(2**62, (1,)), self.p)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "extra",
    [{}, dict(inverted_cross_attn=True), dict(fourier_encode_data=False, input_channels=9), dict(input_axis=1)],
    ids=str,
)
def test_attention_dropout(extra, masked):
    """Outputs and gradients are perceiver-pytorch's when it drops the same weights; in evaluation none are dropped."""
    keywords = dict(input_channels=3) | SMALL | dict(attn_dropout=0.3, self_per_cross_attn=0, cross_heads=2) | extra
    theirs, ours = model_pair(torch.float64, **keywords)
    for block in theirs.layers:
        block.cross_attn.fn.dropout = SeededDropout(0.3)
    sizes = (1500,) if keywords.get("input_axis") == 1 else (5, 6)
    data = torch.randn(2, *sizes, keywords["input_channels"], dtype=torch.float64)
    mask = torch.rand(2, *sizes) > 0.4 if masked else None
    results = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        results.append(outputs_and_gradients(model.train(), data, mask))
    (expected, expected_gradients), (actual, gradients) = results
    assert relative_error(actual, expected) < 1e-11
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 1e-10 * expected_gradients[name].norm() + 1e-13, name
    assert relative_error(ours.eval()(data), theirs.eval()(data)) < 1e-11
    assert not torch.equal(ours.train()(data), ours.train()(data))


def test_dropout_of_self_attention_has_the_right_mean():
    _, ours = model_pair(torch.float64, **SMALL | dict(attn_dropout=0.2, depth=1))
    attention = ours.layers[0].self_attns[0][0].fn
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    exact = attention.eval()(x)
    attention.train()
    mean = torch.stack([attention(x) for _ in range(3000)]).mean(0)
    assert relative_error(mean, exact) < 0.05


@pytest.mark.parametrize("extra", [{}, dict(weight_tie_layers=True, depth=4), dict(attn_residual=True)], ids=str)
def test_state_dicts_go_both_ways_and_seeds_agree(extra):
    import perceiver_pytorch

    torch.manual_seed(5)
    theirs = perceiver_pytorch.Perceiver(**SMALL | extra)
    torch.manual_seed(5)
    ours = pf.Perceiver(**SMALL | extra)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))  # tied weights are one parameter
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def old_layout(state, release):
    """A state_dict as perceiver-pytorch 0.9, 0.7.4 or 0.6 would have saved it."""
    old = {}
    for name, value in state.items():
        name = name.replace(".cross_attn.", ".0.").replace(".cross_ff.", ".1.").replace(".self_attns.", ".2.")
        if release in ("0.6", "0.7.4"):
            name = name.replace(".to_out.", ".to_out.0.").replace(".net.2.", ".net.3.")
        if release == "0.6":
            name = name.replace("to_logits.1", "to_logits.0").replace("to_logits.2", "to_logits.1")
        old[name] = value
    return old


@pytest.mark.parametrize("release", ["0.9", "0.7.4", "0.6"])
@pytest.mark.parametrize("extra", [{}, dict(weight_tie_layers=True, depth=3, self_per_cross_attn=2)], ids=str)
def test_old_checkpoints(release, extra):
    theirs, ours = model_pair(**SMALL | extra)
    state = old_layout(theirs.state_dict(), release)
    assert release != "0.9" or "layers.0.0.fn.to_q.weight" in state
    for parameter in ours.parameters():
        torch.nn.init.zeros_(parameter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.load_state_dict(state, strict=True)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    assert bool(caught) == (release == "0.6")
    whole = torch.nn.Sequential(torch.nn.Identity(), ours)  # and as a part of a larger model
    if release == "0.9":
        whole.load_state_dict({f"1.{name}": value for name, value in state.items()}, strict=True)


def test_tied_layers_and_cached_codes_share_their_work():
    ours = pf.Perceiver(**SMALL | dict(weight_tie_layers=True, depth=4))
    assert ours.layers[1] is ours.layers[2] and ours.layers[0] is not ours.layers[1]
    tokens = ours.describe(torch.randn(1, 5, 5, 3))
    assert tokens.codes[0] is tokens.codes[1]  # equal sizes: one cached table
    assert tokens.codes[0] is ours.describe(torch.randn(3, 5, 9, 3)).codes[0]


def test_codes_cached_under_inference_mode_serve_training():
    ours = pf.Perceiver(**SMALL)
    data = torch.randn(1, 11, 23, 3)
    with torch.inference_mode():
        ours(data)
    ours(data).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_dtypes_are_no_worse_than_theirs(dtype, autocast):
    theirs, ours = model_pair(torch.float64, **SMALL)
    data = torch.randn(2, 15, 12, 3).to(dtype)
    exact = theirs(data.double())
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        models = [m.to(torch.float32 if autocast else dtype) for m in (ours, theirs)]
        actual, plain = (model(data) for model in models)
    assert actual.dtype == plain.dtype
    assert relative_error(actual, exact) <= 2 * relative_error(plain, exact)


@pytest.mark.skipif(**needs_extension)
def test_forced_backends_of_models():
    data = torch.randn(1, 5, 6, 3)
    for extra in (
        dict(inverted_cross_attn=True),
        dict(attn_dropout=0.1),
        dict(fourier_encode_data=False),
        dict(fourier_encode_data=False, inverted_cross_attn=True, attn_dropout=0.1),
    ):
        model = pf.Perceiver(**SMALL | extra)
        with pf.use_backend("cpu"):
            assert model(data).isfinite().all()
        with pf.use_backend("cuda"), pytest.raises(pf.BackendError, match="has no backend of that name"):
            model(data)


def test_nan_and_infinity_propagate_as_theirs():
    theirs, ours = model_pair(**SMALL | dict(input_channels=3))
    for value in (float("nan"), float("inf")):
        for masked in (False, True):
            data = torch.randn(2, 5, 6, 3)
            data[1, 2, 3, 0] = value
            mask = torch.ones(2, 5, 6, dtype=torch.bool) if masked else None
            if masked:
                mask[1, 2, 3] = False
            expected, actual = theirs(data, mask=mask), ours(data, mask=mask)
            assert torch.equal(actual.isnan(), expected.isnan())
            assert relative_error(actual[:1], expected[:1]) < 1e-5


@pytest.mark.parametrize(
    "data, mask, error, words",
    [
        (torch.randn(1, 5, 3), None, ValueError, r"4 dimensions \[batch, n_1, n_2, 3\].*got 3: \(1, 5, 3\)"),
        (torch.randn(1, 3, 5, 6), None, ValueError, "3 channels last.*got 6.*permute"),
        (torch.randn(1, 5, 0, 3), None, ValueError, r"at least one position.*\(1, 5, 0, 3\)"),
        (torch.ones(1, 5, 6, 3, dtype=torch.uint8), None, TypeError, "floating-point.*uint8.*float"),
        (torch.ones(1, 5, 6, 3, dtype=torch.complex64), None, TypeError, "complex64.*view_as_real"),
        (torch.randn(1, 5, 6, 3).double(), None, TypeError, "dtype torch.float32.*float64.*convert"),
        (torch.randn(1, 5, 6, 3, device="meta"), None, ValueError, "data on cpu.*got meta.*move"),
        ([[1.0]], None, TypeError, "torch.Tensor, got list"),
        (torch.randn(1, 5, 6, 3), torch.ones(1, 29, dtype=torch.bool), ValueError, r"\(1, 30\) or \(1, 5, 6\).*29"),
        (torch.randn(1, 5, 6, 3), torch.ones(2, 30, dtype=torch.bool), ValueError, r"got \(2, 30\)"),
        (torch.randn(1, 5, 6, 3), torch.ones(1, 30), TypeError, r"bool mask.*float32.*mask\.bool"),
        (torch.randn(1, 5, 6, 3), torch.ones(1, 30, dtype=torch.bool, device="meta"), ValueError, "mask on cpu"),
        (torch.randn(1, 5, 6, 3), [True], TypeError, "mask to be a torch.Tensor"),
    ],
)
def test_bad_input_is_explained(data, mask, error, words):
    model = pf.Perceiver(**SMALL)
    for call in (model, lambda d, mask: pf.explain(model, d, mask)):
        with pytest.raises(error, match=words):
            call(data, mask=mask)


def test_bad_arguments_are_explained():
    with pytest.raises(ValueError, match="2 of them for depth=2, got 3"):
        pf.Perceiver(**SMALL | dict(inverted_cross_attn=(True, False, True)))
    with pytest.raises(ValueError, match="expected one of 'auto', 'cpu', 'triton', 'cuda', 'reference', got 'gpu'"):
        pf.use_backend("gpu")


def test_empty_batch():
    assert pf.Perceiver(**SMALL)(torch.randn(0, 5, 6, 3)).shape == (0, 6)


def test_a_model_can_be_pickled_and_copied():
    import copy
    import io

    model, data = pf.Perceiver(**SMALL), torch.randn(1, 5, 6, 3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(other(data), model(data))


def test_one_mask_for_the_whole_batch():
    theirs, ours = model_pair(torch.float64, **SMALL)
    data, mask = torch.randn(3, 5, 6, 3, dtype=torch.float64), torch.rand(1, 30) > 0.4
    assert relative_error(ours(data, mask=mask), theirs(data, mask=mask)) < 1e-12
