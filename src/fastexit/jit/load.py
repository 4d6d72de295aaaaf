"""Machine code into the process: LLVM links an object file, Python gets functions that call it.

numba has no part in this, so a process that finds its kernels on disk does not import it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llvmlite.binding as ll

METH_FASTCALL = 0x80
PYTHON_API = (
    "Py_DecRef",
    "PyErr_BadArgument",
    "PyErr_Occurred",
    "PyErr_SetString",
    "PyEval_RestoreThread",
    "PyEval_SaveThread",
    "PyImport_ImportModule",
    "PyLong_AsUnsignedLongLong",
    "PyLong_FromUnsignedLongLong",
    "PyObject_GetAttrString",
)
"""What machine code may call of Python's C API: ``door`` emits the calls."""

_engines: list[Any] = []
"""Code stays as long as the process: C may hold its addresses, and other threads may run it to the end."""


class _PyMethodDef(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_NEW = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)


def link(code: bytes) -> Callable[[str], int]:
    """Put an object file into memory; a function that gives the address of each symbol it defines."""
    ll.initialize_native_target()
    ll.initialize_native_asmprinter()
    for name in PYTHON_API:  # by address: a host may have loaded libpython where the linker does not look
        ll.add_symbol(name, ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value)
    machine = ll.Target.from_triple(ll.get_process_triple()).create_target_machine(jit=True)
    engine = ll.create_mcjit_compiler(ll.parse_assembly(""), machine)
    engine.add_object_file(ll.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)

    def address(symbol: str) -> int:
        found = engine.get_function_address(symbol)
        if not found:
            raise LookupError(f"machine code without {symbol}")
        return found

    return address


def python_function(name: str, address: int) -> Callable[..., int]:
    """The built-in function whose machine code is at an address."""
    # A function object of our own: what ctypes.pythonapi hands out is everybody's, and so would its argtypes be.
    new = _NEW(("PyCFunction_NewEx", ctypes.pythonapi))
    method = _PyMethodDef(name.encode(), address, METH_FASTCALL, None)
    # ``self``, which the code does not look at, keeps the definition alive: the function only points to it.
    return new(ctypes.addressof(method), method, None)
