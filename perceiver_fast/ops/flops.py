"""The declared work of all operators, made known to torch's FlopCounterMode.

torch's counter counts two operations a multiply-add of products and attention, and nothing of what is elementwise. Its
module takes a fifth of a second to import (it imports triton), so the formulas join it when somebody else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

from perceiver_fast.ops.declaration import OPERATORS, Operator

COUNTER = "torch.utils.flop_counter"


def register(counter: ModuleType) -> None:
    """Make torch's counter, the module, know all operators of this package."""

    def formula(operator: Operator) -> Callable[..., int]:
        names = [argument.name for argument in operator.packet.default._schema.arguments]

        def count(*args, out_shape=None, **keywords):
            return 2 * operator.work(*args, *(keywords[name] for name in names[len(args) :])).multiply_adds

        return count

    for operator in OPERATORS.values():
        if operator.packet not in counter.flop_registry:  # as it is where this package is imported again
            counter.register_flop_formula(operator.packet)(formula(operator))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds the counter as everybody else does, and registers once it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register
        return spec


def register_when_imported() -> None:
    """Register now where torch's counter is there, else once it is."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
