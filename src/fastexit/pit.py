"""The PIT as user space sees it: made, saved and restored, told whether ticks wait for their acknowledgement.

Models: KVM_CREATE_PIT2 (and KVM_CREATE_PIT, which has a speaker), KVM_GET_PIT2, KVM_SET_PIT2, KVM_SET_PIT,
KVM_REINJECT_CONTROL. kernels/i8254.py is what it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import layout as L
from fastexit import regs as R
from fastexit.jit.declare import load
from fastexit.traits import Trait

if TYPE_CHECKING:
    from fastexit.machine import Machine


def create(m: Machine, speaker: bool) -> None:
    """KVM_CREATE_PIT2. ValueError where there is one, and without an in-kernel PIC."""
    if m.mem[L.PIT_PRESENT]:
        raise ValueError("create_pit: there is a PIT already (EEXIST)")
    if m.mem[L.H_CONFIG] & L.CONFIG_SPLIT_IRQCHIP and not m.profile.traits & Trait.PIT_ANYWHERE:
        raise ValueError(f"create_pit: kernel {m.release} wants an in-kernel PIC, irqchip='full' (ENOENT)")
    m.shared_row()
    load("create_pit")(m.handle, int(bool(speaker)))


def _require(m: Machine) -> None:
    if not m.mem[L.PIT_PRESENT]:
        raise ValueError("there is no PIT: create_pit() makes it (ENXIO)")


def get(m: Machine) -> bytes:
    """KVM_GET_PIT2."""
    _require(m)
    with m.lock:  # one staging page for all
        m.look_at_clock()
        load("get_pit")(m.handle)
        return m.mem[L.H_STAGE : L.H_STAGE + R.PIT_STATE2_BYTES // 8].tobytes()


def put(m: Machine, data: bytes) -> None:
    """KVM_SET_PIT2 of 112 bytes, KVM_SET_PIT of 72. TypeError or ValueError for anything else."""
    try:
        state = bytes(memoryview(data).cast("B"))
    except TypeError:
        raise TypeError(f"a PIT's state is {R.PIT_STATE2_BYTES} bytes, not {type(data).__name__}") from None
    if len(state) not in (R.PIT_STATE_BYTES, R.PIT_STATE2_BYTES):
        raise ValueError(f"a PIT's state is {R.PIT_STATE2_BYTES} bytes, or {R.PIT_STATE_BYTES}, not {len(state)}")
    _require(m)
    with m.lock:
        m.mem[L.H_STAGE : L.H_STAGE + len(state) // 8] = memoryview(state).cast("Q")
        m.shared_row()
        load("set_pit")(m.handle, int(len(state) == R.PIT_STATE2_BYTES))


def reinject(m: Machine, on: bool) -> None:
    """KVM_REINJECT_CONTROL."""
    _require(m)
    m.shared_row()
    load("pit_reinject")(m.handle, int(bool(on)))
