"""A griffe extension: the package's docstrings, written to be read in the source, as mkdocstrings expects them."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`~?([^`]+)`")
NAMES_GO_ON = re.compile(r"^( +(?:\w+, )+\w+,)\n +(?=\w+[,:])", re.MULTILINE)  # one item's names, on several lines
RETURNED = re.compile(r"^( *Returns:\n +)(?!\w+:)", re.MULTILINE)  # prose, not a type and its text


def readable(text: str) -> str:
    """Roles become code, "Example:" a section that mkdocstrings knows, names of arguments one line, returns one text."""
    text = ROLE.sub(r"``\1``", text)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = RETURNED.sub(r"\1: ", text)
    while NAMES_GO_ON.search(text):
        text = NAMES_GO_ON.sub(r"\1 ", text)
    return text


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
