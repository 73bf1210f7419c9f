"""The test cases: transformers' ModelTesterMixin on every Perceiver head. With ACCELERATE=1 every model is accelerated.

Not for pytest here: ``python -m tests.adapters.suite`` copies it to where transformers has the tests of a model.
"""

import functools
import os
import unittest

import torch
from adapters.perceivers import SIZES, perceiver, transformers

import perceiver_fast as pf

from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

TEXT = perceiver.PerceiverForMaskedLM, perceiver.PerceiverForSequenceClassification
IMAGES = {
    perceiver.PerceiverForImageClassificationLearned: (8, 8),
    perceiver.PerceiverForImageClassificationFourier: (9, 11),
    perceiver.PerceiverForImageClassificationConvProcessing: (20, 24),
}
HEADS = (*TEXT, *IMAGES, perceiver.PerceiverForOpticalFlow, perceiver.PerceiverForMultimodalAutoencoding)
made = []  # names of the heads that were accelerated


def accelerate_when_made(head):
    init = head.__init__

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self) is head:
            assert pf.accelerate(self)
            made.append(head.__name__)

    head.__init__ = __init__


if os.environ["ACCELERATE"] == "1":
    for head in HEADS:
        accelerate_when_made(head)


class Tester:
    """What the mixin asks for a configuration and for inputs."""

    is_training, batch_size, num_attention_heads, hidden_size = True, 3, 2, 16
    num_hidden_layers, seq_length = 2, 5  # self-attentions; latents

    def __init__(self, head):
        self.head = head

    def get_config(self):
        heads = dict(num_cross_attention_heads=2) if self.head in TEXT else {}
        return transformers.PerceiverConfig(**SIZES | dict(vocab_size=40, num_blocks=1) | heads)

    def prepare_config_and_inputs_for_common(self):
        batch, head = self.batch_size, self.head
        if head in TEXT:
            inputs = dict(inputs=ids_tensor([batch, 12], 40), attention_mask=torch.ones(batch, 12, dtype=torch.long))
        elif head in IMAGES:
            inputs = dict(inputs=floats_tensor([batch, 3, *IMAGES[head]]))
        elif head is perceiver.PerceiverForOpticalFlow:
            inputs = dict(inputs=floats_tensor([batch, 2, 27, 4, 6]))
        else:
            shapes = dict(image=[batch, 2, 3, 8, 8], audio=[batch, 16, 1], label=[batch, 4])
            points = dict(image=torch.arange(10, 50), audio=torch.tensor([4, 0, 3]), label=None)
            modalities = {name: floats_tensor(shape) for name, shape in shapes.items()}
            inputs = dict(inputs=modalities, subsampled_output_points=points)
        return self.get_config(), inputs

    def prepare_config_and_inputs_for_model_class(self, model_class):
        return self.prepare_config_and_inputs_for_common()


class Common(ModelTesterMixin):
    """transformers' tests of any model."""

    all_model_classes = ()
    test_resize_embeddings = test_missing_keys = is_encoder_decoder = False
    has_attentions = True

    def setUp(self):
        self.model_tester = Tester(self.all_model_classes[0])

    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        if not return_labels or model_class not in (*TEXT, *IMAGES):
            return dict(inputs)
        shape = (3, 12) if model_class is perceiver.PerceiverForMaskedLM else (3,)
        return inputs | dict(labels=torch.zeros(shape, dtype=torch.long))


for head in HEADS:
    globals()[head.__name__ + "Test"] = type(
        head.__name__ + "Test", (Common, unittest.TestCase), dict(all_model_classes=(head,))
    )


def test_models_were_accelerated():
    """Runs last: with ACCELERATE=1 every head was made more than once."""
    assert os.environ["ACCELERATE"] != "1" or {head.__name__ for head in HEADS} == set(made)
