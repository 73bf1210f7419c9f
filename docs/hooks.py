"""What mkdocs runs while it builds: help of commands, pages that live elsewhere, and links out of docs/."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path, PurePosixPath
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout's package, also under a bare `mkdocs`
ELSEWHERE = {"examples.md": "examples/README.md", "gpu-battery.md": "benchmarks/GPU.md"}  # page: the file it shows
HELP = re.compile(r"^```console\n\$ perceiver-fast( [a-z]+)? --help\n```$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!\w+:|#)[^)\s#]*)(#[^)\s]*)?\)")


def help_of(command: str | None) -> str:
    """What ``perceiver-fast [COMMAND] --help`` prints on a terminal of 100 columns."""
    from perceiver_fast.__main__ import main

    text = io.StringIO()
    plain = mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"})
    with plain, contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*([command] if command else []), "--help"])
    return text.getvalue().rstrip()


def with_help(text: str) -> str:
    """``text`` with the output below every block that asks a command for its help."""
    return HELP.sub(lambda m: f"{m[0]}\n\n```text\n{help_of(m[1] and m[1].strip())}\n```", text)


def with_links(text: str, source: str) -> str:
    """``text`` of the file ``source`` with links that hold on the site.

    Args:
        text: Markdown whose links hold in the repository.
        source: its path from the repository's root. Links to files that are no pages become their paths.
    """
    folder = PurePosixPath(source).parent
    pages = {file: page for page, file in ELSEWHERE.items()}

    def link(match: re.Match) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        path = os.path.normpath(folder / target) if target else source
        if path in pages:
            path = f"docs/{pages[path]}"
        if not path.startswith("docs/"):
            return words if words.strip("`") == path else f"{words} (`{path}`)"
        at = source if source.startswith("docs/") else f"docs/{pages[source]}"
        return f"[{words}]({os.path.relpath(path, os.path.dirname(at))}{anchor})"

    return LINK.sub(link, text)


def on_files(files, config):
    """Add the pages that live elsewhere."""
    from mkdocs.structure.files import File

    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """Expand help, mend links, and undo what GitHub alone needs: a backslash before a bar in a table's code."""
    uri = page.file.src_uri
    text = with_links(with_help(markdown), ELSEWHERE.get(uri, f"docs/{uri}"))
    return re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), text)
