"""Which library large products run on: decided from recorded timings, probed by a clock of our own, kept once a process."""

import itertools
import os
import random
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import perceiver_fast as pf
from perceiver_fast.ops import linear, linear_choice, linear_libraries, linear_prior, linear_probe
from perceiver_fast.ops.linear_prior import prior_of, prior_of_bfloat16
from perceiver_fast.ops.linear_probe import PROBLEMS, probe
from perceiver_fast.ops.linear_verdict import SETTLED, Prior, Run, decide

SMALL = PROBLEMS[0]
AMD, INTEL = Prior("onednn", 0.05, "what is known of AMD"), Prior("torch", 0.05, "what is known of Intel")


def runs_of(torchs, onednns, clean=True):
    """Runs of the three problems from milliseconds, a list a problem."""
    return {
        name: {
            p: [Run(1e-3 * ms, clean) for ms in found] for p, found in itertools.zip_longest(PROBLEMS, ms, fillvalue=())
        }
        for name, ms in (("torch", torchs), ("onednn", onednns))
    }


# Forward products on an AMD EPYC with AVX2, 2 threads. The range of several runs while nothing else ran:
QUIET = (
    [[1.16, 1.18, 1.21], [4.47, 4.55, 4.63], [11.2, 12.2, 13.4]],
    [[1.15, 1.16, 1.17], [4.51, 4.60, 4.75], [8.59, 9.10, 9.67]],
)
# Beside some six processes that compute: products wait for threads that do not run, torch's more often.
DISTURBED = (
    [[24.8, 31.8, 35.8, 31.7, 27.8], [39.8, 43.8, 55.8, 32.7, 42.3], [75.9, 75.7, 60.9, 76.8, 61.8]],
    [[15.9, 15.9, 11.9, 15.9, 15.9], [16.5, 39.3, 27.9, 31.0, 33.3], [52.0, 41.1, 32.9, 33.4, 39.9]],
)
# Beside four, after rests: the small problem was at times left in peace. The least two, and the median of twenty.
RESTED = [[1.49, 1.58, 2.03]], [[1.84, 1.89, 2.10]]


def test_recorded_timings():
    for prior in (AMD, INTEL):
        found = decide(runs_of(*QUIET), prior)
        assert (found.chosen, found.how, found.sure, found.settled) == ("onednn", "sure", True, True)
        assert found.gflops["onednn"] == pytest.approx(2e-6 * 256 * 512 * (512 + 2048 + 4096) / (1.15 + 4.51 + 8.59))
        assert str(found).startswith("onednn, sure: torch 104 and onednn 122 GFLOP/s, spread 7%")
    for timings, clean in ((DISTURBED, False), (RESTED, True)):
        for prior in (AMD, INTEL):
            found = decide(runs_of(*timings, clean), prior)
            assert found.chosen == prior.favourite and not found.sure and not found.settled
            assert found.how == f"disturbed by other work, {prior.why} decided"


def test_disturbed_runs_do_not_count():
    """Clean ones decide, whatever stands beside them."""
    runs = runs_of(*QUIET)
    for by_problem in runs.values():
        for found in by_problem.values():
            found += [Run(1e-6, False), Run(1.0, False)]
    for prior in (AMD, INTEL):
        assert decide(runs, prior) == decide(runs_of(*QUIET), prior)


def test_within_the_spread_the_favourite_is_taken():
    near = runs_of([[1.00, 1.01, 1.3]] * 3, [[1.03, 1.04, 1.3]] * 3)
    for prior in (AMD, INTEL):
        found = decide(near, prior)
        assert found.chosen == prior.favourite and not found.sure
        assert found.settled and found.how == f"close, {prior.why} decided"
    noisy = runs_of([[1.00, 1.30, 1.3]] * 3, [[1.20, 1.21, 1.3]] * 3)
    assert decide(noisy, AMD).chosen == "onednn" and not decide(noisy, AMD).settled
    assert decide(noisy, INTEL).chosen == "torch" and not decide(noisy, INTEL).sure
    more = runs_of([[1.00, 1.30, 1.3, 1.01]] * 3, [[1.20, 1.21, 1.3]] * 3)
    assert decide(more, AMD).chosen == "torch" and decide(more, AMD).sure


