"""Models that are served: exported, compiled ahead of time and run without Python, and as ONNX."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from support import needs_extension
from torch.export import Dim
from warm_python import python

import perceiver_fast as pf

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "examples/deploy"
SIZES = [(1, 30, 70, 3), (3, 97, 64, 3)]  # neither is the exported one

pytestmark = pytest.mark.skipif(**needs_extension)

LOAD = """
import sys, torch
import perceiver_fast.ops
program = torch.export.load(sys.argv[1]).module()
for shape in {shapes}:
    torch.manual_seed(0)
    torch.save(program(torch.randn(shape)), f"{{sys.argv[2]}}-{{shape[1]}}")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder that examples/deploy/export.py wrote."""
    folder = tmp_path_factory.mktemp("deploy")
    path = os.pathsep.join(filter(None, [str(Path(pf.__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    done = python(DEPLOY / "export.py", "--out", folder, "--onnx", env=os.environ | {"PYTHONPATH": path})
    assert (folder / "model.onnx").exists(), done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def model():
    """The example's model, with the same seed."""
    torch.manual_seed(0)
    arguments = dict(num_freq_bands=6, depth=2, max_freq=10.0, num_latents=32, latent_dim=64, num_classes=10)
    return pf.Perceiver(**arguments).eval()


def expected_of(model, shape):
    torch.manual_seed(0)
    image = torch.randn(shape)
    with torch.no_grad():
        return image, model(image)


def test_an_exported_program_has_the_kernels(exported):
    program = torch.export.load(exported / "model.pt2")
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("perceiver_fast.grid_attention_forward.default") == 2
    known = ("aten.", "perceiver_fast.grid_", "<built-in function")
    assert not [name for name in called if not name.startswith(known)]


def test_an_exported_program_needs_the_ops_alone(exported, model, tmp_path):
    code = LOAD.format(shapes=SIZES)
    path = os.pathsep.join(filter(None, [str(Path(pf.__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    done = python("-c", code, exported / "model.pt2", tmp_path / "out", env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    for shape in SIZES:
        _, expected = expected_of(model, shape)
        assert (torch.load(tmp_path / f"out-{shape[1]}") - expected).abs().max() < 1e-5


def test_a_package_runs_in_python(exported, model):
    package = torch._inductor.aoti_load_package(str(exported / "model-aoti.pt2"))
    for shape in SIZES:
        image, expected = expected_of(model, shape)
        assert (package(image) - expected).abs().max() < 1e-5


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """The C++ program, built as its CMakeLists.txt says."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    folder = tmp_path_factory.mktemp("serve")
    torch_at = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    configure = [cmake, "-S", DEPLOY, "-B", folder, torch_at, f"-DPERCEIVER_FAST={pf.shared_library()}"]
    for command in (configure, [cmake, "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder / "serve"


def test_a_package_runs_without_python(exported, serve, model, tmp_path):
    shared = subprocess.run(["ldd", serve], capture_output=True, text=True, check=True).stdout
    assert "libperceiver_fast.so" in shared and "libtorch_python" not in shared and "libpython" not in shared
    for shape in SIZES:
        image, expected = expected_of(model, shape)
        image.numpy().tofile(tmp_path / "image.bin")
        command = [serve, exported / "model-aoti.pt2", tmp_path / "image.bin", tmp_path / "out.bin", *map(str, shape)]
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""})
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"output of shape {shape[0]} 10\n"
        found = torch.from_numpy(numpy.fromfile(tmp_path / "out.bin", numpy.float32)).view(expected.shape)
        assert (found - expected).abs().max() < 1e-5


def test_the_server_says_what_is_wrong(exported, serve, tmp_path):
    (tmp_path / "image.bin").write_bytes(b"1234")
    command = [serve, exported / "model-aoti.pt2", tmp_path / "image.bin", tmp_path / "out.bin", "1", "8", "8", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "expected 768 bytes for that shape, got 4" in done.stderr
    assert subprocess.run([serve], capture_output=True, text=True).returncode == 2


def test_onnx_runs_in_onnxruntime(exported, model):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in SIZES:
        image, expected = expected_of(model, shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-5


BATCH, POINTS = Dim("batch", max=64), Dim("points", min=2, max=100000)
HEIGHT, WIDTH = Dim("height", min=2, max=2048), Dim("width", min=2, max=2048)
SMALL = dict(depth=2, num_latents=5, latent_dim=16, num_classes=4)
CODES = dict(num_freq_bands=3, max_freq=6.0)


def multimodal():
    modalities = [pf.Modality("image", 3, 2, 4, 8.0), pf.Modality("sound", 2, 1, 3, 6.0)]
    return pf.MultimodalPerceiver(modalities=modalities, **SMALL)


def both(image, sound):
    return dict(data=dict(image=torch.randn(image), sound=torch.randn(sound)))


# A model, what it is exported with, the free sizes, other inputs, and an operator that the program calls.
EXPORTS = {
    "points": (
        lambda: pf.Perceiver(**SMALL, **CODES),
        dict(data=torch.randn(2, 30, 3), coords=torch.rand(2, 30, 2)),
        dict(data={0: BATCH, 1: POINTS}, coords={0: BATCH, 1: POINTS}),
        dict(data=torch.randn(3, 300, 3), coords=torch.rand(3, 300, 2)),
        "fourier_projection_forward",
    ),
    "one axis": (
        lambda: pf.Perceiver(**SMALL, **CODES, input_axis=1),
        dict(data=torch.randn(2, 30, 3)),
        dict(data={0: BATCH, 1: POINTS}),
        dict(data=torch.randn(1, 3000, 3)),
        "fourier_projection_forward",
    ),
    "groups": (
        multimodal,
        both((2, 6, 5, 3), (2, 40, 2)),
        dict(data=dict(image={0: BATCH, 1: HEIGHT, 2: WIDTH}, sound={0: BATCH, 1: POINTS})),
        both((3, 16, 5, 3), (3, 400, 2)),
        "grid_attention_forward",
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_for_any_size(name):
    """tests/contract/test_graphs.py has the other models."""
    make, call, free, other, operator = EXPORTS[name]
    model = make().eval()
    with torch.no_grad():
        exported = torch.export.export(model, (), kwargs=call, dynamic_shapes=free)
        assert f"perceiver_fast.{operator}.default" in {str(node.target) for node in exported.graph.nodes}
        for inputs in (call, other):
            assert (exported.module()(**inputs) - model(**inputs)).abs().max() < 1e-5


def test_the_library_defines_what_the_package_declares():
    """A process without Python has the same operators: the build copies their schemas."""
    from perceiver_fast.ops.declaration import OPERATORS

    strings = pf.shared_library().read_bytes()
    assert OPERATORS and all(operator.schema.encode() in strings for operator in OPERATORS.values())


def test_a_library_of_other_sources_is_refused():
    code = "import torch; lib = torch.library.Library('perceiver_fast', 'FRAGMENT')\n"
    code += "lib.define('geglu_forward(Tensor h) -> Tensor')\n"
    code += "import sys; sys.modules['perceiver_fast._C'] = None\n"
    code += "import perceiver_fast"
    path = os.pathsep.join(filter(None, [str(Path(pf.__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    done = python("-c", code, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode and "ImportError: perceiver_fast: expected the operator geglu_forward" in done.stderr
    assert "build it again" in done.stderr
