"""Find the device that answers to a guest-physical address or to a port; what none claims is user space's.

Models: vcpu_mmio_write and vcpu_mmio_read, which ask the vCPU's own APIC first and then kvm_io_bus; KVM_FAST_MMIO_BUS;
kvm_fast_pio; KVM_EXIT_MMIO and KVM_EXIT_IO with complete_emulated_mmio, complete_fast_pio_in and _out. exits/bus.py is
the same in Python. A device is a row in ``write`` and in ``read``, or in ``io_write`` and in ``io_read``: it does the
access, or says NOT_MINE.

Not modelled: an access across a page's border, which KVM splits in two (its first byte decides here), string I/O as
more than one access, kvm_mmio.
"""

from ..jit.declare import kernel, umin
from . import i8254, ioapic, lapic, picdev
from . import typed as k
from .lapic import NOT_MINE
from .msr import skip
from .shared import emit, own


# -------------------------------------------------------------------------------------------------------- memory
@kernel("u8(words, u8)")
def listens(m, gpa):
    """Tell whether a fast-MMIO ioeventfd, one without a length, is at an address."""
    for i in range(umin(m[k.H_FAST_MMIO], k.FAST_MMIO)):
        if m[k.H_FAST_MMIO_GPA + k.U(i)] == gpa:
            return k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def write(m, v, gpa, length, value):
    """vcpu_mmio_write: the delivery code of the device that claims the address, or NOT_MINE."""
    code = lapic.mmio_write(m, v, gpa, length, value)
    if code != NOT_MINE:
        return code
    code = ioapic.mmio_write(m, v, gpa, length, value)
    if code != NOT_MINE:
        return code
    return k.ZERO if listens(m, gpa) else NOT_MINE


@kernel("u8(words, u8, u8, u8)")
def read(m, v, gpa, length):
    """vcpu_mmio_read: the value in K_MSR_DATA, or NOT_MINE and 0. Nobody can read an ioeventfd."""
    code = lapic.mmio_read(m, v, gpa, length)
    return code if code != NOT_MINE else ioapic.mmio_read(m, v, gpa, length)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def emulate(m, v, gpa, access, value, insn):
    """The instruction emulator at a device: its code, and RIP moves by ``insn``; or USER_MMIO.

    ``access`` is the length in bytes, plus ACCESS_WRITE.
    """
    length = access & k.ACCESS_LENGTH
    code = write(m, v, gpa, length, value) if access & k.ACCESS_WRITE else read(m, v, gpa, length)
    if code == NOT_MINE:
        return to_user(m, v, gpa, value, access | (insn << k.ACCESS_INSN_SHIFT))
    return code | skip(m, v, insn)


@kernel("u8(words, u8, u8, u8, u8, u8)")
def mmio(m, v, gpa, access, value, insn):
    """handle_ept_misconfig, npf_interception: KVM_FAST_MMIO_BUS, which needs no emulator, then the emulator."""
    if not listens(m, gpa):
        return emulate(m, v, gpa, access, value, insn)
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_FAST_MMIO, v, gpa, k.ZERO, k.ZERO)
    return skip(m, v, insn)


# --------------------------------------------------------------------------------------------------------- ports
@kernel("u8(words, u8)")
def io_length(m, info):
    """Number of bytes of an I/O instruction, by its exit qualification or EXITINFO1; 0 where that names none."""
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        length = (info & k.SVM_IO_SIZE) >> k.SVM_IO_SIZE_SHIFT
    else:
        length = (info & k.VMX_IO_SIZE) + k.ONE
    return length if length == k.ONE or length == k.U(2) or length == k.U(4) else k.ZERO


@kernel("u8(words, u8)")
def io_reads(m, info):
    """Tell whether an I/O instruction is an IN."""
    return info & (k.SVM_IO_IN if m[k.H_CONFIG] & k.CONFIG_SVM else k.VMX_IO_IN)


