"""Triton's interpreter without work that has no effect, most of all. What it computes is the same to the bit.

Imported where TRITON_INTERPRET=1, before the first launch. It is about the Triton that constraints-cpu.txt pins; another
one that has not what is replaced here is left as it is, and slow.
"""

import dataclasses

import triton.language as tl
from triton.language.semantic import TritonSemantic
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


def block_type_once(self, element_ty, shape):
    """Of every element type and shape what is made of them, checks of the shape too."""
    sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    key = id(element_ty), sizes
    if key not in blocks:
        block_type(self, element_ty, shape)
        blocks[key] = dict(vars(self))  # which keeps the element type, and so its id
    vars(self).update(blocks[key])


def tensor_once(self, handle, type):
    """It makes a constant of every size, and of their product."""
    sizes = tuple(type.shape) if type.is_block() else ()
    if sizes not in shapes:
        tensor(self, handle, type)
        shapes[sizes] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = shapes[sizes]


def broadcast_unless_alike(self, lhs, rhs):
    """Operands of one shape go through as they are; to find that out it makes several shapes."""
    a, b = (tuple(operand.type.shape) if operand.type.is_block() else () for operand in (lhs, rhs))
    return (lhs, rhs) if a == b else broadcast(self, lhs, rhs)


if all(hasattr(interpreter, name) for name in NEEDED):
    patch_lang, namespaces = interpreter._patch_lang, {}
    interpreter._patch_lang = patch_lang_once
    np_dtype, dtypes = interpreter._get_np_dtype, {}
    interpreter._get_np_dtype = np_dtype_once
    # Every addition is done again in 64 bits, to look for overflow; without `debug` nothing looks at what is found.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
if vars(tl.block_type(tl.int32, [2])).keys() == {"element_ty", "shape", "numel", "name"}:
    block_type, blocks = tl.block_type.__init__, {}
    tl.block_type.__init__ = block_type_once
if vars(tl.tensor(None, tl.int32)).keys() == {"handle", "shape", "numel", "type", "dtype"}:
    tensor, shapes = tl.tensor.__init__, {}
    tl.tensor.__init__ = tensor_once
if hasattr(TritonSemantic, "broadcast_impl_value"):
    broadcast = TritonSemantic.broadcast_impl_value
    TritonSemantic.broadcast_impl_value = broadcast_unless_alike