def test_too_little_is_no_measurement():
    for runs in (runs_of([], []), runs_of([[1.0, 1.0]], [[9.0, 9.0, 9.0]])):
        found = decide(runs, INTEL)
        assert (found.chosen, found.sure, found.settled) == ("torch", False, False)
        assert str(found) == "torch: not measured, what is known of Intel decided"


def test_a_slow_path_is_seen_on_a_busy_machine():
    slow, fast = [[2.0, 2.1, 2.2]], [[1.0, 1.1, 1.2]]
    assert decide(runs_of(slow, fast), INTEL).chosen == "onednn"  # rested, and the small problem alone
    assert decide(runs_of(slow, fast, clean=False), INTEL).chosen == "torch"
    for slow in ([[6.5] * 3], [[90.0] * 3]):  # so far apart were libraries of one speed beside two busy processes
        for prior in (AMD, INTEL):
            found = decide(runs_of(slow, fast, clean=False), prior)
            assert found.chosen == prior.favourite and not found.sure and not found.settled


@pytest.mark.parametrize("prior", [AMD, INTEL], ids=lambda prior: prior.favourite)
def test_no_choice_of_clean_runs_loses_much(prior):
    """Runs that others slowed down without a trace, as a machine's other tenants do: a third of them, up to threefold."""
    draw = random.Random(0)
    for _ in range(300):
        truth = {"torch": draw.uniform(0.5, 2.0), "onednn": 1.0}

        def seconds(name):
            return truth[name] * (1 + abs(draw.gauss(0, 0.02)) + (draw.random() < 0.33) * draw.uniform(0, 2))

        runs = {name: {p: [Run(seconds(name)) for _ in range(8)] for p in PROBLEMS} for name in truth}
        found = decide(runs, prior)
        assert truth[found.chosen] <= (1.05 + SETTLED) * min(truth.values()) or not found.settled
        assert not found.sure or truth[found.chosen] == min(truth.values())


class Machine:
    """A clock that products, rests and other work move on; ``work(rested) -> (factor, clean)`` is the others'."""

    def __init__(self, monkeypatch, work=lambda rested: (1.0, True)):
        self.now, self.rests, self.lost, self.rested, self.work = 0.0, 0, 0, False, work
        monkeypatch.setattr(linear_probe, "time", self)
        monkeypatch.setattr(linear_probe, "interruptions", lambda: self.lost)
        monkeypatch.setattr(linear_probe, "POOL", 4 * 4096 * 512)  # for speed: of one weight

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now, self.rests, self.rested = self.now + seconds, self.rests + 1, True

    def product(self, flops_a_second):
        def call(a, b):
            factor, clean = self.work(self.rested)
            self.now += factor * 2 * a.shape[0] * b.numel() / flops_a_second
            self.lost, self.rested = self.lost + (not clean), False

        return call

    def probe(self, torchs, onednns, prior, runs=None):
        runs = {} if runs is None else runs
        calls = {"torch": self.product(torchs), "onednn": self.product(onednns)}
        probe(calls, "forward", torch.float32, prior, runs)
        return decide(runs, prior), runs


def test_a_quiet_machine_is_asked_shortly(monkeypatch):
    machine = Machine(monkeypatch)
    verdict, runs = machine.probe(1e11, 1.3e11, INTEL)
    assert verdict.chosen == "onednn" and verdict.sure and machine.rests == 0
    assert [len(found) for found in runs["torch"].values()] == [6, 3, 3] and machine.now < linear_probe.SECONDS


def test_a_busy_machine_is_rested_on_and_bounded(monkeypatch):
    """Products of more than 3 ms lose a processor, and those that come without a rest before."""
    machine = Machine(monkeypatch, lambda rested: (1.0, True) if rested else (9.0, False))
    verdict, runs = machine.probe(1e11, 3e11, INTEL)
    assert verdict.chosen == "onednn" and machine.rests >= 6  # three times as fast is seen
    assert all(run.clean for run in runs["torch"][SMALL][1:])
    machine = Machine(monkeypatch, lambda rested: (5.0, False))
    verdict, runs = machine.probe(1e11, 1.3e11, AMD)
    assert verdict.chosen == "onednn" and not verdict.settled
    assert not any(runs["torch"][problem] for problem in PROBLEMS[1:])
    slowest = 5 * 2 * 256 * 512 * 512 / 1e11
    assert linear_probe.SECONDS < machine.now <= linear_probe.SECONDS + slowest + linear_probe.REST


