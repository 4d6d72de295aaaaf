"""The PIT: three channels at ports 0x40 to 0x43, the speaker's gate at 0x61, channel 0's hrtimer and its worker.

Models: arch/x86/kvm/i8254.c; i8254count.py has what counters show, pitack.py what the chips tell. A tick is two steps,
as in KVM: the hrtimer counts it, and a kernel thread raises and lowers GSI 0. The thread's work waits in PIT_WORK until
``work`` is called: at the end of an EOI or of a PIC's acknowledgement, and where time is set. Not modelled: BCD counts,
which KVM stores and ignores; the message about a period that is too short. Spec: Intel 8254 data sheet.
"""

from ..jit.declare import kernel, umax
from . import pitack, routes
from . import typed as k
from .i8254count import BYTE, SECOND, WORD, channel, count, latch_count, latch_status, out
from .inhibit import change
from .irqlock import lock, unlock
from .shared import NOT_MINE, ask_all, or_word, own, take
from .tick import local_deliver

LSB, MSB, WORD0, WORD1 = k.ONE, k.U(2), k.U(3), k.U(4)
"""rw_mode, and which byte is next."""
NO_MODE = k.U(0xFF)
PORTS, COMMAND = k.U(0x40), k.U(3)
SPEAKER = k.U(0x61)
EFFECTS = k.CODE_EFFECTS

# -------------------------------------------------------------------------------------------------- channel 0's timer


@kernel("u8(words)")
def _in_nmi_mode(m):
    """vapics_in_nmi_mode: whether any vCPU has LVT0 in NMI mode."""
    n = m[k.H_NVCPUS]
    for i in range(n):
        if m[own(m, k.U(i)) + k.K_LINT0_NMI]:
            return k.ONE
    return k.ZERO


@kernel("u8(words, u8)")
def work(m, me):
    """pit_do_work, if it is queued: a pulse on GSI 0, which is a pulse for level pins too; Effect code.

    In reinject mode the pulse waits for the last one's acknowledgement. The NMI watchdog is LVT0 on every vCPU,
    whatever its mode there, once one of them has it in NMI mode.
    """
    if not m[k.PIT_WORK] or not take(m, k.PIT_WORK) or (m[k.PIT_REINJECT] and not take(m, k.PIT_IRQ_ACK)):
        return k.ZERO
    lock(m)
    code = routes.set_irq(m, k.ZERO, k.ONE, k.SOURCE_PIT, k.ZERO, me)
    code = code | routes.set_irq(m, k.ZERO, k.ZERO, k.SOURCE_PIT, k.ZERO, me)
    unlock(m)
    if _in_nmi_mode(m):
        n = m[k.H_NVCPUS]
        for i in range(n):
            code = code | local_deliver(m, k.U(i), k.APIC_LVT0, me)
    return code & EFFECTS


@kernel("u8(words)")
def fires(m):
    """When channel 0's hrtimer fires; NONE, one less than 0, where it does not."""
    return m[k.PIT_DEADLINE] - k.ONE


@kernel("u8(words)")
def fire(m):
    """pit_timer_fn, as often as the hrtimer of a host that is late is called, one behind the other: all before work."""
    late = (m[k.H_NOW] - m[k.PIT_EXPIRES]) // m[k.PIT_PERIOD] if m[k.PIT_PERIODIC] else k.ZERO
    if m[k.PIT_REINJECT]:
        m[k.PIT_PENDING] = m[k.PIT_PENDING] + k.ONE + late
    or_word(m, k.PIT_WORK, k.ONE)
    m[k.PIT_DEADLINE] = k.ZERO
    if m[k.PIT_PERIODIC]:
        m[k.PIT_EXPIRES] = m[k.PIT_EXPIRES] + (k.ONE + late) * m[k.PIT_PERIOD]
        m[k.PIT_DEADLINE] = m[k.PIT_EXPIRES] + k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _start(m, loaded, periodic, me):
    """create_pit_timer: the first tick comes after the interval as it was programmed, later ones at the shortest period
    or more. Nothing happens, and an older timer runs on, where there is no IOAPIC or the HPET has taken over.
    """
    if m[k.H_CONFIG] & k.CONFIG_SPLIT_IRQCHIP or m[k.PIT_FLAGS] & k.PIT_FLAG_HPET_LEGACY:
        return k.ZERO
    code = work(m, me)
    interval = loaded * SECOND // k.PIT_HZ
    m[k.PIT_PERIOD] = umax(interval, m[k.H_MIN_PERIOD_NS]) if periodic else interval
    m[k.PIT_PERIODIC] = periodic
    pitack.reset_reinject(m)
    m[k.PIT_EXPIRES] = m[k.H_NOW] + interval
    m[k.PIT_DEADLINE] = m[k.PIT_EXPIRES] + k.ONE
    return code


