"""What runs inside libfastexit's interpreter: the kernel table, once, and the header or the words of a new machine.

C calls these functions under the GIL, and hands them memory that it has mapped. None of them raises: a failure is a
status and one line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastexit import __version__
from fastexit import layout as L
from fastexit.embed import cabi
from fastexit.embed.cabi import Status
from fastexit.snapshot import unpack


class _Refused(Exception):
    """A status of its own, with its line."""

    def __init__(self, status: Status, line: str) -> None:
        super().__init__(line)
        self.status = status


def _start(ffi: Any, table: Any) -> None:
    """Fill in the kernels' addresses."""
    expected = ffi.sizeof("struct fxp_table")
    cure = "build the library again: fastexit embed build"
    if table.abi != L.ABI_VERSION:
        here = f"fastexit {__version__} of this Python has {L.ABI_VERSION}"
        raise _Refused(Status.E_ABI, f"libfastexit has ABI version {table.abi}, {here}: {cure}")
    if table.size != expected or expected != 8 + 8 * len(cabi.ENTRIES):
        raise _Refused(Status.E_ABI, f"libfastexit is not of this Python's fastexit {__version__}: {cure}")
    for name, address in cabi.addresses().items():
        setattr(table, name, ffi.cast(ffi.typeof(getattr(table, name)), address))


def _header(ffi: Any, config: Any, words: Any) -> None:
    ids = [] if config.apic_ids == ffi.NULL else ffi.unpack(config.apic_ids, min(config.vcpus, L.MAX_VCPUS + 1))
    for word, value in cabi.header(config, ids).items():
        words[word] = value


def _unpack(ffi: Any, data: Any, size: int, words: Any) -> None:
    memory = np.frombuffer(ffi.buffer(words, L.BYTES), dtype=np.uint64)
    try:
        unpack(bytes(ffi.buffer(data, size)), memory)
    except ValueError as error:
        raise _Refused(Status.E_SNAPSHOT, str(error)) from None


def attach(ffi: Any) -> None:
    """Make the functions above known to the library whose cffi module has this ``ffi``."""

    def answer(work: Callable[..., object], ffi: Any, args: tuple[Any, ...], line: Any, room: int) -> int:
        try:
            work(ffi, *args)
        except _Refused as refused:
            status, text = refused.status, str(refused)
        except ValueError as error:
            status, text = Status.E_RANGE, str(error)
        except RuntimeError as error:
            status, text = Status.E_PYTHON, str(error)
        except MemoryError:
            status, text = Status.E_MEMORY, "no memory"
        except BaseException as error:  # whatever it is, C gets a line and no traceback
            status, text = Status.E_PYTHON, f"{type(error).__name__}: {error}"
        else:
            return Status.OK
        told = " ".join(text.split()).encode(errors="replace")[: room - 1]
        ffi.memmove(line, told + b"\0", len(told) + 1)
        return status

    for name, work in (("fxp_start", _start), ("fxp_header", _header), ("fxp_unpack", _unpack)):

        def function(*args: Any, _work: Callable[..., object] = work) -> int:
            *given, line, room = args
            return answer(_work, ffi, tuple(given), line, room)

        ffi.def_extern(name=name, error=int(Status.E_PYTHON))(function)
