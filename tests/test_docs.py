"""The documentation: it builds without a warning, its links and tables hold, and the code that makes it runs."""

import html
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import ops, reference
from perceiver_fast.__main__ import COMMANDS
from perceiver_fast.insight.geometries import GEOMETRIES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TOOLS = ("mkdocs", "material", "mkdocstrings_handlers")
missing = [tool for tool in TOOLS if importlib.util.find_spec(tool) is None]
needs_mkdocs = pytest.mark.skipif(
    bool(missing),
    reason=f"{', '.join(missing)} not installed (pip install '.[docs]', Python 3.11 or later): pages were NOT built",
)


def load(name):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(page):
    """What a reader sees of a page, white space squeezed."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page.read_text())).split())


@needs_mkdocs
def test_every_page_is_built(site):
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    assert len(pages) > 20 and pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    assert not list(site.rglob("*.py"))


@needs_mkdocs
def test_the_site_needs_no_network(site):
    loaded = r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']?(?:https?:)?//[^\s"'>]+"""
    for page in site.rglob("*.html"):
        assert re.findall(loaded, page.read_text()) == [], page


@needs_mkdocs
def test_docstrings_are_read_as_docstrings(site):
    shown = text_of(site / "api" / "models.html")
    assert "Examples: >>> import torch >>> from perceiver_fast import Perceiver" in shown
    assert not re.search(r":(class|func|meth|data):|Example: ", shown)
    oracle = text_of(site / "api" / "reference.html")
    assert "o [B, H, N, dv] and lse [B, H, N] float64, -3.4e38" in oracle and "``" not in oracle
    # An example that was taken for prose is a quotation, three deep.
    assert not [page for page in site.rglob("*.html") if "<blockquote" in page.read_text()]


@needs_mkdocs
def test_command_line_page_is_what_the_commands_say(site):
    hooks, shown = load("hooks"), text_of(site / "command-line.html")
    for command in (None, *COMMANDS):
        told = hooks.help_of(command)
        assert told.startswith("usage: ") and " ".join(told.split()) in shown, command


def test_command_line_page_has_every_command():
    asked = re.findall(r"^\$ perceiver-fast ([a-z]+) --help$", (DOCS / "command-line.md").read_text(), re.MULTILINE)
    assert sorted(asked) == sorted(COMMANDS)


def test_api_pages_have_everything_public():
    asked = set()
    for page in (DOCS / "api").glob("*.md"):
        asked |= set(re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE))
    wanted = {f"perceiver_fast.{name}" for name in pf.__all__} - {"perceiver_fast.ops"}
    wanted |= {f"perceiver_fast.ops.{name}" for name in ops.__all__} - {"perceiver_fast.ops.add_layer_norm"}
    wanted |= {f"perceiver_fast.reference.{name}" for name in reference.__all__}
    absent = [name for name in sorted(wanted) if not any(f"{a}.".startswith(f"{name}.") for a in asked)]
    assert absent == [], "add `::: NAME` to a page of docs/api"


MENTIONS = (
    r"""environ(?:\.get|\.setdefault)?[\[(]\s*["'](\w+)""",
    r"""["'](\w+)["'] (?:not )?in os\.environ""",
    r"""getenv\(\s*["'](\w+)""",
    r"""\bflag\(["'](\w+)""",
    r"""\b(PERCEIVER_FAST_[A-Z_]*[A-Z])\b""",
)


def variables_read():
    """Names of the environment variables that code reads, with a file that does."""
    sources = [ROOT / "setup.py", *ROOT.glob("perceiver_fast/**/*.py"), *ROOT.glob("kernels/*.py")]
    sources += [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("csrc/*.cpp")]
    sources += [*ROOT.glob("csrc/*/*.cpp"), *ROOT.glob("csrc/*/*.h"), *ROOT.glob("csrc/*/*.cu*")]
    found = {}
    for source in sources:
        text = source.read_text()
        found |= {name: source.name for pattern in MENTIONS for name in re.findall(pattern, text)}
    made = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found.pop("PYTHONPATH", None)  # Python's own
    return found | dict.fromkeys(made, "Makefile")


def test_environment_table_is_complete():
    rows = re.findall(r"^\| (`[A-Z].*?`) \|", (DOCS / "environment.md").read_text(), re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    found = variables_read()
    assert len(found) > 10 and len(listed) == len(set(listed))
    assert set(found) - set(listed) == set(), {name: found[name] for name in set(found) - set(listed)}
    assert set(listed) - set(found) == set(), "listed, but nothing reads it"


def test_setup_names_the_variables_it_reads():
    text = (ROOT / "setup.py").read_text()
    _, docstring, code = text.split('"""', 2)
    read = {name for pattern in MENTIONS for name in re.findall(pattern, code)}
    assert read and [name for name in sorted(read) if name not in docstring] == []


def anchors(path):
    """Anchors of a page's headings, as mkdocs and GitHub name them."""
    words = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in words}


PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", ROOT / "benchmarks" / "GPU.md", *DOCS.rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """In the repository: files exist, and so do the headings that links point to."""
    for words, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), (words, target)
        assert not anchor or anchor in anchors(path), (words, target)


def test_pages_that_are_named_exist():
    """Also without a link: a page's name in the text is a page of the repository."""
    there = {path.name for path in ROOT.rglob("*.md") if ".venv" not in path.parts}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w*/.-])([\w-]+\.md)\b", page.read_text()))
        assert named <= there | {"examples.md", "gpu-battery.md"}, (page.name, named - there)


def tables(page):
    """The header rows of a page's tables, as lists of cells."""
    headers = re.findall(r"^(\|.*\|)\n\| ?-", page.read_text(), re.MULTILINE)
    return [[cell.strip() for cell in header.strip("|").split("|")] for header in headers]


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "performance.md"], ids=lambda page: page.name)
def test_ratios_are_beside_the_names_of_rows(page):
    """On a phone one sees the first columns: what a row is, and how much faster."""
    found = [header for header in tables(page) if any(cell.startswith("over ") for cell in header)]
    assert len(found) >= (8 if page.name == "performance.md" else 1)
    for header in found:
        ratios = [at for at, cell in enumerate(header) if cell.startswith("over ")]
        assert ratios == list(range(1, len(ratios) + 1)), header


def test_the_first_page_has_no_figures_of_its_own():
    """Its ratios and milliseconds are those of the pages that say how they were measured."""
    nav = re.search(r"^nav:\n  - [^:]+: (.+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    first = DOCS / nav[1]
    assert first.name == "start-here.md" and "(docs/start-here.md)" in (ROOT / "README.md").read_text()
    sources = "".join((DOCS / name).read_text() for name in ("performance.md", "paths.md"))
    measured = set(re.findall(r"[\d.,]+(?:x\b| ms\b| s\b)", sources)) | set(re.findall(r"[\d,.]*\d", sources))
    for text in (first.read_text(), (ROOT / "README.md").read_text().split("## Measured")[1].split("## How")[0]):
        found = re.findall(r"(?<![\d.,x])\d[\d.,]*x(?!\w)", text)
        assert len(found) > 10 and set(found) <= measured, set(found) - measured
    for number in re.findall(r"([\d,.]*\d) (?:ms|and [\d,.]+ ms|s\b)", first.read_text()):
        assert number in measured, number


def test_the_page_for_users_of_gpus_is_no_diary():
    page = (DOCS / "gpu-notes.md").read_text()
    assert "not measured" in page and "PERCEIVER_FAST_BACKEND=reference" in page and "sm_80" in page
    assert len(page.splitlines()) < 80 and not re.search(r"\bregisters\b|ex2|wgmma|SASS", page)
    assert "SASS" in (DOCS / "gpu-diary.md").read_text()


def test_links_out_of_the_pages_are_mended():
    mend = load("hooks").with_links
    assert mend("[a](../benchmarks/GPU.md#x)", "docs/index.md") == "[a](gpu-battery.md#x)"
    assert mend("[`LICENSE`](../LICENSE) [it](../LICENSE)", "docs/index.md") == "`LICENSE` it (`LICENSE`)"
    assert mend("[a](../docs/paths.md) [b](image.py)", "examples/README.md") == "[a](paths.md) b (`examples/image.py`)"
    kept = "[a](paths.md#the-latents) [b](#c) [d](https://e.f) ![g](pictures/token.svg)"
    assert mend(kept, "docs/index.md") == kept


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    done = python(DOCS / "make_pictures.py", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in tmp_path.iterdir()}
    pages = [(DOCS / page).read_text() for page in ("how-it-works.md", "decoders.md")]
    shown = {name for page in pages for name in re.findall(r"\(pictures/([\w-]+\.svg)\)", page)}
    assert drawn == shown and all((DOCS / "pictures" / name).exists() for name in shown)
    assert all(path.read_text().count("<path") > 20 for path in tmp_path.iterdir())


def test_counts_are_the_planners():
    counts = load("counts")
    geometry = GEOMETRIES["cross-only"].tiny()
    tokens, layer = counts.describe(geometry)
    assert (tokens.count, tokens.channels, layer.queries) == (30, 261, 6)
    sizes = {name: size for name, size, _ in counts.memory("cross-only")}
    assert sizes["weights, N x M"] == 4 * 512 * 224 * 224 and sizes["queries' tables"] == 4 * 512 * (3 + 224 + 224)
    with pytest.raises(TypeError, match="on a grid, got 'points'"):
        counts.memory("points")


def test_accuracy_table(capsys):
    """A row is measured again: its form is the page's, and ours is within twice perceiver-pytorch's error."""
    script = load("make_accuracy")
    assert script.main(["--model", "imagenet-lucid", "--seeds", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    for kind in script.MEASURED:
        theirs, ours = (row[kind][model] for model in script.MODELS)
        assert 0 < ours <= 2 * theirs, kind
    page = (DOCS / "accuracy.md").read_text()
    table = page.split(script.START)[1].split(script.END)[0].strip().splitlines()
    header, first = script.markdown([row]).splitlines()[0::2]
    assert table[0] == header and [line.split(" | ")[0] for line in table[2:]] == [f"| `{n}`" for n in script.SIZES]
    assert re.sub(r"\d\.\de-\d\d", "", first) in [re.sub(r"\d\.\de-\d\d", "", line) for line in table]
    assert torch.get_default_dtype() == torch.float32
