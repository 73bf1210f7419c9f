"""Loading of what was compiled: the operators' library, by ``perceiver_fast._C``, and the CUDA kernels; or what stands in
the way of either."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path

import torch

from perceiver_fast.installation import PACKAGE, checkout, elsewhere, origin
from perceiver_fast.memory import keep_freed

log = logging.getLogger("perceiver_fast")

_build_record = Path(__file__).with_name("_build.json")
BUILD_NEEDS = "'setuptools>=77' 'pybind11>=2.13' 'ninja>=1.11'"


def mend() -> str:
    """The command that installs this package again, and builds it as it was built: beside the torch that is here, or not."""
    again = "pip install --no-cache-dir --force-reinstall --no-deps"
    if build_record().get("isolated"):
        return f"{again} {origin()}"
    return f"pip install {BUILD_NEEDS} && {again} --no-build-isolation {origin()}"


def build_record() -> dict:
    """What the build wrote down: compiler, flags, or why it was skipped. Empty when there was no build."""
    return json.loads(_build_record.read_text()) if _build_record.exists() else {}


_AGAIN = "pip install --no-build-isolation -e ." if checkout() else mend()


def _why_missing() -> str:
    if (installed := elsewhere()) is not None:
        return (
            f"this is the source folder {PACKAGE}, where nothing was built; the package with kernels is {installed}: run "
            "from another folder, or install the clone with `-e`"
        )
    record = build_record()
    if not record:
        return f"the C++ extension was not built (run `{_AGAIN}`)"
    return (
        f"the C++ extension was not built: {record['skipped']}"
        if record.get("skipped")
        else f"the C++ extension was built but its file is missing (run `{_AGAIN}` again)"
    )


def _load():
    if importlib.util.find_spec("perceiver_fast._C") is None:
        return None, _why_missing()
    try:
        from perceiver_fast import _C

        _C.active_isa()
    except (
        Exception
    ) as error:  # a wrong ABI, a missing symbol or a bad PERCEIVER_FAST_CPU_ISA: said once, kept as reason
        log.warning("the C++ extension failed to load, plain PyTorch runs instead: %s", error)
        return None, f"the C++ extension failed to load: {error}"
    return _C, None


module, error = _load()
"""The extension module or None, and why it is None (a str) or None."""

if module is not None:
    keep_freed()

_warned = False


class MissingKernelsWarning(UserWarning):
    """The C++ kernels are not there, and plain PyTorch runs in their place."""


def warn_missing() -> None:
    """Warn, once a process, that a call on the CPU had no C++ kernels, why, and what to do."""
    global _warned
    if error is None or _warned or torch.compiler.is_compiling():
        return
    _warned = True
    warnings.warn(
        f"perceiver_fast runs on plain PyTorch, without the kernels that make it faster: {error}. When that is mended "
        f"(a build needs a C++ compiler and the Python headers), install it again with `{mend()}`; without these options "
        "pip installs its cached wheel again. `perceiver-fast info` says what was built. "
        "PERCEIVER_FAST_BACKEND=reference asks for plain PyTorch, without this warning",
        MissingKernelsWarning,
        stacklevel=2,
    )


def _why_cuda_missing() -> str:
    record = build_record().get("cuda", {})
    if record.get("skipped"):
        return f"the CUDA kernels were not built: {record['skipped']}"
    return (
        f"the CUDA kernels were built but their file is missing (run `{_AGAIN}` again)"
        if record
        else f"the CUDA kernels were not built (run `{_AGAIN}` beside nvcc and a torch with CUDA)"
    )


def _load_cuda() -> str | None:
    library = Path(__file__).with_name("_cuda.so")
    if not library.exists():
        return _why_cuda_missing()
    if torch.version.cuda is None:  # the library's symbols would be missing
        return f"the CUDA kernels were built, but torch {torch.__version__} is not a CUDA build"
    try:
        torch.ops.load_library(str(library))  # registers the kernels; CUDA itself starts with the first CUDA tensor
    except Exception as error:
        log.warning("the CUDA kernels failed to load, plain PyTorch runs instead: %s", error)
        return f"the CUDA kernels failed to load: {error}"
    return None


def shared_library() -> Path:
    """The library of the operators and their CPU kernels, for processes without Python: loading it registers them.

    It needs torch's C++ libraries, of any release from 2.10 on, and nothing else. Programs written by
    ``torch._inductor.aoti_compile_and_package`` call its operators.

    Raises:
        FileNotFoundError: the package was installed without it; the message says why.

    Example:
        >>> import perceiver_fast as pf
        >>> pf.shared_library().name
        'libperceiver_fast.so'
    """
    file = Path(__file__).with_name("libperceiver_fast.so")
    if not file.exists():
        raise FileNotFoundError(
            f"expected {file.name} in the package, but {error or 'it is not there'}; mend it with `{mend()}`"
        )
    return file


cuda_error = _load_cuda()
"""Why the CUDA kernels are not there (a str), or None."""
