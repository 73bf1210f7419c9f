"""docs/adding-an-op.md, followed to the letter: its files are written into a copy of the checkout, built and tested."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
from support import needs_extension
from warm_python import python

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/adding-an-op.md"
OP = "squared_relu"
FILES = re.findall(r"^```\w+ title=\"([^\"]+)\"\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)

# Compiles the files of the new op alone, as setup.py would, and runs pytest where the result is loaded.
RUN = f"""
import subprocess, sys, sysconfig
from pathlib import Path
import torch
sys.path.insert(0, ".")
import setup
target = Path("build/{OP}.so").resolve()
if not target.exists():
    sources = setup.library_sources(torch, target.parent / "ninja")
    wanted = [s for s in sources if "{OP}" in s[0] or s[0] in ("core_isa", "cpu_cores", "cpu_team")]
    assert len(wanted) > 3, wanted
    link = ["-shared", f"-L{{Path(torch.__file__).parent / 'lib'}}", "-ltorch_cpu"]
    setup.run_ninja(target.parent / "ninja", target, setup.find_compiler(), setup.FLAGS, link, wanted)
torch.ops.load_library(str(target))
import perceiver_fast
assert Path(perceiver_fast.__file__).parent == Path("perceiver_fast").resolve(), perceiver_fast.__file__
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with the page's files in it."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("perceiver_fast", "kernels", "csrc", "tests", "docs"):
        link = ("kernels",) if folder == "perceiver_fast" else ()  # where it is installed in place
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", *link))
    (root / "perceiver_fast/kernels").symlink_to(root / "kernels")
    for name in ("setup.py", "pyproject.toml", "README.md", "mkdocs.yml", "Makefile"):
        shutil.copy(ROOT / name, root)
    for title, text in FILES:
        path, _, more = title.partition(", ")
        assert (more == "one more line") == (root / path).exists(), title
        (root / path).parent.mkdir(exist_ok=True)
        if more:
            old = (root / path).read_text()
            names = rf'{text}\n\1\n    "{OP}",'  # what is imported is public
            new = re.sub(r"^(__all__ = \[)", names, old, count=1, flags=re.MULTILINE)
            text = new if path.endswith(".py") else f"{old}\n{text}"
            assert text != old, title
        (root / path).write_text(text)
    return root


def run(checkout, *arguments, **environment):
    # What is installed in place would be found first: the copy's own folder goes before it.
    environment = os.environ | {"PYTHONPATH": f"{checkout}:{checkout / 'tests'}"} | environment
    done = python("-c", RUN, *arguments, cwd=checkout, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_page_has_every_room():
    paths = [title.partition(",")[0] for title, _ in FILES]
    assert len(paths) == len(set(paths)) == 12
    for room in ("perceiver_fast/reference", "perceiver_fast/ops", "csrc/core", "csrc/cpu", "kernels", "tests/ops"):
        assert any(path.startswith(f"{room}/") and OP in path for path in paths), room


@pytest.mark.skipif(**needs_extension)
def test_what_it_builds_passes_the_tests_of_every_op(checkout):
    files = f"tests/ops/test_{OP}.py", "tests/ops/test_declarations.py", f"perceiver_fast/ops/{OP}.py"
    out = run(checkout, *files, "-k", OP)
    assert int(re.search(r"(\d+) passed", out)[1]) > 30 and "failed" not in out and "skipped" not in out, out[-2000:]


@pytest.mark.skipif(**needs_extension)
def test_everything_that_loops_over_ops_has_it(checkout):
    code = (
        "import torch, perceiver_fast as pf\n"
        "from perceiver_fast.insight.environment import collect\n"
        f"assert collect()['backends']['{OP}']['cpu']['cpu'] == []\n"
        "from torch.utils.flop_counter import flop_registry\n"
        f"assert torch.ops.perceiver_fast.{OP}_backward in flop_registry\n"
    )
    (checkout / "tests/test_loops.py").write_text("def test_loops():\n    " + code.replace("\n", "\n    "))
    run(checkout, "tests/test_loops.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: NOT tested here")
@pytest.mark.skipif(**needs_extension)
def test_its_gpu_kernel_compiles_and_computes(checkout):
    """Ahead of time for a GPU that is not there, and in Triton's interpreter on the CPU."""
    (checkout / "tests/test_gpu.py").write_text(
        "import torch\n"
        "from perceiver_fast import reference\n"
        "from perceiver_fast.ops import squared_relu\n"
        "def test_compiles():\n"
        "    from perceiver_fast.insight import gpu_kernels\n"
        "    from perceiver_fast.kernels import aot\n"
        f"    ours = [i for i in gpu_kernels.instances(90) if i.name.startswith('{OP}')]\n"
        "    assert len(ours) == 2\n"
        "    assert not any(aot.faults(i, aot.compile_instance(i, 90), 90) for i in ours)\n"
    )
    run(checkout, "tests/test_gpu.py")
    run(checkout, f"tests/ops/test_{OP}.py", "-k", "float32 or bfloat16 or nan", TRITON_INTERPRET="1")
