"""perceiver-pytorch's model of a geometry, with the weights that all peers share."""

from __future__ import annotations

import torch
from torch import nn

from perceiver_fast.commands.peer_model import peer_model
from perceiver_fast.insight.geometries import Geometry


def eager(geometry: Geometry) -> nn.Module:
    """perceiver-pytorch as it is."""
    torch.manual_seed(0)
    return peer_model(geometry)
