"""Drop-in models: perceiver-pytorch's arguments, state_dict and numbers; and models of several modalities."""

from perceiver_fast.models.modality import Modality
from perceiver_fast.models.multimodal import MultimodalPerceiver
from perceiver_fast.models.perceiver import Perceiver
from perceiver_fast.models.perceiver_io import PerceiverIO
from perceiver_fast.models.perceiver_lm import PerceiverLM

__all__ = ["Modality", "MultimodalPerceiver", "Perceiver", "PerceiverIO", "PerceiverLM"]