def test_a_slow_machine_is_bounded(monkeypatch):
    machine = Machine(monkeypatch)
    verdict, runs = machine.probe(5e9, 5e9, INTEL)
    assert verdict.chosen == "torch" and not verdict.settled
    assert machine.now <= linear_probe.SECONDS + 2 * 256 * 512 * 4096 / 5e9
    machine = Machine(monkeypatch)
    verdict, runs = machine.probe(2e11, 3e9, INTEL)  # as bfloat16 without instructions: no large product of it is tried
    assert verdict.settled and machine.now <= linear_probe.SECONDS + 2 * 256 * 512 * 512 / 3e9
    assert not any(runs["onednn"][problem] for problem in PROBLEMS[1:])


def test_runs_add_up(monkeypatch):
    machine = Machine(monkeypatch, lambda rested: (5.0, False))
    verdict, runs = machine.probe(1e11, 1.3e11, INTEL)
    assert verdict.chosen == "torch" and not verdict.settled
    before = len(runs["torch"][SMALL])
    machine.work = lambda rested: (1.0, True)
    verdict, runs = machine.probe(1e11, 1.3e11, INTEL, runs)
    assert verdict.chosen == "onednn" and verdict.sure and len(runs["torch"][SMALL]) > before


@pytest.mark.parametrize("kind", linear_libraries.KINDS)
def test_operands_fit_and_weights_change(kind):
    operands, seen = linear_probe.Operands(kind, torch.bfloat16), set()
    product = linear_libraries.LIBRARIES["torch"].products()[kind]
    for _ in range(2):
        a, b = operands(SMALL)
        seen.add(b.data_ptr())
        sizes = {"forward": (256, 512), "grad_input": (256, 512), "grad_weight": (512, 512)}
        assert product(a, b).shape == sizes[kind] and a.dtype == b.dtype == torch.bfloat16
    assert len(seen) == (1 if kind == "grad_weight" else 2)
    for _ in range(40):
        assert operands(PROBLEMS[2])[1].numel() >= 256 * 512  # the pool is used again from its start


@pytest.fixture
def fresh(monkeypatch):
    """Nothing was compared yet, and no probe runs: the recorded timings are what it finds."""
    probes = []

    def recorded(calls, kind, dtype, prior, runs):
        probes.append((kind, dtype))
        names = dict(zip(calls, runs_of(*recorded.timings, recorded.clean).values()))
        for name, found in names.items():
            for problem, more in found.items():
                runs.setdefault(name, {p: [] for p in PROBLEMS})[problem] += more

    recorded.timings, recorded.clean, recorded.probes = QUIET, True, probes
    monkeypatch.setattr(linear_choice, "probe", recorded)
    monkeypatch.setattr(
        linear_choice, "_comparisons", {name: linear_choice._Comparison() for name in linear_choice.COMPARISONS}
    )
    monkeypatch.setattr(linear_choice, "_why_torch", lambda: "; ".join(linear_choice.why_torch()))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(linear_choice, "vendor", lambda: "Intel")
    return recorded


needs_onednn = pytest.mark.skipif(
    bool(linear_libraries.reasons("onednn")), reason="no oneDNN, nothing to choose: it did NOT run"
)


@needs_onednn
def test_every_comparison_is_made_once_and_when_needed(fresh):
    x, weight = (torch.randn(*size, 512, requires_grad=True) for size in ((256,), (512,)))
    linear(torch.randn(2, 8), torch.randn(3, 8))
    assert fresh.probes == []
    with torch.no_grad():
        linear(x, weight), linear(x, weight)
    assert fresh.probes == [("forward", torch.float32)]
    linear(x, weight).sum().backward()
    assert [kind for kind, _ in fresh.probes] == list(linear_libraries.KINDS)
    assert [linear_choice.library_of(kind) for kind in linear_libraries.KINDS] == ["onednn"] * 3
    assert linear_choice.float32_is_faster() and fresh.probes[3:] == [("forward", torch.bfloat16)]
    assert linear_choice.library_of("forward", torch.float64) == "torch"
    assert linear_choice.library_of("forward", torch.bfloat16) == "torch"
    before = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        assert linear_choice.library_of("forward") == "torch"
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before[0])
    assert len(fresh.probes) == 4


