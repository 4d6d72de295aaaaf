"""A Unicorn engine as one CPU of a host: registers, memory, hooks, the modes it starts in. cpu.py runs it."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import unicorn
from unicorn import x86_const
from unicorn.unicorn_py3.unicorn import uclib

from fastexit.adapters.unicorn import firmware as firmware
from fastexit.adapters.unicorn import hook as H
from fastexit.adapters.unicorn.fault import UD, GuestError
from fastexit.adapters.unicorn.hook import Stop
from fastexit.adapters.unicorn.paging import physical
from fastexit.adapters.unicorn.state import LONG, Kept, Segment
from fastexit.checks import integer

if TYPE_CHECKING:
    from fastexit.adapters.unicorn.host import UnicornHost

MSR_EFER = 0xC000_0080
EFER_LMA, CR0_PE, RFLAGS_VM = 1 << 10, 1, 1 << 17
GENERAL = tuple("rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip".split())
_U64 = (1 << 64) - 1
_UNMAPPED = (unicorn.UC_HOOK_MEM_READ_UNMAPPED, unicorn.UC_HOOK_MEM_WRITE_UNMAPPED, unicorn.UC_HOOK_MEM_FETCH_UNMAPPED)
_UNMAPPED_ERRORS = {unicorn.UC_ERR_READ_UNMAPPED, unicorn.UC_ERR_WRITE_UNMAPPED, unicorn.UC_ERR_FETCH_UNMAPPED}


class Engine:
    """One Uc, with the hooks that make it stop where fastexit has work to do."""

    def __init__(self, host: UnicornHost, index: int) -> None:
        self.host = host
        self.index = index
        self.words: ctypes.Array[ctypes.c_uint64] = (ctypes.c_uint64 * H.WORDS)()
        self.uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self._engine = self.uc._uch
        self._register = ctypes.c_uint64()
        self._register_address = ctypes.byref(self._register)
        self._kept: Kept = Kept(self.uc)
        self._trap: int | None = None
        self._raised = False
        self._unmapped = 0
        self.uc.mem_map_ptr(0, host.memory_bytes, unicorn.UC_PROT_ALL, host.memory_address)
        self.uc.mem_map_ptr(firmware.BASE, firmware.BYTES, unicorn.UC_PROT_ALL, host.firmware_address)
        # Else Unicorn looks up the page of its ``until`` after each stop, and a guest's page tables may lack it.
        self.uc.ctl_exits_enabled(True)
        self._hook()
        self._fresh = self.uc.context_save()

    # ---------------------------------------------------------------------------------------------- Unicorn's state

    @property
    def registers(self) -> dict[str, int]:
        """General registers, RIP and RFLAGS, by lower-case name."""
        return {name: self.read(name.upper()) for name in GENERAL} | {"rflags": self.read("EFLAGS")}

    def __getitem__(self, name: str) -> int:
        """A register by name: ``cpu["rax"]``. KeyError for one that is not general, a segment or a control register."""
        return self.read(_known(name))

    def __setitem__(self, name: str, value: int) -> None:
        self.write(_known(name), integer(value, name))
        self.words[H.STALE] = 1  # it may have been CR3

    def read(self, name: str) -> int:
        """A register of Unicorn's of at most 64 bits, by its name there. The binding takes four times as long."""
        self._register.value = 0
        uclib.uc_reg_read(self._engine, _NUMBERS[name], self._register_address)
        return self._register.value

    def write(self, name: str, value: int) -> None:
        """Set a register of Unicorn's."""
        self._register.value = value
        uclib.uc_reg_write(self._engine, _NUMBERS[name], self._register_address)

    def efer(self) -> int:
        """IA32_EFER."""
        value: int = self.uc.msr_read(MSR_EFER)
        return value

    def table(self, name: str) -> tuple[int, int, int]:
        """Selector, base and limit of GDTR, IDTR or TR."""
        selector, base, limit, _ = self.uc.reg_read(_NUMBERS[name])
        return selector, base, limit

    def where(self) -> str:
        """For messages."""
        return f"CPU {self.index} at {self.read('RIP'):#x}"

    def ring(self) -> int:
        """The current privilege level."""
        if not self.read("CR0") & CR0_PE:
            return 0
        return 3 if self.read("EFLAGS") & RFLAGS_VM else self.read("CS") & 3

    def segment(self, name: str) -> Segment:
        """A segment register with what it has of its descriptor."""
        return self._kept.segment(name)

    def load(self, ring: int, **segments: Segment) -> None:
        """Set segment registers and the privilege level, without a check."""
        self._kept.load(ring, bool(self.efer() & EFER_LMA), **segments)

    def in_64_bit_mode(self) -> bool:
        """Neither compatibility mode nor anything older."""
        return bool(self.efer() & EFER_LMA and self.segment("CS").attributes & LONG)

    def instruction(self) -> bytes:
        """The instruction that began last, as the guest may fetch it."""
        pieces = []
        for linear, size in _pieces(self.words[H.LAST], self.words[H.SIZE]):
            address = self._translate(linear, unicorn.UC_PROT_EXEC)
            pieces.append(b"" if address is None else bytes(self.physical_memory(address, size)))
        return b"".join(pieces)

    def linear_read(self, linear: int, size: int) -> bytes:
        """Bytes at a linear address, as the CPU reads its own tables; Fault(PF)."""
        return b"".join(bytes(self._place(*piece, write=False, user=False)) for piece in _pieces(linear, size))

    def linear_write(self, linear: int, data: bytes, *, user: bool = False) -> None:
        """Write to a linear address, in ring 3 where ``user``; Fault(PF), and then nothing is written."""
        places = [self._place(*piece, write=True, user=user) for piece in _pieces(linear, len(data))]
        for place in places:
            place[:], data = data[: len(place)], data[len(place) :]

    def _place(self, linear: int, size: int, *, write: bool, user: bool) -> memoryview:
        address = None
        if not user and not self.ring():  # Unicorn looks with the rights of the ring that it is in
            address = self._translate(linear, unicorn.UC_PROT_WRITE if write else unicorn.UC_PROT_READ)
        if address is None:
            address = physical(self, linear & _U64, write=write, user=user)
        return self.physical_memory(address, size)

    def physical_memory(self, address: int, size: int) -> memoryview:
        """The guest's memory at a physical address; GuestError where it has none."""
        memory = self.host.physical(address, size)
        if memory is None:
            raise GuestError(f"{self.where()}: an interrupt needs {address:#x}, where the guest has no memory")
        return memory

    def _translate(self, linear: int, right: int) -> int | None:
        out = ctypes.c_uint64()
        found = uclib.uc_vmem_translate(
            self._engine, ctypes.c_uint64(linear), ctypes.c_uint32(right), ctypes.byref(out)
        )
        return None if found else out.value

    # --------------------------------------------------------------------------------------------------------- hooks

    def _hook(self) -> None:
        native, words, address = self.host.native, self.words, ctypes.addressof(self.words)
        words[H.SELF] = address
        words[H.MEMORY] = (self.host.memory_address - address >> 3) & _U64
        words[H.MEMORY_BYTES] = self.host.memory_bytes
        self._raw_hook(unicorn.UC_HOOK_CODE, native.on_instruction, address)
        for stop in H.BY_NAME:
            words[H.NAMES + stop] = stop
            instruction = ctypes.c_int(getattr(x86_const, f"UC_X86_INS_{stop.name}"))
            if not self._raw_hook(unicorn.UC_HOOK_INSN, native.on_name, address + 8 * (H.NAMES + stop), instruction):
                words[H.NAMED] |= 1 << stop
        self.uc.hook_add(unicorn.UC_HOOK_INTR, self._on_exception)
        self.uc.hook_add(unicorn.UC_HOOK_INSN_INVALID, self._on_invalid)
        self.uc.hook_add(sum(_UNMAPPED), self._on_unmapped)

    def _raw_hook(self, kind: int, function: int, data: int, *more: Any) -> int:
        """uc_hook_add with machine code as its callback, for which the binding has no word; Unicorn's error, or 0."""
        everywhere = ctypes.c_uint64(1), ctypes.c_uint64(0)
        handle = ctypes.c_size_t()
        error: int = uclib.uc_hook_add(
            self._engine,
            ctypes.byref(handle),
            kind,
            ctypes.c_void_p(function),
            ctypes.c_void_p(data),
            *everywhere,
            *more,
        )
        return error

    def _on_exception(self, uc: Any, vector: int, data: Any) -> None:
        self._trap, self._raised = vector, True
        uc.emu_stop()

    def _on_invalid(self, uc: Any, data: Any) -> bool:
        self._trap, self._raised = UD, False
        self.words[H.COUNT] += 1  # the hook has not seen it
        return False

    def _on_unmapped(self, uc: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        self._unmapped = address
        return False

    # ------------------------------------------------------------------------------------------------------- running

    def _emulate(self) -> Stop | None:
        """Unicorn, until the hook stops it, or an exception, which is then in ``_trap``."""
        words = self.words
        words[H.WHY], self._trap = 0, None
        words[H.RUNNING] = 1
        try:
            self.uc.emu_start(self.read("RIP"), 0)
        except unicorn.UcError as error:
            if self._trap is None:
                at = f", {self._unmapped:#x}" if error.errno in _UNMAPPED_ERRORS else ""
                raise GuestError(f"{self.where()}: {error}{at}") from None
        finally:
            words[H.RUNNING] = 0
        return Stop(words[H.WHY]) if words[H.WHY] else None

    def _carry_out(self, rip: int, n: int) -> None:
        """Carry out ``n`` instructions that do not count, the first one whatever it is."""
        kept: list[Any] = list(self.words[: H.SELF])
        self.words[H.LIMIT] = self.words[H.COUNT] + n
        self.words[H.ARMED], self.words[H.PASS] = 0, 1
        self.write("RIP", rip)
        try:
            self._emulate()
        finally:
            kept[H.STALE] = 1
            self.words[: H.SELF] = kept
        if self._trap is not None:
            raise GuestError(f"{self.where()}: the firmware met exception {self._trap}")

    # ------------------------------------------------------------------------------------------------------ starting

    def long_mode(self, rip: int, rsp: int) -> None:
        """64-bit mode at ``rip``: 4 GiB mapped as they are, the firmware's GDT, no IDT, interrupts off."""
        self._fresh_long_mode(firmware.CODE64, rip, firmware.DATA, rsp)
        self._carry_out(firmware.IRETQ, 1)

    def protected_mode(self, eip: int, esp: int) -> None:
        """32-bit mode at ``eip`` without paging: flat segments, the firmware's GDT, no IDT, interrupts off."""
        self._fresh_long_mode(firmware.CODE32, firmware.PROTECTED_MODE, firmware.DATA, 0)
        self.write("RAX", firmware.CR0_PROTECTED)
        self.write("RBX", firmware.DATA)
        self.write("RDI", eip)
        self._carry_out(firmware.IRETQ, firmware.STEPS)
        self.uc.msr_write(MSR_EFER, 0)
        for name in ("CR3", "CR4", "RAX", "RBX", "RDI"):
            self.write(name, 0)
        self.write("RSP", esp)

    def real_mode(self, selector: int, offset: int) -> None:
        """Real mode at CS:IP, everything else as INIT leaves it."""
        self._fresh_long_mode(firmware.CODE16, firmware.REAL_MODE - firmware.BASE, firmware.DATA16, 0)
        self.host.write_firmware(firmware.FAR_POINTER, firmware.far_pointer(selector, offset))
        self.write("RAX", firmware.CR0_RESET)
        self._carry_out(firmware.IRETQ, firmware.STEPS)
        self.uc.msr_write(MSR_EFER, 0)
        for name in ("CR3", "CR4", "RAX", "RSP"):
            self.write(name, 0)
        for name in ("GDTR", "IDTR"):
            self.uc.reg_write(_NUMBERS[name], (0, 0, 0xFFFF, 0))

    def _fresh_long_mode(self, selector: int, rip: int, stack_selector: int, rsp: int) -> None:
        """The CPU as Unicorn made it, caches empty, in long mode, its stack a frame from which IRETQ goes there."""
        for word in (H.DUE, H.SHADOW, H.PASS, H.LET):
            self.words[word] = 0
        self.words[H.STALE] = 1
        self.uc.context_restore(self._fresh)
        self.uc.ctl_flush_tb()
        self.write("CR3", firmware.PML4)
        self.write("CR4", firmware.CR4_LONG)
        self.uc.reg_write(_NUMBERS["GDTR"], (0, firmware.GDT, firmware.GDT_LIMIT, 0))
        self.uc.reg_write(_NUMBERS["IDTR"], (0, 0, 0, 0))
        self.write("CR0", firmware.CR0_LONG)
        self.host.write_firmware(firmware.FRAME, firmware.frame(selector, rip, stack_selector, rsp))
        self.write("RSP", firmware.FRAME)


def _known(name: str) -> str:
    upper = "EFLAGS" if name == "rflags" else str(name).upper()
    if upper not in _PLAIN:
        raise KeyError(f"no register {name!r}")
    return upper


def _pieces(linear: int, size: int) -> list[tuple[int, int]]:
    """What lies in one page each."""
    inside = min(size, 0x1000 - (linear & 0xFFF))
    return [(linear, inside)] + ([(linear + inside, size - inside)] if size > inside else [])


_NUMBERS = {
    name.removeprefix("UC_X86_REG_"): number
    for name, number in vars(x86_const).items()
    if name.startswith("UC_X86_REG_") and name not in ("UC_X86_REG_INVALID", "UC_X86_REG_ENDING")
}
_PLAIN = frozenset({name.upper() for name in GENERAL} | {"EFLAGS", "CR0", "CR2", "CR3", "CR4", "CS", "SS", "DS", "ES"})
"""Registers that a user may name."""
