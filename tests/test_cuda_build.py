"""The CUDA kernels without a GPU: they compile for every architecture, spill nothing, keep to their budgets, and link.

What a kernel needs of a multiprocessor decides how many blocks share it, and the compiler says it exactly. It does not
say how fast they are.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("80", "90", "100")
STATIC_SHARED = 48 * 1024  # what a block may have without asking
FORMATS = {f"Li{features}ELb{float16}": float16 for float16 in (0, 1) for features in (1, 2, 3, 4)[: 4 - float16]}
LOOPS = {  # over rows, by format, bf16 or fp16: instructions for each weight, at most, and tensor cores' among them
    "grid_attention_forward_kernel": ((4.5, 3 / 8), (5.1, 1 / 2)),
    "grid_attention_backward_kernel": ((6.9, 5 / 8), (7.5, 3 / 4)),
}
REGISTERS = {  # by element type or channels: 65,536 registers over 128 threads and the blocks that should share a multiprocessor
    "fourier_scale_kernel": {"f": 64, "d": 64},
    "fourier_projection_kernel": {"f": 128, "d": 168},
    "fourier_dweight_kernel": {"f": 128, "d": 168},
    "fourier_dtokens_kernel": {"f": 168, "d": 168},
    "add_parts_kernel": {"ff": 40, "dd": 40},
    "grid_attention_forward_kernel": dict.fromkeys(FORMATS, 168),  # sm_100: two blocks
    "grid_attention_backward_kernel": dict.fromkeys(FORMATS, 255),
}
# Folders of headers of other torches, joined as paths are: what their wheels have in torch/include.
HEADERS = [Path(path) for path in os.environ.get("PERCEIVER_FAST_TEST_TORCH_HEADERS", "").split(os.pathsep) if path]
NEEDS_CUDA_TORCH = {  # symbols of libtorch_cuda: all that the library may miss beside a torch without CUDA
    "aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg",
}  # fmt: skip


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def nvcc():
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is not on PATH: the CUDA kernels were NOT compiled")
    known = run(found, "--list-gpu-arch")
    if missing := [arch for arch in ARCHS if f"compute_{arch}" not in known.split()]:
        pytest.skip(f"this nvcc does not know sm_{', sm_'.join(missing)}: the CUDA kernels were NOT compiled")
    return found


def build_flags(include):
    """What setup.py compiles with, against a torch's headers."""
    text = (ROOT / "setup.py").read_text()
    oldest = re.search(r"OLDEST_TORCH = \((\d+), (\d+)\)", text).groups()
    flags = re.search(r'CUDA_FLAGS = "([^"]*)"', text)[1].split()
    return [*flags, f"-I{include}", "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*map(int, oldest))]


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    """The objects, and what ptxas said of them."""
    folder = tmp_path_factory.mktemp("cuda")
    flags = [*build_flags(Path(torch.__file__).parent / "include"), "--threads", "2", "-Xptxas", "-v"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    objects, said = [], ""
    for source in SOURCES:
        objects.append(folder / f"{source.stem}.o")
        said += run(nvcc, *flags, "-c", source, "-o", objects[-1])
    return objects, said


def usage(said):
    """{(kernel, types): {arch: numbers}} from ptxas -v."""
    pattern = re.compile(
        r"entry function '\w*?\d([a-z_]+_kernel)I([fd]+|Li\dELb\d)E\w*' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    table = {}
    for name, types, arch, stack, stores, loads, registers, rest in pattern.findall(said):
        shared = re.search(r"(\d+) bytes smem", rest)
        numbers = dict(stack=int(stack), spilled=int(stores) + int(loads), registers=int(registers))
        table.setdefault((name, types), {})[arch] = numbers | {"shared": int(shared[1]) if shared else 0}
    return table


def test_kernels_fit(compiled, record_property, capsys):
    table = usage(compiled[1])
    kernels = {(name, types) for name, budgets in REGISTERS.items() for types in budgets}
    assert set(table) == kernels and all(set(archs) == set(ARCHS) for archs in table.values())
    lines = [f"{'registers, shared memory':38}" + "".join(f"{f'sm_{arch}':>16}" for arch in ARCHS)]
    for (name, types), archs in sorted(table.items()):
        cells = [f"{archs[arch]['registers']}, {archs[arch]['shared']}" for arch in ARCHS]
        lines.append(f"{f'{name}<{types}>':38}" + "".join(f"{cell:>16}" for cell in cells))
        record_property(f"{name}<{types}>", archs)
    with capsys.disabled():
        print("", *lines, sep="\n")
    for (name, types), archs in table.items():
        for arch, used in archs.items():
            where = f"{name}<{types}> on sm_{arch}: {used}"
            assert used["spilled"] == 0 and used["stack"] == 0, where
            budget = 255 if name.startswith("grid_attention") and arch == "100" else REGISTERS[name][types]
            assert used["registers"] <= budget and used["shared"] <= STATIC_SHARED, where


def test_loops_hold_what_was_counted(compiled, record_property):
    """A weight is one exponential; products of matrices run on tensor cores, and a turn touches no local memory."""
    aot = pytest.importorskip(
        "perceiver_fast.kernels.aot", reason="triton, whose cuobjdump reads code, is not installed"
    )
    found = {}
    for arch in ARCHS:
        sass = aot.run_tool(
            "cuobjdump",
            f"-sass -arch sm_{arch}",
            next(o for o in compiled[0] if o.stem == "grid_attention").read_bytes(),
        )
        for function in sass.split("Function : ")[1:]:
            name, types = re.match(r"\w*?\d([a-z_]+_kernel)I(Li\dELb\d)E", function).groups()
            loop = aot.innermost_loop(aot.listing(function))
            cost = loop.total() / loop["MUFU.EX2"]
            found[name, types, arch] = cost
            most, products = LOOPS[name][FORMATS[types]]
            assert loop["HMMA"] == loop["MUFU.EX2"] * products and not loop["LDL"] + loop["STL"], (name, arch, loop)
            assert cost <= most, (name, types, arch, cost)
    assert len(found) == len(FORMATS) * len(ARCHS) * len(LOOPS)
    record_property("instructions a weight", {str(key): round(cost, 2) for key, cost in found.items()})


def test_library_links_and_registers(nvcc, compiled, tmp_path):
    """Nothing is missing but, beside a torch without CUDA, its few CUDA functions; stand-ins let the library load."""
    lib = Path(torch.__file__).parent / "lib"
    cuda = ["-ltorch_cuda"] if torch.version.cuda else []
    library, stand_ins = tmp_path / "_cuda.so", tmp_path / "stand_ins.so"
    run(nvcc, "-shared", *compiled[0], f"-L{lib}", "-ltorch_cpu", *cuda, "-o", library)
    source = tmp_path / "stand_ins.cpp"
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in sorted(NEEDS_CUDA_TORCH)))
    run(nvcc, "-shared", "-Xcompiler", "-fPIC", source, "-o", stand_ins)
    code = f"""
import ctypes, torch
if torch.version.cuda is None:
    ctypes.CDLL({str(stand_ins)!r}, ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(library)!r})
for op in ("fourier_projection_forward", "fourier_projection_backward", "grid_attention_sums", "grid_attention_gradient_sums"):
    print(torch._C._dispatch_has_kernel_for_dispatch_key("perceiver_fast::" + op, "CUDA"))
print(torch.cuda.is_initialized())
"""
    assert run(sys.executable, "-c", code).split() == 4 * ["True"] + ["False"]


@pytest.mark.skipif(
    not HEADERS, reason="PERCEIVER_FAST_TEST_TORCH_HEADERS names no headers: only torch's own were compiled"
)
def test_headers_of_other_torches(nvcc, tmp_path):
    for include, source in itertools.product(HEADERS, SOURCES):
        assert (include / "torch/csrc/stable/library.h").exists(), include
        said = run(
            nvcc,
            *build_flags(include),
            f"-gencode=arch=compute_{ARCHS[1]},code=sm_{ARCHS[1]}",
            "-c",
            source,
            "-o",
            tmp_path / "object.o",
        )
        assert "warning" not in said, (include, said)
