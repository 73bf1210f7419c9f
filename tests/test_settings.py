"""Forced settings hold for one thread or task, and may end in any order."""

import asyncio
import threading

import pytest
import torch

import perceiver_fast as pf
from perceiver_fast.backends import forced_backend
from perceiver_fast.ops.linear_choice import forced_library

SMALL = dict(num_freq_bands=2, depth=2, max_freq=4.0, num_latents=4, latent_dim=8, latent_heads=2, latent_dim_head=4)


@pytest.mark.parametrize(
    "force, value",
    [(pf.use_backend, forced_backend), (lambda _: pf.use_linear("torch"), forced_library)],
    ids=["backend", "linear"],
)
def test_another_thread_is_left_alone(force, value):
    before, seen = value(), []
    with force("reference"):
        assert value() != before
        thread = threading.Thread(target=lambda: seen.append(value()))
        thread.start()
        thread.join()
    assert value() == before and seen == [before]


def test_overlapping_blocks_leave_nothing_behind():
    first, second = pf.use_backend("reference").__enter__(), pf.use_backend("cpu").__enter__()
    first.__exit__()
    assert forced_backend() == "cpu"
    second.__exit__()
    assert forced_backend() == "auto"


def test_what_is_forced_without_a_block_ends_with_the_one_around_it():
    with pf.use_backend("auto"):
        pf.use_backend("reference")
        assert forced_backend() == "reference"
        with pf.use_backend("cpu"):
            pf.use_backend("triton")
        assert forced_backend() == "reference"
    assert forced_backend() == "auto"


def test_what_a_generator_forces_ends_with_it():
    def rows():
        with pf.use_backend("reference"):
            yield forced_backend()
            yield forced_backend()

    one, other = rows(), rows()
    assert next(one) == next(other) == "reference"
    one.close()
    assert forced_backend() == "reference"  # by the other generator, which still runs
    other.close()
    assert forced_backend() == "auto"


def test_tasks_do_not_meet():
    async def task(name, seen):
        with pf.use_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(forced_backend())

    async def both():
        seen = [], []
        await asyncio.gather(task("reference", seen[0]), task("cpu", seen[1]))
        return seen

    assert asyncio.run(both()) == (["reference"] * 3, ["cpu"] * 3)
    assert forced_backend() == "auto"


def test_compiled_models_notice():
    compiled = torch.compile(pf.ops.grid_scale, fullgraph=True, backend="eager")
    arguments = torch.ones(1, 2, 2, 1), torch.zeros(4), torch.full((4,), 2.0), [2, 2]
    expected = compiled(*arguments)
    with pf.use_backend("reference"):
        torch.testing.assert_close(compiled(*arguments), expected)  # it rounds otherwise
    with pf.use_backend("triton"), pytest.raises(Exception, match="it runs on cuda tensors"):
        compiled(*arguments)
    assert torch.equal(compiled(*arguments), expected)


def test_checkpointed_blocks_run_twice_on_what_was_forced(monkeypatch):
    """The backward, which may run in another thread, computes the forward again on the backend that was forced."""
    from perceiver_fast.models import stack

    model, used = pf.Perceiver(**SMALL, checkpoint=True), []
    forward = pf.PerceiverBlock.forward

    def noting(self, *args, **keywords):
        used.append(forced_backend())
        return forward(self, *args, **keywords)

    for block in model.layers:
        block.forward = noting.__get__(block)
    with pf.use_backend("reference"):
        loss = model(torch.randn(1, 5, 4, 3)).sum()
    assert forced_backend() == "auto"
    loss.backward()
    assert used == ["reference"] * 4 and forced_backend() == "auto"
    assert stack.run_checkpointed(lambda x: x, False, 3) == 3
