"""How Python calls an entry: a C function of the vector-call kind, made of machine code and a method definition.

numba's own door takes its arguments as a tuple and any number for an integer, converts what it gets twice, and asks
for an environment that kernels have no use for: two thirds of what a short call costs. This one takes ints only, raises
TypeError or OverflowError for anything else, and returns an int.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from llvmlite import ir as llvm

METH_FASTCALL = 0x80
_WORD = llvm.IntType(64)
_OBJECT = llvm.IntType(8).as_pointer()


class _PyMethodDef(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


def python_function(name: str, address: int, keep: Any) -> Callable[..., int]:
    """The built-in function whose machine code is at an address; ``keep`` lives as long as it does."""
    new = ctypes.pythonapi.PyCFunction_NewEx
    new.restype = ctypes.py_object
    new.argtypes = ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p
    method = _PyMethodDef(name.encode(), address, METH_FASTCALL, None)
    # ``self``, which the code does not look at, holds the definition too: the function only points to it.
    return new(ctypes.addressof(method), (method, keep), None)


def emit(module: llvm.Module, name: str, callee: llvm.Function, nogil: bool) -> None:
    """Add ``PyObject *name(self, args, nargs)`` around a function of 64-bit words; ``nogil`` gives up the GIL."""
    kind = llvm.FunctionType(_OBJECT, [_OBJECT, _OBJECT.as_pointer(), _WORD])
    outer = llvm.Function(module, kind, name)
    fail = outer.append_basic_block("fail")
    llvm.IRBuilder(fail).ret(_OBJECT(None))
    builder = llvm.IRBuilder(outer.append_basic_block("entry"))
    outer.blocks.insert(0, outer.blocks.pop())
    _, given, count = outer.args
    wanted = len(callee.args)
    with builder.if_then(builder.icmp_signed("!=", count, _WORD(wanted)), likely=False):
        builder.call(_api(module, "PyErr_BadArgument", llvm.IntType(32)), [])
        builder.branch(fail)
    convert = _api(module, "PyLong_AsUnsignedLongLong", _WORD, _OBJECT)
    occurred = _api(module, "PyErr_Occurred", _OBJECT)
    words = []
    for i in range(wanted):
        word = builder.call(convert, [builder.load(builder.gep(given, [_WORD(i)]))])
        with builder.if_then(builder.icmp_unsigned("==", word, _WORD(-1)), likely=False):
            raised = builder.icmp_unsigned("!=", builder.call(occurred, []), _OBJECT(None))
            with builder.if_then(raised, likely=False):
                builder.branch(fail)
        words.append(word)
    if nogil:
        thread = builder.call(_api(module, "PyEval_SaveThread", _OBJECT), [])
    result = builder.call(callee, words)
    if nogil:
        builder.call(_api(module, "PyEval_RestoreThread", llvm.VoidType(), _OBJECT), [thread])
    builder.ret(builder.call(_api(module, "PyLong_FromUnsignedLongLong", _OBJECT, _WORD), [result]))


def _api(module: llvm.Module, name: str, result: llvm.Type, *args: llvm.Type) -> llvm.Function:
    """A function of Python's C API; the process has it."""
    return module.globals.get(name) or llvm.Function(module, llvm.FunctionType(result, args), name)
