"""Hooks on any module of any model are called when perceiver-pytorch's are, see the same, and can change it."""

import pytest
import torch
from contract_cases import MODELS, agree, inputs, modules_of, pair, step
from torch import nn


def seen(value):
    """Types, shapes and dtypes of what a hook is called with."""
    if torch.is_tensor(value):
        return type(value).__name__, tuple(value.shape), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(seen, value))
    if isinstance(value, dict):
        return {key: seen(part) for key, part in value.items()}
    return value


def record(model, register):
    """What the hooks on all modules within a model are called with, in order."""
    calls = []
    for name, module in model.named_modules():
        if name:
            register(module, name, calls)
    return calls


def with_forward_hooks(module, name, calls):
    module.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((name, seen(args), seen(kwargs), seen(out))), with_kwargs=True
    )


def with_pre_hooks(module, name, calls):
    module.register_forward_pre_hook(lambda module, args: calls.append((name, seen(args))))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("register", [with_forward_hooks, with_pre_hooks])
@pytest.mark.parametrize("name", MODELS)
def test_all_hooks_at_once(name, register, training):
    results, calls = [], []
    for model in pair(name):
        calls.append(record(model.train(training), register))
        results.append(model(**inputs(name)).detach())
    agree(results)
    assert calls[0] == calls[1] and len(calls[0]) > 10


@pytest.mark.parametrize("name", MODELS)
def test_a_hook_on_one_module_sees_and_changes_what_it_does_there(name):
    """A hook on one module at a time: the module gets the same input, and the fused layers around it compute the same."""
    theirs, ours = pair(name)
    call = inputs(name)
    for where in modules_of(name):
        results, calls = [], []
        for model in (theirs, ours):
            got = []

            def hook(module, args, kwargs, out, got=got):
                got.append((seen(args), seen(kwargs), seen(out)))
                return out * 0.5

            handle = model.get_submodule(where).register_forward_hook(hook, with_kwargs=True)
            results.append(model(**call).detach())
            calls.append(got)
            handle.remove()
        assert calls[0] == calls[1], where
        agree(results, where=where)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_a_hook_on_one_module_sees_the_same_dtypes_under_autocast(name, dtype):
    theirs, ours = pair(name)
    call = inputs(name)
    for where in modules_of(name):
        calls = []
        for model in (theirs, ours):
            got = []
            handle = model.get_submodule(where).register_forward_pre_hook(
                lambda module, args, kwargs, got=got: got.append((seen(args), seen(kwargs))), with_kwargs=True
            )
            with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
                model(**call)
            calls.append(got)
            handle.remove()
        assert calls[0] == calls[1], where


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["perceiver", "perceiver dense", "gated", "mixed latents"])
def test_what_a_hook_writes_into_the_context_all_blocks_see(name, inference):
    """perceiver-pytorch passes one tensor to all layers, so all see a change that one makes in place."""

    def write(module, args, kwargs):
        kwargs["context"].mul_(0.5)
        kwargs["context"][:, :7] = 0

    results = []
    for model in pair(name, depth=3):
        layer = model.layers[0].cross_attn if hasattr(model.layers[0], "cross_attn") else model.layers[0][0]
        layer.register_forward_pre_hook(write, with_kwargs=True)
        with torch.inference_mode(inference), torch.no_grad():
            results.append(model(**inputs(name)).clone())
    agree(results)


def test_global_hooks_are_seen_by_compiled_models():
    def halve(module, args, out):
        return out * 0.5 if isinstance(module, nn.Linear) else out

    handle = torch.nn.modules.module.register_module_forward_hook(halve)
    try:
        results = [torch.compile(m, backend="eager")(**inputs("perceiver")).detach() for m in pair("perceiver")]
    finally:
        handle.remove()
        torch._dynamo.reset()
    agree(results)


@pytest.mark.parametrize("name", MODELS)
def test_pre_hooks_change_what_goes_in(name):
    theirs, ours = pair(name)
    call = inputs(name)
    for where in modules_of(name, (nn.Linear, nn.LayerNorm)):
        results = []
        for model in (theirs, ours):
            handle = model.get_submodule(where).register_forward_pre_hook(lambda module, args: (args[0] * 0.5 + 0.1,))
            results.append(step(model, **call))
            handle.remove()
        agree(results, where=where)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_backward_hooks(name, full):
    theirs, ours = pair(name)
    call = inputs(name)
    for where in modules_of(name):
        counts, gradients = [], []
        for model in (theirs, ours):
            got = []

            def hook(module, *gradients, got=got):
                got.append([seen(g) for g in gradients])

            module = model.get_submodule(where)
            handle = (module.register_full_backward_hook if full else module.register_full_backward_pre_hook)(hook)
            gradients.append(step(model, **call))
            counts.append(got)
            handle.remove()
        assert counts[0] == counts[1], where
        agree(gradients, where=where)


@pytest.mark.parametrize("name", MODELS)
def test_global_hooks(name):
    calls = []
    for model in pair(name):
        names, got = {id(m): n for n, m in model.named_modules()}, []

        def hook(module, args, out, names=names, got=got):
            got.append((names[id(module)], seen(args), seen(out)))

        handle = torch.nn.modules.module.register_module_forward_hook(hook)
        try:
            model(**inputs(name))
        finally:
            handle.remove()
        calls.append(got)
    assert calls[0] == calls[1] and len(calls[0]) > 10


@pytest.mark.parametrize("name", MODELS)
def test_a_removed_hook_leaves_nothing_behind(name):
    _, ours = pair(name)
    before = ours(**inputs(name))
    handles = [m.register_forward_hook(lambda *a: None) for m in ours.modules()]
    agree([ours(**inputs(name)), before])
    for handle in handles:
        handle.remove()
    assert torch.equal(ours(**inputs(name)), before)
