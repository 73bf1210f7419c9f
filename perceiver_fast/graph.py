"""A model's inference as one CUDA graph: all kernels of a call are launched at once.

At batch 1 a Perceiver is hundreds of small kernels, and launching them takes the host longer than the GPU needs to run
them. A graph records them once, on fixed memory, and replays them with one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from perceiver_fast.backends import forced_backend

WARM_UP = 3  # calls before the recording, in which kernels are compiled and libraries allocate their workspaces


def _capture(run: Callable[[], object]) -> tuple[Callable[[], None], object]:
    """Record ``run()``.

    Returns:
        A function that replays it, and its output, which every replay overwrites.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        output = run()
    return recorded.replay, output


def _autocast() -> tuple[bool, torch.dtype]:
    """Whether autocast is on, and the dtype it asks for."""
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


class Graph:
    """What :func:`graph` returns: it is called like the model, with inputs of the example's shapes.

    Args:
        model, args, kwargs, copy: see :func:`graph`.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict, copy: bool):
        self.model = model
        self.copy = copy
        leaves, self._structure = pytree.tree_flatten((args, kwargs))
        with torch.inference_mode(False):  # inference tensors could not be written to later, outside of inference mode
            self._inputs = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._record()

    def _state(self) -> tuple:
        """All that a recording depends on: where weights lie, the model's mode, autocast, and the forced backend."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return (
            tuple((t.data_ptr(), t.dtype) for t in tensors),
            tuple(m.training for m in self.model.modules()),
            _autocast(),
            forced_backend(),
        )

    def _record(self) -> None:
        """Record the model on the graph's own inputs."""
        args, kwargs = pytree.tree_unflatten(self._inputs, self._structure)
        enabled, dtype = _autocast()

        def run():
            # Autocast caches cast weights until its block ends, and then frees them; a replay would read freed memory.
            with torch.no_grad(), torch.autocast("cuda", dtype, enabled, cache_enabled=False):
                return self.model(*args, **kwargs)

        self._recorded = self._state()
        with torch.cuda.device(next(t for t in self._inputs if isinstance(t, Tensor)).device):
            self._replay, self._output = _capture(run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for these inputs; without gradients.

        Raises:
            TypeError, ValueError: the inputs are not of the example's structure, shapes, dtypes and devices.
        """
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if structure != self._structure:
            raise TypeError(
                f"graph: expected arguments as in the example, {self._structure}, got {structure}; "
                "make another graph for another way of calling"
            )
        for mine, given in zip(self._inputs, leaves):
            self._check(mine, given)
        if self._state() != self._recorded:  # the values of weights may change, not where they are
            self._record()
        with torch.no_grad():  # else inputs that require gradients would link all calls in one autograd graph
            for mine, given in zip(self._inputs, leaves):
                if isinstance(mine, Tensor):
                    mine.copy_(given)
        self._replay()
        return pytree.tree_map_only(Tensor, Tensor.clone, self._output) if self.copy else self._output

    @staticmethod
    def _check(mine: object, given: object) -> None:
        """Raise ValueError unless ``given`` is like ``mine``, the example's."""
        if not isinstance(mine, Tensor):
            if mine != given:
                raise ValueError(
                    f"graph: expected {mine!r}, as in the example, got {given!r}; make another graph for it"
                )
            return
        want = (tuple(mine.shape), mine.dtype, mine.device)
        got = (tuple(given.shape), given.dtype, given.device) if isinstance(given, Tensor) else type(given).__name__
        if got != want:
            raise ValueError(
                f"graph: expected a tensor like the example's, {want}, got {got}; a graph is for one shape: "
                "pad the input, or make another graph"
            )


def graph(model: nn.Module, *args: Any, copy: bool = True, **kwargs: Any) -> Graph:
    """Record ``model``'s inference on an example, to be replayed on other inputs of the same shapes.

    The recording follows in-place changes of the weights (optimizer steps, load_state_dict), and is made again when
    they move or the model's mode changes. It holds the memory of one call.

    Args:
        model: on a CUDA device; any model of this package.
        *args, **kwargs: an example, as its forward takes it, on the same device.
        copy: return a copy of the output. If False, the output's memory is overwritten by the next call. Default: True.

    Returns:
        Graph: call it as the model. No gradients.

    Raises:
        ValueError: there is no CUDA device, the example holds no tensor, or tensors are on other devices.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> if torch.cuda.is_available():
        ...     model = pf.Perceiver(num_freq_bands=6, depth=1, max_freq=10.0).cuda().eval()
        ...     fast = pf.graph(model, torch.randn(1, 224, 224, 3, device="cuda"))
        ...     logits = fast(torch.randn(1, 224, 224, 3, device="cuda"))
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {str(t.device) for t in (*tensors, *model.parameters())}
    if not tensors:
        raise ValueError("graph: expected an example with a tensor, got none; call graph(model, data)")
    if len(devices) != 1 or tensors[0].device.type != "cuda":
        raise ValueError(
            f"graph: expected the model and the example on one CUDA device, got {', '.join(sorted(devices))}; "
            "CPUs need no graph, since they launch nothing: call the model itself"
        )
    return Graph(model, args, kwargs, copy)
