"""How a sweep over a grid is cut: programs fill the GPU, and no few of them begin when all others have ended."""

import pytest
import torch

from perceiver_fast.gpu import multiprocessors
from perceiver_fast.kernels.configs import Config, config
from perceiver_fast.kernels.grid import GROUP, Grid, blocks

CPU = torch.device("cpu")  # stands for an H100


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("tile", [config("grid_attention_forward[bf16]", 90), Config(64, 32, 4, registers=168)])
def test_splits_fill_the_gpu(batch, tile):
    cut = blocks(Grid(batch, 512, 3, (224, 224), "bf16"), tile, CPU)
    at_once = tile.resident * multiprocessors(CPU)
    turns = -(-batch * cut.queries * cut.columns * cut.splits // at_once)
    assert cut.splits * cut.rows_per_split >= 224 and cut.rows_per_split % GROUP == 0
    work = batch * cut.queries * cut.columns * 224  # rows, over all programs
    assert turns * cut.rows_per_split <= 1.5 * max(work / at_once, GROUP)


def test_residency_is_what_registers_allow():
    assert [Config(64, 32, 4, registers=n).resident for n in (128, 168, 169, 255, None)] == [4, 3, 2, 2, 2]
