"""Weights that come from elsewhere when a module is called, and weights in 8 bits: accelerate and torchao on all layers."""

import accelerate
import pytest
import torch
from contract_cases import MODELS, agree, inputs, pair
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", MODELS)
def test_offloaded(name, where, tmp_path):
    results = []
    for index, model in enumerate(pair(name)):
        model.eval()
        with torch.no_grad():
            if where == "cpu":
                model = accelerate.cpu_offload(model, execution_device="cpu")
            else:
                model = accelerate.disk_offload(model, tmp_path / str(index), execution_device="cpu")
            assert all(p.device.type == "meta" for p in model.parameters())
            results.append(model(**inputs(name)))
    agree(results)


def eight_bit(name, config):
    """Outputs of perceiver-pytorch's model and of ours, with weights in 8 bits."""
    results = []
    for model in pair(name):
        quantize_(model.eval(), config)
        assert all(type(m.weight) is not nn.Parameter for m in model.modules() if type(m) is nn.Linear)
        with torch.no_grad():
            results.append(model(**inputs(name)))
    return results


@pytest.mark.parametrize("name", MODELS)
def test_eight_bit_weights(name):
    agree(eight_bit(name, Int8WeightOnlyConfig()))


@pytest.mark.parametrize("name", MODELS)
def test_eight_bit_weights_and_activations(name):
    """Activations are rounded to 8 bits: what differs in the last bit may fall on another of 256 values."""
    theirs, ours = eight_bit(name, Int8DynamicActivationInt8WeightConfig())
    assert (theirs - ours).norm() < 0.02 * theirs.norm()