@kernel("u8(words, u8, u8, u8, u8)")
def _load(m, i, value, mode, me):
    """pit_load_count, and what work was still queued: Effect code."""
    loaded = value if value else k.U(0x10000)
    m[channel(i) + k.PIT_COUNT] = loaded
    if i:
        m[channel(i) + k.PIT_LOADED] = m[k.H_NOW]
        return k.ZERO
    if mode == k.U(2) or mode == k.U(3):
        return _start(m, loaded, k.ONE, me)
    if mode < k.U(2) or mode == k.U(4):
        return _start(m, loaded, k.ZERO, me)
    m[k.PIT_DEADLINE] = k.ZERO
    return work(m, me)


# ------------------------------------------------------------------------------------------------------------- ports


@kernel("u8(words, u8)")
def _command(m, value):
    """A control word: a command to latch, to read back, or a channel's new mode, which neither loads nor stops it."""
    i = value >> k.U(6)
    if i == k.U(3):
        for n in range(k.PIT_CHANNELS):
            if value & (k.U(2) << k.U(n)):
                if not value & k.U(0x20):
                    latch_count(m, k.U(n))
                if not value & k.U(0x10):
                    latch_status(m, k.U(n))
        return k.ZERO
    access = (value >> k.U(4)) & k.U(3)
    if not access:
        return latch_count(m, i)
    at = channel(i)
    m[at + k.PIT_RW_MODE] = access
    m[at + k.PIT_READ_STATE] = access
    m[at + k.PIT_WRITE_STATE] = access
    mode = (value >> k.ONE) & k.U(7)
    m[at + k.PIT_MODE] = mode - k.U(4) if mode > k.U(5) else mode
    m[at + k.PIT_BCD] = value & k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _write_count(m, i, value, me):
    """A byte of a channel's count; the count is loaded with its last one."""
    at = channel(i)
    state, mode = m[at + k.PIT_WRITE_STATE], m[at + k.PIT_MODE]
    if state == WORD0:
        m[at + k.PIT_WRITE_LATCH] = value
        m[at + k.PIT_WRITE_STATE] = WORD1
        return k.ZERO
    if state == MSB:
        return _load(m, i, value << k.U(8), mode, me)
    if state == WORD1:
        code = _load(m, i, m[at + k.PIT_WRITE_LATCH] | value << k.U(8), mode, me)
        m[at + k.PIT_WRITE_STATE] = WORD0
        return code
    return _load(m, i, value, mode, me)


@kernel("u8(words, u8)")
def _write_speaker(m, value):
    """speaker_ioport_write: bit 1 switches the speaker, bit 0 is channel 2's gate, which starts some modes anew."""
    on = (value >> k.ONE) & k.ONE
    if m[k.H_RULES] & k.R_PIT_SPEAKER_APART:
        m[k.PIT_SPEAKER] = on
    else:
        m[k.PIT_FLAGS] = m[k.PIT_FLAGS] & ~k.PIT_FLAG_SPEAKER | on << k.ONE
    at = channel(k.U(2))
    mode, gate = m[at + k.PIT_MODE], value & k.ONE
    restarts = mode == k.ONE or mode == k.U(2) or mode == k.U(3) or mode == k.U(5)
    if restarts and m[at + k.PIT_GATE] < gate:
        m[at + k.PIT_LOADED] = m[k.H_NOW]
    m[at + k.PIT_GATE] = gate
    return k.ZERO


