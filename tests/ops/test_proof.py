"""Kernels prove themselves on a device before they are chosen there: when they are tried, what is remembered, what is said.

Stand-ins for a GPU and for kernels; tests/kernels/test_proof.py breaks real ones.
"""

import threading
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import perceiver_fast as pf
from perceiver_fast import remembered
from perceiver_fast.backends import Backend, choose
from perceiver_fast.gpu import assumed
from perceiver_fast.ops import proof, trial
from perceiver_fast.ops.declaration import OPS
from perceiver_fast.ops.geglu import GEGLU
from perceiver_fast.ops.make import Same
from perceiver_fast.ops.pointwise import PointwiseCall
from perceiver_fast.ops.trial import Outcome

CPU = torch.device("cpu")
CALL = PointwiseCall(torch.float32, CPU)


class Device:
    """The CPU, as a GPU of an architecture that nothing is known of; counts trials, and says how they end."""

    def __init__(self):
        self.trials, self.outcome = 0, Outcome("")
        self.backends = (
            proof.proved("stand_in", Backend("triton", lambda call: []), lambda make, dtype: None),
            Backend("reference", lambda call: []),
        )

    def held(self, call, backend, device):
        self.trials += 1
        return self.outcome

    def choice(self):
        return choose("stand_in", self.backends, CALL)


@pytest.fixture
def device(monkeypatch, tmp_path):
    found = Device()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proof, "unproven", lambda op, device: "sm_90")
    monkeypatch.setattr(proof, "held", found.held)
    new_process(monkeypatch)
    yield found
    del proof._calls["stand_in"]


def new_process(monkeypatch):
    monkeypatch.setattr(proof, "_doubts", {})
    monkeypatch.setattr(proof, "_warned", False)


def test_a_kernel_that_holds_is_chosen_and_remembered(device, monkeypatch):
    for _ in range(3):
        assert device.choice().backend == "triton" and not device.choice().rejected
    assert device.trials == 1
    new_process(monkeypatch)
    assert device.choice().backend == "triton" and device.trials == 1