@kernel("u8(words, u8, u8, u8, u8)")
def io_write(m, v, port, length, value):
    """kernel_pio of an OUT: the delivery code of the device that claims the port, or NOT_MINE."""
    code = picdev.io_write(m, v, port, length, value)
    return code if code != NOT_MINE else i8254.io_write(m, v, port, length, value)


@kernel("u8(words, u8, u8, u8)")
def io_read(m, v, port, length):
    """kernel_pio of an IN: the value in K_MSR_DATA and a delivery code, or NOT_MINE."""
    code = picdev.io_read(m, v, port, length)
    return code if code != NOT_MINE else i8254.io_read(m, v, port, length)


@kernel("u8(words, u8, u8, u8, u8)")
def trace_pio(m, v, port, length, value):
    """kvm_pio of one access; ``port`` has TRACE_PIO_WRITE for an OUT."""
    if m[k.H_CONFIG] & k.CONFIG_TRACE:
        emit(m, k.TP_PIO, v, port, length | k.ONE << k.U(8), value)
    return k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def io(m, v, info, value, insn):
    """kvm_fast_pio: a device's code, and RIP moves; or USER_IO. What is read is traced when it is there."""
    length = io_length(m, info)
    port = (info >> k.IO_PORT_SHIFT) & k.IO_PORT
    access = length | k.ACCESS_PORT
    if io_reads(m, info):
        code = io_read(m, v, port, length)
        if code != NOT_MINE:
            trace_pio(m, v, port, length, m[own(m, v) + k.K_MSR_DATA])
    else:
        access = access | k.ACCESS_WRITE
        trace_pio(m, v, port | k.TRACE_PIO_WRITE, length, value)
        code = io_write(m, v, port, length, value)
    if code == NOT_MINE:
        return to_user(m, v, port, value, access | (insn << k.ACCESS_INSN_SHIFT))
    return code | skip(m, v, insn)


# ---------------------------------------------------------------------------------------------------- user space
@kernel("u8(words, u8, u8, u8, u8)")
def to_user(m, v, address, value, info):
    """Keep an access for user space: USER_MMIO or USER_IO.

    A store is over for the emulator, which moves RIP now and forgets a single step; everything else ends when KVM_RUN
    is called again.
    """
    row = own(m, v)
    m[row + k.K_ACCESS_ADDRESS] = address
    m[row + k.K_ACCESS_INFO] = info
    if info & k.ACCESS_WRITE:
        m[row + k.K_ACCESS_DATA] = value & (k.NONE >> (k.U(64) - ((info & k.ACCESS_LENGTH) << k.U(3))))
    else:
        m[row + k.K_ACCESS_DATA] = k.ZERO
        m[row + k.K_MSR_DATA] = k.ZERO
    if info & k.ACCESS_PORT:
        return k.USER_IO
    if info & k.ACCESS_WRITE:
        m[row + k.K_RIP] = m[row + k.K_RIP] + ((info & k.ACCESS_INSN) >> k.ACCESS_INSN_SHIFT)
        m[row + k.K_SHADOW] = k.ZERO
    return k.USER_MMIO


@kernel("u8(words, u8)")
def complete(m, v):
    """End an access that user space has done: 0, or USER_DEBUG. complete_emulated_mmio, complete_fast_pio_*."""
    row = own(m, v)
    info = m[row + k.K_ACCESS_INFO]
    m[row + k.K_ACCESS_INFO] = k.ZERO
    if info & (k.ACCESS_WRITE | k.ACCESS_PORT) == k.ACCESS_WRITE:
        return k.ZERO
    if info & (k.ACCESS_WRITE | k.ACCESS_PORT) == k.ACCESS_PORT:
        trace_pio(m, v, m[row + k.K_ACCESS_ADDRESS], info & k.ACCESS_LENGTH, m[row + k.K_MSR_DATA])
    return skip(m, v, (info & k.ACCESS_INSN) >> k.ACCESS_INSN_SHIFT)
