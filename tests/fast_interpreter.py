"""Triton's interpreter without work that has no effect, half of all. What it computes is the same to the bit.

Imported where TRITON_INTERPRET=1, before the first launch. It is about the Triton that constraints-cpu.txt pins; another
one that has not what is replaced here is left as it is, and slow.
"""

import dataclasses

import triton.language as tl
from triton.runtime import interpreter

NEEDED = ("_LangPatchScope", "_get_np_dtype", "_patch_lang", "interpreter_builder")


def patch_lang_once(fn):
    """A launch replaces the functions of triton.language; so would every call of a device function, once more."""
    if fn not in namespaces:
        namespaces[fn] = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(namespace.load) for namespace in namespaces[fn]):
        return patch_lang(fn)
    return interpreter._LangPatchScope()


def np_dtype_once(dtype):
    """It makes a dictionary of all dtypes each time."""
    name = dtype.scalar.name
    if name not in dtypes:
        dtypes[name] = np_dtype(dtype)
    return dtypes[name]


if all(hasattr(interpreter, name) for name in NEEDED):
    patch_lang, namespaces = interpreter._patch_lang, {}
    interpreter._patch_lang = patch_lang_once
    np_dtype, dtypes = interpreter._get_np_dtype, {}
    interpreter._get_np_dtype = np_dtype_once
    # Every addition is done again in 64 bits, to look for overflow; without `debug` nothing looks at what is found.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
