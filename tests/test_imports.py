"""Imports point one way, those inside of functions too, and no two files import each other by any way round."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floors of the house, from the ground up. A file may import from floors below its own, and from its own.
FLOORS = (
    (
        "perceiver_fast.float64",
        "perceiver_fast.gpu",
        "perceiver_fast.installation",
        "perceiver_fast.memory",
        "perceiver_fast.remembered",
        "perceiver_fast.settings",
        "perceiver_fast.tracing",
        "perceiver_fast.ranges",
        "perceiver_fast.version",
    ),
    ("perceiver_fast.reference",),
    ("perceiver_fast.kernels",),
    ("perceiver_fast.extension", "perceiver_fast.backends"),
    ("perceiver_fast.ops",),
    ("perceiver_fast.tokens", "perceiver_fast.shards"),
    ("perceiver_fast.layers",),
    ("perceiver_fast.models", "perceiver_fast.graph", "perceiver_fast.adapters", "perceiver_fast.distributed"),
    (
        "perceiver_fast.perceiver_pytorch",
        "perceiver_fast.perceiver_io",
        "perceiver_fast.gated",
        "perceiver_fast.mixed_latents",
        "perceiver_fast.experimental",
    ),
    ("perceiver_fast.insight",),
    ("perceiver_fast",),  # the package itself: what `import perceiver_fast` gives
    ("benchmarks",),
    ("perceiver_fast.commands",),
    ("perceiver_fast.__main__",),
)
# Kernels are reached through torch's registry; they know nothing of the ops that reach them.
ABOVE_KERNELS = {"perceiver_fast.gpu", "perceiver_fast.reference", "perceiver_fast.kernels"}


def files() -> dict[str, Path]:
    """Every module of the package, the kernels and the benchmarks, by the name it is imported by."""
    found = {}
    for folder, name in (
        ("perceiver_fast", "perceiver_fast"),
        ("kernels", "perceiver_fast.kernels"),
        ("benchmarks", "benchmarks"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "perceiver_fast" and "kernels" in path.relative_to(ROOT / folder).parts:
                continue  # a link to the kernels, where they are installed in place
            parts = [name, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


FILES = files()
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}
COMPILED = {"perceiver_fast._C", "perceiver_fast._cuda"}


def imported(name: str) -> set[str]:
    """The modules of ours that a file imports, or names to import them, wherever in it; other names count as their package."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: expected absolute imports, found a relative one"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in FILES else node.module for module in inner - COMPILED}
        elif isinstance(node, ast.Constant) and node.value in FILES and node.value not in PACKAGES:
            found.add(node.value)
    return {module for module in found if module in FILES}


IMPORTS = {name: imported(name) for name in FILES}


def floor(name: str) -> int:
    rooms = {room: at for at, floor in enumerate(FLOORS) for room in floor}
    while name not in rooms:
        name = name.rpartition(".")[0]
    return rooms[name]


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_from_its_floor_or_below(name):
    above = {other for other in IMPORTS[name] if floor(other) > floor(name)}
    assert not above, f"{name} imports from above: {', '.join(sorted(above))}"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("perceiver_fast.kernels")])
def test_kernels_know_nothing_of_ops(name):
    others = {other for other in IMPORTS[name] if ".".join(other.split(".")[:2]) not in ABOVE_KERNELS}
    assert not others


def test_no_circle():
    """Packages are left out: they import what is in them, and Python imports them with it."""
    graph = {name: others - PACKAGES for name, others in IMPORTS.items() if name not in PACKAGES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_every_room_has_a_floor():
    rooms = {room for floor in FLOORS for room in floor}
    top = {".".join(name.split(".")[: 1 if name.startswith("benchmarks") else 2]) for name in FILES}
    assert top == rooms
