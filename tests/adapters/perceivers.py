"""Tiny models of transformers' Perceiver classes, in float64, with weights far from their initial ones; and inputs."""

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pf.accelerate was NOT tested on it"
)

from transformers.models.perceiver import modeling_perceiver as perceiver  # noqa: E402

SIZES = dict(
    num_latents=5, d_latents=16, d_model=24, num_blocks=2, num_self_attends_per_block=2, num_self_attention_heads=2,
    num_cross_attention_heads=1, num_labels=4, attention_probs_dropout_prob=0.0, vocab_size=30,
    max_position_embeddings=12, image_size=8, train_size=[4, 6], num_frames=2, audio_samples_per_frame=8,
    samples_per_patch=2, output_shape=[1, 2, 8, 8], output_num_channels=7, _label_trainable_num_channels=16,
)  # fmt: skip
NAMES = (
    "masked lm",
    "sequence",
    "learned",
    "fourier",
    "conv",
    "flow",
    "multimodal",
    "bare",
    "fourier decoder",
    "added",
)


def config(**changes):
    return transformers.PerceiverConfig(**SIZES | changes)


def images(draw, batch, *sizes):
    return dict(inputs=draw(batch, *sizes))


def text(batch, masked=True):
    ids = torch.randint(0, 30, (batch, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[0, 7:] = 0
    mask[-1, 1:4] = 0
    return dict(inputs=ids, attention_mask=mask) if masked else dict(inputs=ids)


def image_preprocessor(options, **changes):
    keywords = dict(
        prep_type="pixels", spatial_downsample=1,
        fourier_position_encoding_kwargs=dict(num_bands=3, max_resolution=(5, 9), concat_pos=True, sine_only=False),
    )  # fmt: skip
    return perceiver.PerceiverImagePreprocessor(options, **keywords | changes)


def bare(draw, batch, options):
    """A PerceiverModel of a sine-only preprocessor and a decoder of learned queries with a residual."""
    codes = dict(num_bands=3, max_resolution=(5, 9), concat_pos=True, sine_only=True)
    decoder = perceiver.PerceiverBasicDecoder(
        options, output_num_channels=3, num_channels=10, num_heads=2, use_query_residual=True,
        trainable_position_encoding_kwargs=dict(num_channels=10, index_dims=6),
    )  # fmt: skip
    model = perceiver.PerceiverModel(
        options, decoder=decoder, input_preprocessor=image_preprocessor(options, fourier_position_encoding_kwargs=codes)
    )
    mask = torch.ones(batch, 63)
    mask[0, 20:] = 0
    return model, dict(inputs=draw(batch, 3, 7, 9), attention_mask=mask)


def fourier_decoder(draw, batch, options):
    """A flow decoder, whose queries are the tokens, that adds them to its output."""
    preprocessor = image_preprocessor(options)
    decoder = perceiver.PerceiverOpticalFlowDecoder(
        options, output_image_shape=[7, 9], num_channels=preprocessor.num_channels, num_heads=1, use_query_residual=True,
        position_encoding_type="fourier",
        fourier_position_encoding_kwargs=dict(num_bands=3, max_resolution=(5, 9), concat_pos=True, sine_only=False),
    )  # fmt: skip
    return perceiver.PerceiverModel(options, decoder=decoder, input_preprocessor=preprocessor), images(
        draw, batch, 3, 7, 9
    )


def added(draw, batch, options):
    """Positions that are added to a convolution's channels."""
    preprocessor = image_preprocessor(
        options, prep_type="conv1x1", out_channels=14, concat_or_add_pos="add", project_pos_dim=14,
        position_encoding_type="trainable", trainable_position_encoding_kwargs=dict(num_channels=14, index_dims=63),
        fourier_position_encoding_kwargs=None,
    )  # fmt: skip
    return perceiver.PerceiverModel(options, decoder=None, input_preprocessor=preprocessor), images(
        draw, batch, 3, 7, 9
    )


def build(name, batch=2, dtype=torch.float64, seed=0, **changes):
    """A model and the keywords it is called with."""
    torch.manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)

    if name == "masked lm":
        options = dict(num_cross_attention_heads=2, qk_channels=8, v_channels=16)
        model, inputs = transformers.PerceiverForMaskedLM(config(**options | changes)), text(batch)
    elif name == "sequence":
        model = transformers.PerceiverForSequenceClassification(config(**dict(num_cross_attention_heads=2) | changes))
        inputs = text(batch)
    elif name == "learned":
        model = transformers.PerceiverForImageClassificationLearned(config(**changes))
        inputs = images(draw, batch, 3, 8, 8)
    elif name == "fourier":
        model = transformers.PerceiverForImageClassificationFourier(config(**changes))
        inputs = images(draw, batch, 3, 9, 11)
    elif name == "conv":
        model = transformers.PerceiverForImageClassificationConvProcessing(config(**changes))
        inputs = images(draw, batch, 3, 20, 24)
    elif name == "flow":
        model = transformers.PerceiverForOpticalFlow(config(**changes))
        inputs = images(draw, batch, 2, 27, 4, 6)
    elif name == "multimodal":
        model = transformers.PerceiverForMultimodalAutoencoding(config(**changes))
        points = dict(image=torch.arange(10, 50), audio=torch.tensor([4, 0, 3]), label=None)
        modalities = dict(image=draw(batch, 2, 3, 8, 8), audio=draw(batch, 16, 1), label=draw(batch, 4))
        inputs = dict(inputs=modalities, subsampled_output_points=points)
    else:
        model, inputs = dict(bare=bare, added=added, **{"fourier decoder": fourier_decoder})[name](
            draw, batch, config(**changes)
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(noise * scale + (0.5 if parameter.dim() == 1 else 0.0))
    return model.to(dtype).eval(), inputs
