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
from fastexit.config import profile_of, release_of
from fastexit.costs.prices import price_words
from fastexit.costs.profile import CostProfile, cost_profile, cost_profiles
from fastexit.embed import cabi
from fastexit.embed.cabi import Status
from fastexit.snapshot import unpack
from fastexit.tracepoints.ring import Trace, Words


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
    _costs(ffi, words, config.costs)


def _costs(ffi: Any, words: Any, costs: Any) -> None:
    """Fill in the prices of a cost profile, or take them away."""
    if costs == ffi.NULL:
        words[L.H_CONFIG] &= ~L.CONFIG_COSTS
        return
    name = ffi.string(costs).decode(errors="replace")
    try:
        profile = cost_profile(name) if name in cost_profiles() else CostProfile.load(name)
    except OSError as error:
        known = ", ".join(cost_profiles())
        raise ValueError(f"costs {name!r}: no such profile ({known}), nor a file: {error.strerror}") from None
    kernel = profile_of(np.frombuffer(ffi.buffer(words, L.BYTES), dtype=np.uint64)).name
    for word, value in price_words(profile, kernel).items():
        words[word] = value
    words[L.H_CONFIG] |= L.CONFIG_COSTS


def _text(ffi: Any, words: Any, record: Any, line: Any, room: int) -> None:
    """The text of a record, into its place."""
    memory = np.frombuffer(ffi.buffer(words, L.BYTES), dtype=np.uint64)
    vcpu = record.vcpu if record.vcpu < words[L.H_NVCPUS] else -1
    kernel = profile_of(memory).name
    trace = Trace(Words(memory, memory.data, kernel, release_of(memory) or kernel))
    text = trace.line(record.event, vcpu, list(record.args))
    if text is None:
        raise _Refused(Status.NOTHING, "")
    told = text.encode() + b"\0"
    if len(told) > room:
        raise _Refused(Status.E_SIZE, "")
    ffi.memmove(line, told, len(told))


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

    works: dict[str, Callable[..., object]] = {
        "fxp_start": _start,
        "fxp_header": _header,
        "fxp_unpack": _unpack,
        "fxp_costs": _costs,
    }
    for name, work in works.items():

        def function(*args: Any, _work: Callable[..., object] = work) -> int:
            *given, line, room = args
            return answer(_work, ffi, tuple(given), line, room)

        ffi.def_extern(name=name, error=int(Status.E_PYTHON))(function)

    def text(words: Any, record: Any, line: Any, room: int) -> int:
        try:
            _text(ffi, words, record, line, room)
        except _Refused as refused:
            return refused.status
        except BaseException:  # a record that no kernel has written
            return Status.E_RANGE
        return Status.OK

    ffi.def_extern(name="fxp_text", error=int(Status.E_PYTHON))(text)
