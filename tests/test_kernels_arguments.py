"""Every launch passes exactly what its kernel takes: neither the interpreter nor the compiler looks, a launch on a GPU does."""

import dataclasses
import importlib.util
import inspect

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its kernels were NOT tested"
)


@pytest.fixture
def launches(monkeypatch):
    """All launches of the calls that are compiled ahead of time: :meth:`Launch.instance` raises where names differ."""
    from perceiver_fast.insight import gpu_kernels
    from perceiver_fast.kernels.launch import Launch

    found, instance = [], Launch.instance

    def recorded(launch, *args, **kwargs):
        found.append(launch)
        return instance(launch, *args, **kwargs)

    monkeypatch.setattr(Launch, "instance", recorded)
    for architecture in (80, 90, 100):
        assert list(gpu_kernels.instances(architecture))
    return found


def test_arguments_and_options_are_what_triton_takes(launches):
    """As ``triton.runtime.jit`` binds a call: every parameter given, and whatever else is given is an option."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    options = make_backend(GPUTarget("cuda", 90, 32)).parse_options({}).__dict__
    assert len({launch.kernel for launch in launches}) > 15
    for launch in launches:
        inspect.signature(launch.kernel.fn).bind(**launch.arguments)  # TypeError: what is missing or superfluous
        assert set(launch.config.options) <= set(options), launch.config
        assert not set(launch.arguments) & set(launch.config.options)


def test_what_does_not_fit_is_named(launches):
    kernel = launches[0].kernel
    (name, *others) = launches[0].arguments
    more = dataclasses.replace(launches[0], arguments=launches[0].arguments | {"per_split": 1})
    assert more.mismatches() == [f"{kernel.__name__} takes no per_split"]
    less = dataclasses.replace(launches[0], arguments={other: launches[0].arguments[other] for other in others})
    with pytest.raises(TypeError, match=f"{kernel.__name__} is not given {name}"):
        less.instance("")
