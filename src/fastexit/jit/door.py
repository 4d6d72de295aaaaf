"""How Python and C call an entry: the two functions of machine code around each.

numba's own door takes its arguments as a tuple and any number for an integer, converts what it gets twice, and asks
for an environment that kernels have no use for: two thirds of what a short call costs. This one is of the vector-call
kind, takes ints only, raises TypeError or OverflowError for anything else, and returns an int.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir as llvm
from numba.core import cgutils

_WORD = llvm.IntType(64)
_OBJECT = llvm.IntType(8).as_pointer()


def emit_c(module: llvm.Module, name: str, kernel: llvm.Function, raises: bool) -> None:
    """Add ``uint64_t name(uint64_t, ...)`` around a kernel.

    One that ``raises``, because bounds are checked, has nobody to tell here, and stops the process.
    """
    words = [word.type for word in arguments(kernel, raises)]
    outer = llvm.Function(module, llvm.FunctionType(_WORD, words), name)
    builder = llvm.IRBuilder(outer.append_basic_block())
    status, result = call(builder, kernel, outer.args, raises)
    if raises:
        with builder.if_then(_failed(builder, status), likely=False):
            builder.call(module.declare_intrinsic("llvm.trap", (), llvm.FunctionType(llvm.VoidType(), [])), [])
    builder.ret(result)


def emit_python(module: llvm.Module, name: str, kernel: llvm.Function, raises: bool, nogil: bool) -> None:
    """Add ``PyObject *name(self, args, nargs)``; ``nogil`` gives up the GIL while the kernel runs."""
    kind = llvm.FunctionType(_OBJECT, [_OBJECT, _OBJECT.as_pointer(), _WORD])
    outer = llvm.Function(module, kind, name)
    builder = llvm.IRBuilder(outer.append_basic_block())
    _, given, count = outer.args
    wanted = len(arguments(kernel, raises))
    with _failing(builder, builder.icmp_signed("!=", count, _WORD(wanted))):
        builder.call(_api(module, "PyErr_BadArgument", llvm.IntType(32)), [])
    convert = _api(module, "PyLong_AsUnsignedLongLong", _WORD, _OBJECT)
    occurred = _api(module, "PyErr_Occurred", _OBJECT)
    words = []
    for i in range(wanted):
        word = builder.call(convert, [builder.load(builder.gep(given, [_WORD(i)]))])
        with builder.if_then(builder.icmp_unsigned("==", word, _WORD(-1)), likely=False):
            with _failing(builder, builder.icmp_unsigned("!=", builder.call(occurred, []), _OBJECT(None))):
                pass
        words.append(word)
    if nogil:
        thread = builder.call(_api(module, "PyEval_SaveThread", _OBJECT), [])
    status, result = call(builder, kernel, words, raises)
    if nogil:
        builder.call(_api(module, "PyEval_RestoreThread", llvm.VoidType(), _OBJECT), [thread])
    if raises:
        with _failing(builder, _failed(builder, status)):
            _raise_index_error(module, builder)
    builder.ret(builder.call(_api(module, "PyLong_FromUnsignedLongLong", _OBJECT, _WORD), [result]))


def arguments(kernel: llvm.Function, raises: bool) -> tuple[Any, ...]:
    """What a kernel is given; behind the places for its result and an error, where it may raise."""
    return kernel.args[2:] if raises else kernel.args


def call(builder: llvm.IRBuilder, kernel: llvm.Function, words: list[Any], raises: bool = False) -> tuple[Any, Any]:
    """Status and result of a kernel. One that raises is called as numba has it: result and error by pointer."""
    if not raises:
        return None, builder.call(kernel, words)
    slot, place = (cgutils.alloca_once(builder, argument.type.pointee) for argument in kernel.args[:2])
    status = builder.call(kernel, [slot, place, *words])
    return status, builder.load(slot)


def _failed(builder: llvm.IRBuilder, status: llvm.Value) -> llvm.Value:
    return builder.icmp_signed("!=", status, status.type(0))


@contextmanager
def _failing(builder: llvm.IRBuilder, condition: llvm.Value) -> Iterator[None]:
    """A block that ends with an exception set."""
    with builder.if_then(condition, likely=False):
        yield
        builder.ret(_OBJECT(None))


def _raise_index_error(module: llvm.Module, builder: llvm.IRBuilder) -> None:
    """Found by name: the linker of machine code reaches functions of Python, and data not everywhere."""
    builtins = builder.call(_api(module, "PyImport_ImportModule", _OBJECT, _OBJECT), [_text(module, "builtins")])
    find = _api(module, "PyObject_GetAttrString", _OBJECT, _OBJECT, _OBJECT)
    kind = builder.call(find, [builtins, _text(module, "IndexError")])
    put = _api(module, "PyErr_SetString", llvm.VoidType(), _OBJECT, _OBJECT)
    builder.call(put, [kind, _text(module, "a kernel's index is out of bounds")])
    drop = _api(module, "Py_DecRef", llvm.VoidType(), _OBJECT)
    for mine in kind, builtins:
        builder.call(drop, [mine])


def _api(module: llvm.Module, name: str, result: llvm.Type, *args: llvm.Type) -> llvm.Function:
    """A function of Python's C API; ``load.PYTHON_API`` lists them."""
    return module.globals.get(name) or llvm.Function(module, llvm.FunctionType(result, args), name)


def _text(module: llvm.Module, text: str) -> llvm.Constant:
    data = bytearray(text.encode() + b"\0")
    constant = llvm.GlobalVariable(module, llvm.ArrayType(llvm.IntType(8), len(data)), module.get_unique_name("text"))
    constant.initializer = llvm.Constant(constant.value_type, data)
    constant.linkage, constant.global_constant = "internal", True
    return constant.bitcast(_OBJECT)
