"""Compiles the Triton kernels ahead of time, for architectures that are not there, and reads what they would need.

Needs no GPU: ptxas, cuobjdump and nvdisasm come with Triton. What is read is exact (registers, spills, shared memory, instructions);
it does not say how fast a kernel is.
"""

from __future__ import annotations

import bisect
import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from perceiver_fast.kernels.launch import Instance

ARCHITECTURES = (80, 90, 100)
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have


@dataclass(frozen=True)
class Compiled:
    """What an instance needs on one architecture, and what its innermost loop with exponentials holds."""

    registers: int
    shared: int
    stack: int
    spills: int
    traps: int
    loop: Counter = field(repr=False)
    ptx: str = field(repr=False)

    @property
    def exponentials(self) -> int:
        """Exponentials that a thread computes in one turn of the loop."""
        return self.loop["MUFU.EX2"]

    @property
    def matrix_instructions(self) -> int:
        """Tensor-core instructions in the loop."""
        return sum(self.loop[op] for op in ("HMMA", "HGMMA", "UTCHMMA"))

    @property
    def instructions(self) -> int:
        """All instructions in the loop."""
        return self.loop.total()


def compile_instance(instance: Instance, architecture: int) -> Compiled:
    """Compile for ``architecture`` (80, 90, 100, ..) and read the binary; many are read faster together.

    Raises:
        triton.compiler.errors.CompilationError and others of Triton's: it does not compile.
    """
    (compiled,) = compile_instances([instance], architecture)
    return compiled


def compile_instances(instances: Sequence[Instance], architecture: int) -> list[Compiled]:
    """Compile several for one architecture and read the binaries, raising as :func:`compile_instance` does.

    The disassembler takes most of a second to begin, however little there is to read: it runs once for all.
    """
    kernels = [_compile(instance, architecture) for instance in instances]
    usages = (run_tool("cuobjdump", "-res-usage", kernel.asm["cubin"]) for kernel in kernels)
    return [_read(*parts) for parts in zip(kernels, usages, _disassemble(kernels))]


def _compile(instance: Instance, architecture: int) -> CompiledKernel:
    names = instance.kernel.arg_names
    if missing := [name for name in names if name not in instance.types and name not in instance.constants]:
        raise ValueError(f"{instance.name}: no type or constant for {', '.join(missing)}")
    # What is not divisible has an empty entry, as in a call: which then finds in Triton's cache what was compiled here.
    attrs = {
        (index,): [["tt.divisibility", 16]] if kind.startswith("*") or parameter.name in instance.divisible else []
        for index, parameter in enumerate(instance.kernel.params)
        if (kind := instance.types.get(parameter.name, "")) != "fp32" and not (kind and parameter.do_not_specialize)
    }
    signature = {name: instance.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in instance.constants.items()}
    return triton.compile(
        ASTSource(instance.kernel, signature, constants, attrs),
        target=GPUTarget("cuda", architecture, 32),
        options=instance.config.options | dict(enable_fp_fusion=True),
    )


def run_tool(name: str, option: str, binary: bytes) -> str:
    """What one of Triton's CUDA tools prints of a binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        command = [str(tool), *option.split(), file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _code_of(cubin: bytes) -> bytes:
    """The instructions of a cubin, an ELF file: its sections ``.text.<function>``."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Of every section: where its name is, 20 bytes that do not matter, where it is, and how long.
    sections = [struct.unpack_from("<I20xQQ", cubin, table + index * size) for index in range(count)]
    starts = [sections[names][1] + name for name, _, _ in sections]
    found = [
        cubin[at : at + length]
        for start, (_, at, length) in zip(starts, sections)
        if cubin.startswith(b".text.", start)
    ]
    return b"".join(found)


def listing(sass: str) -> list[tuple[int, str]]:
    """Addresses and instructions of what nvdisasm, or cuobjdump, prints of a function."""
    return [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]


def _disassemble(kernels: Sequence[CompiledKernel]) -> list[list[tuple[int, str]]]:
    """Of every kernel its instructions and their addresses, which count on from kernel to kernel, as jumps do."""
    parts = [_code_of(kernel.asm["cubin"]) for kernel in kernels]
    targets = {re.search(r"^\.target sm_(\w+)", kernel.asm["ptx"], re.MULTILINE)[1] for kernel in kernels}
    (target,) = targets
    sass = run_tool("nvdisasm", f"--binary SM{target}", b"".join(parts))
    code = listing(sass)
    ends = list(itertools.accumulate(map(len, parts)))
    cuts = [0, *(bisect.bisect_left(code, (end,)) for end in ends)]
    return [code[begin:end] for begin, end in itertools.pairwise(cuts)]


def _read(kernel: CompiledKernel, usage: str, code: list[tuple[int, str]]) -> Compiled:
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    ops = Counter(_opcode(text) for _, text in code)
    spills, traps, shared = ops["LDL"] + ops["STL"], ops["BPT"], kernel.metadata.shared
    return Compiled(registers, shared, stack, spills, traps, innermost_loop(code), kernel.asm["ptx"])


def faults(instance: Instance, compiled: Compiled, architecture: int) -> list[str]:
    """What is wrong with a compiled kernel: spills, traps, a budget passed, work done twice, no tensor cores."""
    found, most = compiled, SHARED[architecture]
    checks = {
        f"{found.spills} local loads and stores, a stack of {found.stack} bytes": found.stack or found.spills,
        f"{found.traps} traps": found.traps,
        f"{found.registers} registers, not at most {instance.registers}": found.registers > instance.registers,
        f"{found.shared} bytes of shared memory, not at most {most}": found.shared > most,
        f"{found.exponentials} exponentials a turn, not {instance.exponentials}": (
            instance.weights and found.exponentials != instance.exponentials
        ),
        "no ex2.approx.ftz in its PTX": instance.weights and "ex2.approx.ftz.f32" not in found.ptx,
        "no tensor-core instruction in its loop": instance.tensor_cores and not found.matrix_instructions,
    }
    return [fault for fault, is_so in checks.items() if is_so]


def _opcode(text: str) -> str:
    """``HMMA`` of ``@!P0 HMMA.16816.F32 R4, ..``; which function a MUFU computes stays in its name."""
    words = text.split()
    word = words[1] if words[0].startswith("@") and len(words) > 1 else words[0]
    return ".".join(word.split(".")[:2]) if word.startswith("MUFU") else word.split(".")[0]


def innermost_loop(code: list[tuple[int, str]]) -> Counter:
    """Opcodes of the shortest loop that holds an exponential: from the target of a backward branch to the branch."""
    branches = ((re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text), at) for at, text in code)
    loops = ((int(jump[1], 16), at) for jump, at in branches if jump)
    bodies = ([_opcode(text) for at, text in code if start <= at <= end] for start, end in loops if start < end)
    return Counter(min((body for body in bodies if "MUFU.EX2" in body), key=len, default=[]))