@kernel("u8(words)")
def _read_speaker(m):
    """speaker_ioport_read; the refresh clock toggles every 2^14 ns of the host's."""
    on = m[k.PIT_SPEAKER] if m[k.H_RULES] & k.R_PIT_SPEAKER_APART else m[k.PIT_FLAGS] & k.PIT_FLAG_SPEAKER
    value = m[channel(k.U(2)) + k.PIT_GATE] | out(m, k.U(2)) << k.U(5)
    return value | (k.U(2) if on else k.ZERO) | ((m[k.H_NOW] >> k.U(14)) & k.ONE) << k.U(4)


@kernel("u8(words, u8)")
def _read_count(m, i):
    """A byte of a channel: its latched status, else its latched count, else its count."""
    at = channel(i)
    if m[at + k.PIT_STATUS_LATCHED]:
        m[at + k.PIT_STATUS_LATCHED] = k.ZERO
        return m[at + k.PIT_STATUS]
    latched = m[at + k.PIT_COUNT_LATCHED]
    if latched:
        m[at + k.PIT_COUNT_LATCHED] = MSB if latched == WORD0 else k.ZERO
        return (m[at + k.PIT_LATCHED_COUNT] >> (k.U(8) if latched == MSB else k.ZERO)) & BYTE
    state = m[at + k.PIT_READ_STATE]
    if state == WORD0:
        m[at + k.PIT_READ_STATE] = WORD1
    elif state == WORD1:
        m[at + k.PIT_READ_STATE] = WORD0
    return (count(m, i) >> (k.U(8) if state == MSB or state == WORD1 else k.ZERO)) & BYTE


@kernel("u8(words, u8, u8)")
def _is_pit(m, port, length):
    """Whether an access lies among the PIT's own four ports: one that runs over their end is user space's."""
    if not m[k.PIT_PRESENT] or port < PORTS or port >= PORTS + k.U(4):
        return k.ZERO
    return k.ONE if length <= PORTS + k.U(4) - port else k.ZERO


@kernel("u8(words, u8)")
def _is_speaker(m, port):
    """Whether port 0x61 is asked, and was given to the PIT: the next three are in its range, and user space's."""
    return k.ONE if m[k.PIT_PRESENT] & k.PIT_HAS_SPEAKER and port == SPEAKER else k.ZERO


@kernel("u8(words, u8, u8, u8, u8)")
def io_write(m, v, port, length, value):
    """pit_ioport_write, speaker_ioport_write: the low byte counts, whatever the length. Effect code, or NOT_MINE."""
    if _is_speaker(m, port):
        return _write_speaker(m, value)
    if not _is_pit(m, port, length):
        return NOT_MINE
    value = value & BYTE
    i = port - PORTS
    return _command(m, value) if i == COMMAND else _write_count(m, i, value, v)


@kernel("u8(words, u8, u8, u8)")
def io_read(m, v, port, length):
    """pit_ioport_read, speaker_ioport_read: 0 and the value, a byte, in K_MSR_DATA; or NOT_MINE."""
    at = own(m, v) + k.K_MSR_DATA
    if _is_speaker(m, port):
        m[at] = _read_speaker(m)
        return k.ZERO
    if not _is_pit(m, port, length):
        return NOT_MINE
    i = port - PORTS
    m[at] = k.ZERO if i == COMMAND else _read_count(m, i)
    return k.ZERO


# -------------------------------------------------------------------------------------------------- user space's part