def test_a_kernel_that_does_not_hold_is_passed_over_with_its_reason(device, monkeypatch):
    device.outcome = Outcome("off by 3")
    with pytest.warns(RuntimeWarning, match=r"triton kernels of stand_in .* off by 3.*report this"):
        choice = device.choice()
    assert choice.backend == "reference" and "off by 3" in choice.rejected["triton"][0]
    assert str(remembered.folder()) in choice.rejected["triton"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a process, whatever else is found
        assert device.choice().backend == "reference"
        proof._doubts.clear()
        assert device.choice().backend == "reference"
    new_process(monkeypatch)
    with pytest.warns(RuntimeWarning, match="off by 3"):
        assert device.choice().backend == "reference" and device.trials == 1


def test_an_error_that_may_pass_is_not_remembered(device, monkeypatch):
    device.outcome = Outcome("RuntimeError: no C compiler", lasting=False)
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        assert device.choice().backend == "reference"
    new_process(monkeypatch)
    device.outcome = Outcome("")
    assert device.choice().backend == "triton" and device.trials == 2


@pytest.mark.parametrize("version", ["perceiver_fast", "torch", "triton", "sources", "architecture"])
def test_other_versions_are_tried_again(version, device, monkeypatch):
    assert device.choice().backend == "triton"
    new_process(monkeypatch)
    change = {
        "perceiver_fast": lambda: monkeypatch.setattr(proof, "__version__", "0.0"),
        "torch": lambda: monkeypatch.setattr(torch, "__version__", "0.0"),
        "triton": lambda: monkeypatch.setattr(proof, "_triton_version", lambda: "0.0"),
        "sources": lambda: monkeypatch.setattr(proof, "_sources", lambda: "of kernels that were changed"),
        "architecture": lambda: monkeypatch.setattr(proof, "unproven", lambda op, device: "sm_100"),
    }
    change[version]()
    assert device.choice().backend == "triton" and device.trials == 2


def test_what_cannot_be_written_or_read_is_no_error(device, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert device.choice().backend == "triton"
    new_process(monkeypatch)
    assert device.choice().backend == "triton" and device.trials == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for broken in ("", "[1]", '{"of": {}, "answer": ""}'):
        new_process(monkeypatch)
        assert device.choice().backend == "triton"
        (kept,) = (tmp_path / "perceiver_fast").iterdir()
        kept.write_text(broken)
    assert device.trials == 5


def test_forced_backends_are_not_tried(device):
    device.outcome = Outcome("off by 3")
    with pf.use_backend("triton"):
        assert device.choice().backend == "triton" and not device.trials


def test_nothing_is_tried_where_it_cannot_be(device):
    """Watched, traced, in a backward, for a GPU that is not there: trusted, and tried at the next call."""

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            assert device.choice().backend == "triton"
            return grad

    with Watched():
        assert device.choice().backend == "triton"
    with assumed(100):
        assert device.choice().backend == "triton"
    InBackward.apply(torch.ones(1, requires_grad=True)).backward()

    def traced(x):
        return x + (device.choice().backend == "triton")

    compiled = torch.compile(traced, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == 1 and not device.trials
    assert device.choice().backend == "triton" and device.trials == 1


def test_what_is_remembered_holds_where_nothing_can_be_tried(device, monkeypatch):
    device.outcome = Outcome("off by 3")
    with pytest.warns(RuntimeWarning):
        device.choice()
    new_process(monkeypatch)
    compiled = torch.compile(lambda x: x + (device.choice().backend == "triton"), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == 0 and device.trials == 1


def test_threads_share_a_trial(device):
    started = threading.Barrier(4)

    def ask():
        started.wait()
        assert device.choice().backend == "triton"

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert device.trials == 1


def test_writers_leave_whole_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    of = {"op": "stand_in", "backend": "triton"}

    def write(answer):
        for _ in range(50):
            assert remembered.remember(of, answer)
            assert remembered.recall(of) in ("a", "b" * 10000)

    threads = [threading.Thread(target=write, args=(answer,)) for answer in ("a", "b" * 10000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list((tmp_path / "perceiver_fast").iterdir())) == 1


def test_without_a_gpu_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(proof, "held", lambda *arguments: pytest.fail("tried"))
    if not torch.cuda.is_available():
        assert GEGLU.choose(PointwiseCall(torch.float32, torch.device("cuda"))).backend in ("triton", "reference")
    assert proof.unproven("geglu", CPU) is None


def test_trust_turns_it_off(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(proof, "architecture", lambda device: 90)
    gpu = torch.device("cuda", 0)
    assert proof.unproven("geglu", gpu) == "sm_90"
    with monkeypatch.context() as context:
        context.setattr(proof, "PROVEN", {"geglu": frozenset({90})})
        assert proof.unproven("geglu", gpu) is None and proof.unproven("layer_norm", gpu) == "sm_90"
    monkeypatch.setattr(proof, "TRUSTED", True)
    assert proof.unproven("geglu", gpu) is None


@pytest.mark.parametrize("name", OPS)
def test_every_op_with_gpu_kernels_has_a_trial(name):
    kernels = {backend.name for backend in OPS[name].backends} & set(proof.KERNELS)
    assert bool(kernels) == (OPS[name].trial is not None) == (name in proof._calls)
    if kernels:
        assert trial.held(OPS[name].trial, "reference", CPU) == Outcome("")


def test_a_trial_leaves_random_numbers_hooks_and_modes_alone():
    state, seen = torch.get_rng_state(), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(seen.append, lambda t: t):
            assert trial.held(GEGLU.trial, "reference", CPU) == Outcome("")
    assert torch.equal(torch.get_rng_state(), state) and not seen
    assert pf.backends.forced_backend() == "auto"


def test_what_is_off_is_found():
    def off(make, dtype):
        x = make(5, 7, dtype=dtype)
        return x * (1 + 1e-3 * (pf.backends.forced_backend() == "triton"))

    assert trial.held(off, "reference", CPU) == Outcome("")
    assert "float32 tensor 0" in trial.held(off, "triton", CPU).error
    assert "tensor 1" in trial.held(lambda make, dtype: hidden(make(5, dtype=dtype)), "triton", CPU).error
    nan = trial.held(lambda make, dtype: make(5, dtype=dtype) * float("nan"), "triton", CPU)
    assert "off by nan" in nan.error
    assert trial.held(lambda make, dtype: 1 / 0, "triton", CPU) == Outcome("ZeroDivisionError: division by zero", False)


def hidden(x):
    """x, but that its gradient is wrong on triton."""
    if pf.backends.forced_backend() == "triton":
        return x.detach() + 2 * x - 2 * x.detach()
    return x * 1


def test_numbers_are_the_same_everywhere():
    first, second = Same("cpu"), Same("cpu", exact=True)
    mine, true = first(40, 50, dtype=torch.bfloat16), second(40, 50, dtype=torch.bfloat16)
    assert true.dtype == torch.float64 and torch.equal(mine.double(), true)
    assert abs(true.mean()) < 0.1 and abs(true.std() - 1) < 0.1
    assert torch.equal(first.mask(90), second.mask(90)) and 40 < int(first.mask(90).sum()) < 80
    assert torch.linalg.matrix_rank(true.detach()) == 40
