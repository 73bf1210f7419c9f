"""Models on a device without float64, beside the CPU: a script, since torch cannot let go of a device once it has it.

Prints for every case the largest differences of outputs and of gradients, relative to the CPU's, or what was raised.
"""

import copy
import json
import os
import sys
import types

import torch
from contract_cases import MODELS, inputs, pair
from torch.utils._pytree import tree_map_only
from torch.utils.cpp_extension import load

import perceiver_fast as pf

DEVICE = "nodouble"
SMALL = dict(num_freq_bands=3, depth=2, max_freq=6.0, num_latents=5, latent_dim=16, num_classes=4)
IO = dict(depth=1, dim=9, queries_dim=14, logits_dim=2, num_latents=8, latent_dim=16)


def register(source: str, folder: str) -> None:
    """Build the device and let torch know it."""
    load("device_without_float64", [source], is_python_module=False, extra_cflags=["-O0"], build_directory=folder)
    torch.utils.rename_privateuse1_backend(DEVICE)
    module = types.ModuleType(f"torch.{DEVICE}")
    module.is_available, module.is_initialized, module._is_in_bad_fork = (lambda: True), (lambda: True), (lambda: False)
    module.device_count, module.current_device = (lambda: 1), (lambda: 0)
    module.get_amp_supported_dtype, module.manual_seed_all = (lambda: [torch.bfloat16]), (lambda seed: None)
    torch._register_device_module(DEVICE, module)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def described(embed_data: bool, points: bool):
    """A PerceiverIO of described data and queries."""

    def call(model, device):
        embed = torch.nn.Linear(3 + 2 * 7, 9) if embed_data else None
        if embed is not None:
            with torch.no_grad():
                embed.weight.copy_(draw(9, 17) / 4), embed.bias.copy_(draw(9))
            embed = embed.to(device)
        feat = draw(2, 5, 4, 3).to(device) if not points else draw(2, 20, 3).to(device)
        codes = dict(num_freq_bands=3, max_freq=6.0)
        if points:
            data = pf.point_tokens(draw(2, 20, 2).tanh().to(device), feat=feat, embed=embed, **codes)
            queries = pf.point_tokens(draw(1, 11, 2).tanh().to(device), **codes)
        else:
            data = pf.grid_tokens((5, 4), feat=feat, embed=embed, **codes)
            queries = pf.grid_tokens((4, 5), **codes)
        return model(data, queries=queries)

    return (lambda: pf.PerceiverIO(**IO | dict(dim=9 if embed_data else 17))), call


def called(make, **call):
    def run(model, device):
        return model(**tree_map_only(torch.Tensor, lambda t: t.to(device), call))

    return make, run


def multimodal():
    modalities = [pf.Modality("image", 3, 2, 4, 8.0), pf.Modality("sound", 2, 1, 3, 6.0)]
    return pf.MultimodalPerceiver(
        modalities=modalities, **{k: SMALL[k] for k in ("depth", "num_latents", "latent_dim", "num_classes")}
    )


# Their GRU cell and convolution need kernels of the device, which this one has not; they describe what Perceiver does.
WITHOUT_KERNELS = ("gated", "mixed latents")

CASES = {
    **{name: called(lambda name=name: pair(name)[1], **inputs(name)) for name in MODELS if name not in WITHOUT_KERNELS},
    "points": called(lambda: pf.Perceiver(**SMALL), data=draw(2, 30, 3), coords=draw(2, 30, 2).tanh()),
    "one long axis": called(lambda: pf.Perceiver(**SMALL | dict(input_axis=1)), data=draw(1, 1100, 3)),
    "no frequencies": called(lambda: pf.Perceiver(**SMALL | dict(num_freq_bands=0)), data=draw(2, 6, 5, 3)),
    "groups": called(multimodal, data=dict(image=draw(2, 6, 5, 3), sound=draw(2, 40, 2))),
    "checkpoint": called(lambda: pf.Perceiver(**SMALL | dict(checkpoint=True)), data=draw(2, 6, 5, 3)),
    **{
        f"described {'points' if points else 'grid'}{', embedded' if embed else ''}": described(embed, points)
        for points in (False, True)
        for embed in (False, True)
    },
}


def results(make, call, device):
    """Outputs and the gradients of all parameters, on the CPU."""
    torch.manual_seed(0)
    model = copy.deepcopy(make().eval()).to(device)
    out = call(model, device)
    weight = torch.linspace(0.5, 1.5, out.numel()).view(out.shape).to(device)
    (out * weight).sum().backward()
    return [out.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]


def compare(make, call):
    expected, found = results(make, call, "cpu"), results(make, call, DEVICE)
    assert len(expected) == len(found)
    whole = max(t.abs().max().item() for t in expected[1:])
    of_gradients = max((a - b).abs().max().item() for a, b in zip(expected[1:], found[1:])) / whole
    return [((found[0] - expected[0]).abs().max() / expected[0].abs().max()).item(), of_gradients]


def main(source: str, folder: str) -> None:
    register(source, folder)
    found = {}
    for name, case in CASES.items():
        try:
            found[name] = compare(*case)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    tensor = torch.ones(1).to(DEVICE)
    try:
        tensor.double()
    except TypeError as error:
        found["float64"] = str(error)
    print(json.dumps(found), flush=True)
    os._exit(0)  # the device's autograd thread does not end by itself


if __name__ == "__main__":
    main(*sys.argv[1:])