@kernel("u8(words, u8, u8)")
def set_reinject(m, on, me):
    """kvm_pit_set_reinject: with acknowledgements, which AVIC would keep from KVM, or without; Effect code."""
    if m[k.PIT_REINJECT] == on:
        return k.ZERO
    code = change(m, me, k.INHIBIT_PIT_REINJ, on)
    if on:
        pitack.reset_reinject(m)
    m[k.PIT_REINJECT] = on
    return code | ask_all(m, k.REQ_SCAN_IOAPIC, me)


@kernel("u8(words, u8, u8)")
def create(m, speaker, me):
    """kvm_create_pit of a machine that has none: Effect code."""
    m[k.PIT_PRESENT] = k.ONE | (k.PIT_HAS_SPEAKER if speaker else k.ZERO)
    for n in range(k.PIT_CHANNELS):
        i = k.U(n)
        m[channel(i) + k.PIT_MODE] = NO_MODE
        m[channel(i) + k.PIT_GATE] = k.ZERO if i == k.U(2) else k.ONE
        _load(m, i, k.ZERO, NO_MODE, me)
    pitack.reset_reinject(m)
    return set_reinject(m, k.ONE, me)


@kernel("u8(words)")
def get_state(m):
    """kvm_vm_ioctl_get_pit2: kvm_pit_state2 into H_STAGE."""
    for n in range(k.PIT_CHANNELS):
        at = channel(k.U(n))
        to = k.H_STAGE + k.U(n) * k.U(3)
        m[to] = m[at] | m[at + k.PIT_LATCHED_COUNT] << k.U(32)
        m[to] = m[to] | m[at + k.PIT_COUNT_LATCHED] << k.U(48) | m[at + k.PIT_STATUS_LATCHED] << k.U(56)
        m[to + k.ONE] = k.ZERO
        for byte in range(8):
            m[to + k.ONE] = m[to + k.ONE] | m[at + k.PIT_STATUS + k.U(byte)] << (k.U(byte) << k.U(3))
        m[to + k.U(2)] = m[at + k.PIT_LOADED]
    at = k.H_STAGE + k.PIT_CHANNELS * k.U(3)
    m[at] = m[k.PIT_FLAGS]
    for word in range(4):
        m[at + k.ONE + k.U(word)] = k.ZERO
    return k.ZERO


@kernel("u8(words, u8, u8)")
def set_state(m, with_flags, me):
    """kvm_vm_ioctl_set_pit2 of H_STAGE, or kvm_vm_ioctl_set_pit, which leaves the flags alone: Effect code.

    All bytes are as given; then each channel is loaded, so time begins anew. The HPET, when it takes over, stops
    channel 0 as mode 0xFF does.
    """
    was = m[k.PIT_FLAGS] & k.PIT_FLAG_HPET_LEGACY
    for n in range(k.PIT_CHANNELS):
        at = channel(k.U(n))
        given = k.H_STAGE + k.U(n) * k.U(3)
        m[at] = m[given] & k.LOW32
        m[at + k.PIT_LATCHED_COUNT] = (m[given] >> k.U(32)) & WORD
        m[at + k.PIT_COUNT_LATCHED] = (m[given] >> k.U(48)) & BYTE
        m[at + k.PIT_STATUS_LATCHED] = m[given] >> k.U(56)
        for byte in range(8):
            m[at + k.PIT_STATUS + k.U(byte)] = (m[given + k.ONE] >> (k.U(byte) << k.U(3))) & BYTE
        m[at + k.PIT_LOADED] = m[given + k.U(2)]
    if with_flags:
        m[k.PIT_FLAGS] = m[k.H_STAGE + k.PIT_CHANNELS * k.U(3)] & k.LOW32
    starts = with_flags and not was and m[k.PIT_FLAGS] & k.PIT_FLAG_HPET_LEGACY
    code = k.ZERO
    for n in range(k.PIT_CHANNELS):
        at = channel(k.U(n))
        mode = NO_MODE if starts and not n else m[at + k.PIT_MODE]
        code = code | _load(m, k.U(n), m[at], mode, me)
    return code
