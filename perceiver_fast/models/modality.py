"""What a modality is, and checks of the arguments and inputs of a multimodal Perceiver."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from perceiver_fast.layers.checks import check_data, check_mask
from perceiver_fast.models.inputs import check_coords

# One modality's input: on its grid [B, n_1, .., n_A, F], or at positions of its own ([B, M, F], [B, M, A] or [M, A]).
ModalityInput = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Modality:
    """One modality of a :class:`MultimodalPerceiver`: its raw channels, its axes, and the Fourier codes of positions.

    Args:
        name: what its data is called in a forward, and its embedding in the state_dict.
        input_channels: raw channels of a token, F; 0 for points that are nothing but their positions.
        input_axis: number of axes, A: 1 for audio, 2 for images, 3 for video and point clouds.
        num_freq_bands: Fourier frequencies per axis, K.
        max_freq: the highest frequency is max_freq / 2.

    Raises:
        ValueError: a name that cannot name a parameter, or numbers that make no tokens.

    Example:
        >>> from perceiver_fast import Modality
        >>> Modality("audio", input_channels=1, input_axis=1, num_freq_bands=64, max_freq=16000.0).own_channels
        130
    """

    name: str
    input_channels: int
    input_axis: int
    num_freq_bands: int
    max_freq: float

    def __post_init__(self) -> None:
        name = self.name
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ParameterDict(), name):
            raise ValueError(
                f"Modality: expected a name that a parameter can have, got {name!r}; use another, without a dot"
            )
        for field, least in (("input_channels", 0), ("input_axis", 1), ("num_freq_bands", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Modality {name!r}: expected {field} to be an int of at least {least}, got {value!r}")
        if not math.isfinite(self.max_freq):
            raise ValueError(f"Modality {name!r}: expected a finite max_freq, got {self.max_freq!r}")

    @property
    def own_channels(self) -> int:
        """Channels of a token beside its embedding, F + A (2 K + 1)."""
        return self.input_channels + self.input_axis * (2 * self.num_freq_bands + 1)


def check_modalities(who: str, modalities: Sequence[Modality], modality_channels: int) -> None:
    """Check the modalities that a model is built with.

    Raises:
        TypeError, ValueError: the message says expected, got and what to do.
    """
    if not modalities:
        raise ValueError(f"{who}: expected at least one Modality, got none")
    if wrong := [modality for modality in modalities if not isinstance(modality, Modality)]:
        raise TypeError(f"{who}: expected modalities to be of perceiver_fast.Modality, got {wrong[0]!r}")
    names = [modality.name for modality in modalities]
    if len(set(names)) != len(names):
        raise ValueError(f"{who}: expected modalities of different names, got {', '.join(map(repr, names))}")
    if not isinstance(modality_channels, int) or modality_channels < 1:
        raise ValueError(
            f"{who}: expected modality_channels to be an int of at least 1, got {modality_channels!r}; without an "
            "embedding nothing says which modality a token is of"
        )


def check_modality_inputs(
    who: str,
    modalities: Sequence[Modality],
    data: Mapping[str, ModalityInput],
    mask: Mapping[str, Tensor | None] | None,
    like: Tensor,
) -> dict[str, Tensor | None]:
    """Check the data and masks of a forward.

    Args:
        who: the model's name, for messages.
        modalities: what the model was built with.
        data, mask: as its forward takes them.
        like: a parameter of the model, whose dtype and device are expected.

    Returns:
        For every modality in ``data``, its mask or None.

    Raises:
        TypeError, ValueError: the message says expected, got and what to do.
    """
    known = {modality.name: modality for modality in modalities}
    mask = {} if mask is None else mask
    for what, named, among in (("data", data, known), ("mask", mask, data)):
        if not isinstance(named, Mapping):
            raise TypeError(
                f"{who}: expected {what} to be a dict from modality to tensor, got {type(named).__name__}; "
                f"give {{{next(iter(known))!r}: {what}}}"
            )
        if unknown := [name for name in named if name not in among]:
            raise ValueError(
                f"{who}: expected {what} of {', '.join(map(repr, among))} alone, got {', '.join(map(repr, unknown))}; "
                "leave it out, or name one of these"
            )
    if not data:
        raise ValueError(f"{who}: expected data of at least one of {', '.join(map(repr, known))}, got none")
    masks: dict[str, Tensor | None] = {}
    first: tuple[str, int] | None = None
    for name, modality in known.items():
        if name not in data:
            continue
        what, given = f"data[{name!r}]", data[name]
        channels: dict[str, Any] = dict(channels=modality.input_channels, channels_argument="input_channels")
        if isinstance(given, Tensor):
            check_data(who, what, given, like, axes=modality.input_axis, axes_argument="input_axis", **channels)
        else:
            if not isinstance(given, (tuple, list)) or len(given) != 2:
                raise TypeError(
                    f"{who}: expected {what} to be a torch.Tensor on a grid, or a pair (data [batch, M, "
                    f"{modality.input_channels}], coords [batch, M, {modality.input_axis}]), "
                    f"got {type(given).__name__}"
                )
            given, coords = given
            check_data(who, f"{what}[0]", given, like, axes=1, **channels)
            check_coords(who, f"{what}[1]", coords, given, modality.input_axis)
        if first is not None and given.shape[0] != first[1]:
            raise ValueError(
                f"{who}: expected one batch size of all modalities, got {first[1]} of {first[0]!r} and "
                f"{given.shape[0]} of {name!r}; mask what is missing from a batch element, with mask[{name!r}]"
            )
        first = first or (name, given.shape[0])
        masks[name] = check_mask(f"{who}: {name}", mask.get(name), what, given, given.shape[1:-1])
    return masks