@pytest.mark.parametrize("name", [name for name in ("torch", "onednn") if not linear_libraries.reasons(name)])
def test_a_forced_library_measures_nothing_and_repeats_its_bits(fresh, name):
    x, weight = torch.randn(256, 512), torch.randn(700, 512, requires_grad=True)
    with pf.use_linear(name):
        outs = [linear(x, weight) for _ in range(3)]
        grads = [torch.autograd.grad(out.square().sum(), weight)[0] for out in outs]
    assert fresh.probes == []
    assert all(torch.equal(out, outs[0]) for out in outs) and all(torch.equal(grad, grads[0]) for grad in grads)
    if name == "torch":
        assert torch.equal(outs[0], F.linear(x, weight))
        with pf.use_linear("torch"):
            assert not linear_choice.wide_bfloat16() and fresh.probes == []


@needs_onednn
def test_what_was_not_settled_is_looked_at_again(fresh, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(linear_choice.time, "monotonic", lambda: now[0])
    fresh.timings, fresh.clean = DISTURBED, False
    assert linear_choice.library_of("forward") == "torch" and len(fresh.probes) == 1  # the favourite
    wide = linear_choice.float32_is_faster()
    assert len(fresh.probes) == 2
    now[0] += 9
    assert linear_choice.library_of("forward") == "torch" and len(fresh.probes) == 2
    now[0] += 2
    assert linear_choice.library_of("forward") == "torch" and len(fresh.probes) == 3
    now[0] += 99
    assert linear_choice.library_of("forward") == "torch" and len(fresh.probes) == 3
    fresh.timings, fresh.clean = QUIET, True
    now[0] += 2
    assert linear_choice.library_of("forward") == "onednn" and len(fresh.probes) == 4
    now[0] += 1e6
    assert linear_choice.library_of("forward") == "onednn" and len(fresh.probes) == 4
    assert linear_choice.float32_is_faster() == wide and len(fresh.probes) == 4  # it decides dtypes, which never change


@needs_onednn
def test_it_is_looked_at_twice_at_most(fresh, monkeypatch):
    now = itertools.count(0, 1000)
    monkeypatch.setattr(linear_choice.time, "monotonic", lambda: next(now))
    fresh.timings, fresh.clean = DISTURBED, False
    assert [linear_choice.library_of("forward") for _ in range(9)] == ["torch"] * 9
    assert len(fresh.probes) == 1 + len(linear_choice.LOOKS)


@needs_onednn
def test_threads_that_ask_at_once_measure_once(fresh, monkeypatch):
    started, go, found = threading.Event(), threading.Event(), []

    def slow(*arguments):
        started.set()
        assert go.wait(60)
        fresh(*arguments)

    monkeypatch.setattr(linear_choice, "probe", slow)
    threads = [threading.Thread(target=lambda: found.append(linear_choice.library_of("forward"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert started.wait(60)
    go.set()
    for thread in threads:
        thread.join()
    assert found == ["onednn"] * 4 and len(fresh.probes) == 1


@needs_onednn
def test_nobody_waits_for_another_look(fresh, monkeypatch):
    now = itertools.count(0, 11)
    monkeypatch.setattr(linear_choice.time, "monotonic", lambda: next(now))
    fresh.timings, fresh.clean = DISTURBED, False
    assert linear_choice.library_of("forward") == "torch"
    started, go, found = threading.Event(), threading.Event(), []

    def slow(*arguments):
        started.set()
        assert go.wait(60)
        fresh.timings, fresh.clean = QUIET, True
        fresh(*arguments)

    monkeypatch.setattr(linear_choice, "probe", slow)
    thread = threading.Thread(target=lambda: found.append(linear_choice.library_of("forward")))
    thread.start()
    assert started.wait(60)
    assert linear_choice.library_of("forward") == "torch"  # what is known, at once
    go.set()
    thread.join()
    assert found == ["onednn"]


@needs_onednn
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork: it did NOT run")
def test_a_forked_process_does_not_wait_for_a_thread_it_does_not_have():
    code = """
import os, threading, torch
from perceiver_fast.ops import linear_choice as choice
from perceiver_fast.ops.linear_probe import PROBLEMS
from perceiver_fast.ops.linear_verdict import Run
held, done = threading.Event(), threading.Event()
def hold():
    with choice._lock:
        held.set()
        done.wait(60)
thread = threading.Thread(target=hold)
thread.start()
assert held.wait(60)
torch.backends.mkl.is_available = lambda: True
def probe(calls, kind, dtype, prior, runs):
    runs.update({name: {p: [Run(s)] * 3 for p in PROBLEMS} for name, s in zip(calls, (2e-3, 1e-3))})
choice.probe = probe
child = os.fork()
if child == 0:
    os._exit(0 if choice.library_of("forward") == "onednn" else 3)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
done.set()
thread.join()
raise SystemExit(code)
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=300).returncode == 0


@needs_onednn
def test_without_mkl_or_onednn_torch_is_taken_and_says_so(fresh, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert linear_choice.library_of("forward") == "torch"
    assert str(linear_choice.verdict("forward")) == "torch: torch was built without MKL; of its BLAS nothing is known"
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert str(linear_choice.verdict("grad_input")) == "torch: torch was built without oneDNN"
    assert linear_choice.library_of("grad_input") == "torch" and fresh.probes == []


def test_what_is_known():
    measured = {"MKL": "2024.2", "oneDNN": "3.12.0"}
    assert prior_of("forward", "AMD", measured).favourite == "onednn"
    for kind in linear_libraries.KINDS:
        for vendor in ("Intel", "CentaurHauls"):
            assert prior_of(kind, vendor, measured, avx512=True).favourite == "torch"
    assert prior_of("grad_input", "AMD", measured).favourite == "torch"
    assert prior_of("grad_input", "AMD", measured, avx512=True).favourite == "onednn"
    assert prior_of("grad_weight", "AMD", measured, avx512=True).favourite == "torch"
    assert prior_of("forward", "AMD", measured).margin > prior_of("forward", "AMD", {"oneDNN": "4.0"}).margin > 0
    assert prior_of("forward", "CentaurHauls", measured).margin == linear_prior.MARGIN_ELSEWHERE
    assert "nothing is known of CentaurHauls" in prior_of("forward", "CentaurHauls", measured).why
    assert prior_of_bfloat16(True).favourite == "bfloat16" and prior_of_bfloat16(False).favourite == "float32"


def test_the_processor_is_known(monkeypatch):
    assert linear_prior.vendor() and "\n" not in linear_prior.vendor()
    if torch.backends.mkl.is_available():
        assert int(linear_prior.versions()["MKL"].split(".")[0]) >= 2020
    for text, vendor in (
        ("vendor_id\t: GenuineIntel\nmodel name\t: x\nvendor_id\t: GenuineIntel\n", "Intel"),
        ("vendor_id\t: AuthenticAMD\n", "AMD"),
        ("vendor_id\t: HygonGenuine\n", "HygonGenuine"),
    ):
        monkeypatch.setattr(linear_prior, "_cpuinfo", lambda text=text: text)
        assert linear_prior.vendor.__wrapped__() == vendor
    monkeypatch.setattr(linear_prior, "_cpuinfo", lambda: "")
    monkeypatch.setattr(
        linear_prior.platform, "processor", lambda: "Intel64 Family 6 Model 85 Stepping 7, GenuineIntel"
    )
    assert linear_prior.vendor.__wrapped__() == "Intel"
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(linear_prior, "_cpuinfo", lambda: "flags : fpu avx512f avx512_bf16 amx_tile\n")
    assert linear_prior.multiplies_bfloat16()
    monkeypatch.setattr(linear_prior, "_cpuinfo", lambda: "flags : fpu avx2\n")
    assert not linear_prior.multiplies_bfloat16()


@needs_onednn
def test_the_real_probe(monkeypatch):
    """Whatever the default device and dtype; what it finds is chosen."""
    comparison = linear_choice._Comparison()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            comparison.measure("forward")
    finally:
        torch.set_default_dtype(torch.float32)
    assert comparison.verdict.chosen in ("torch", "onednn") and set(comparison.runs) == {"torch", "onednn"}
    assert comparison.runs["torch"][SMALL] and all(run.seconds > 0 for run in comparison.runs["torch"][SMALL])
