"""The C header and the Python layout are one layout."""

from __future__ import annotations

import re
from pathlib import Path

import cffi
import numpy as np
import pytest

from fastexit import layout

HEADER = Path(__file__).parents[1] / "native" / "fastexit_layout.h"


@pytest.fixture(scope="module")
def ffi() -> cffi.FFI:
    parser = cffi.FFI()
    text = HEADER.read_text()
    parser.cdef(text[text.index("/* cffi:begin */") : text.index("/* cffi:end */")])
    return parser


@pytest.mark.parametrize("name", re.findall(r"\bFX_(\w+) (?:= |0x)", HEADER.read_text()))
def test_constant(ffi: cffi.FFI, name: str) -> None:
    """Every constant of the header has its value in layout.py."""
    assert getattr(ffi.dlopen(None), f"FX_{name}") == getattr(layout, name)


@pytest.mark.parametrize(("struct", "dtype"), [("fx_exit", layout.EXIT), ("fx_outcome", layout.OUTCOME)])
def test_record(ffi: cffi.FFI, struct: str, dtype: np.dtype) -> None:
    """Same fields at the same places, of the same size."""
    fields = dict(ffi.typeof(f"struct {struct}").fields)
    assert ffi.sizeof(f"struct {struct}") == dtype.itemsize
    for name, field in fields.items():
        kind, offset = dtype.fields[name]
        assert (field.offset, ffi.sizeof(field.type)) == (offset, kind.itemsize), name
    assert set(dtype.names) - set(fields) <= {"code"}


def test_descriptor(ffi: cffi.FFI) -> None:
    """64 bytes, control at byte 32, and rows keep it on a 64-byte border."""
    assert ffi.sizeof("struct fx_pid") == 64
    assert ffi.offsetof("struct fx_pid", "control") == 8 * layout.PID_CONTROL_WORD
    assert layout.HOT * 8 % 64 == 0
    assert layout.HOT_STRIDE * 8 % 64 == 0


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("H_", layout.HEADER_WORDS),
        ("K_", layout.KVM_STRIDE),
        ("HOT_", layout.HOT_STRIDE),
        ("VEC_", layout.VEC_STRIDE),
    ],
)
def test_words_have_places_of_their_own(prefix: str, words: int) -> None:
    """No two names share a word of a row, and all lie inside it; a set of vectors takes four."""
    sets = {"HOT_TMR", "VEC_IRR", "K_ISR", "K_IOAPIC_HANDLED"}
    taken: dict[int, str] = {}
    for name, first in vars(layout).items():
        if name.startswith(prefix) and not name.endswith("STRIDE"):
            for word in range(first, first + (4 if name in sets else 1)):
                assert word < words, name
                assert word not in taken, f"{name} and {taken.get(word)}"
                taken[word] = name
