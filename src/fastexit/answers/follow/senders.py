"""What a vCPU does to its APIC: ICR writes with all their lines, and by which door it wrote what else."""

from __future__ import annotations

from fastexit.answers.follow import words as w
from fastexit.answers.follow.sources import emit, match, settle
from fastexit.answers.follow.words import NONE, U
from fastexit.jit.declare import kernel
from fastexit.kernels import typed as k


@kernel("u8(words, u8)")
def _door(lanes, lane):
    """The door that a lane's exit names where no line of the access does."""
    kind = lanes[lane + w.L_EXIT_CLASS]
    if not lanes[lane + w.L_EXIT_LINE]:
        return k.ZERO
    if kind == w.CLASS_MSR:
        return w.DOOR_UNTOLD if lanes[lane + w.L_EXIT_RIP] >> U(40) == w.WINDOWS else w.DOOR_X2APIC
    if kind == w.CLASS_TRAP:
        return w.DOOR_TRAP
    if kind == w.CLASS_AVIC:
        return w.DOOR_AVIC
    if kind == w.CLASS_PAGE:
        return w.DOOR_PAGE
    return w.DOOR_HYPERCALL if kind == w.CLASS_CALL else k.ZERO


@kernel("u8(words, words, words, words, u8)")
def close(lanes, places, pool, out, lane):
    """The open ICR write is complete: its fact, and those of what it raised."""
    if not lanes[lane + w.L_OPEN]:
        return k.ZERO
    lanes[lane + w.L_OPEN] = k.ZERO
    if not lanes[lane + w.L_DOOR]:
        lanes[lane + w.L_DOOR] = _door(lanes, lane)
    emit(
        out,
        w.FACT_ICR
        | (lanes[lane + w.L_DOOR] << w.BYTE)
        | ((lanes[lane + w.L_NESTED] | (lanes[lane + w.L_FAULT] << k.ONE)) << U(24))
        | (lanes[lane + w.L_REGISTER] << U(32)),
        lanes[lane + w.L_PLACE],
        lanes[lane + w.L_ICR],
        lanes[lane + w.L_TARGETS],
        k.ZERO,
        lanes[lane + w.L_EXIT_TIME] if lanes[lane + w.L_EXIT_LINE] else NONE,
        lanes[lane + w.L_ICR_LINE],
    )
    return settle(lanes, places, pool, out, lane, k.ZERO)


@kernel("u8(words, words, words, words, u8, u8, u8)")
def begin(lanes, places, pool, out, lane, line, register):
    """An ICR write begins; one that is open was complete."""
    close(lanes, places, pool, out, lane)
    lanes[lane + w.L_OPEN] = k.ONE
    lanes[lane + w.L_DOOR] = k.ZERO
    lanes[lane + w.L_ICR] = k.ZERO
    lanes[lane + w.L_HAVE] = k.ZERO
    lanes[lane + w.L_TARGETS] = k.ZERO
    lanes[lane + w.L_ICR_LINE] = line
    lanes[lane + w.L_FAULT] = k.ZERO
    lanes[lane + w.L_REGISTER] = register
    return k.ZERO


@kernel("u8(words, words, u8, u8, u8, u8)")
def access(lanes, out, lane, register, door, line):
    """Write the fact of an access of which nothing but its door matters."""
    word = w.FACT_ACCESS | (door << w.BYTE) | (lanes[lane + w.L_NESTED] << U(24)) | (register << U(32))
    return emit(out, word, lanes[lane + w.L_PLACE], k.ZERO, NONE, NONE, NONE, line)


@kernel("u8(words, words, u8)")
def close_register(lanes, out, lane):
    """A write of EOI, TPR or the timer's count, behind which no line named its door: the exit does, or nothing."""
    if lanes[lane + w.L_REG]:
        door = _door(lanes, lane)
        if door and door != w.DOOR_HYPERCALL:
            access(lanes, out, lane, lanes[lane + w.L_REG] - k.ONE, door, lanes[lane + w.L_LAST_LINE])
        lanes[lane + w.L_REG] = k.ZERO
    return k.ZERO


@kernel("u8(words, words, words, words, words, u8, u8)")
def msr_write(lanes, places, pool, out, rows, lane, row):
    """kvm_msr of a write: it ends the access that it names."""
    msr = rows[row + k.ONE]
    value = rows[row + U(2)]
    fault = rows[row + U(4)] & k.ONE
    line = rows[row + U(5)] & k.LOW32
    if msr == k.MSR_X2APIC_ICR or msr == k.MSR_HV_ICR or msr == k.MSR_X2APIC_SELF_IPI:
        if not lanes[lane + w.L_OPEN] or lanes[lane + w.L_HAVE] & (w.CALL_LINE | w.MMIO_LINE) or fault:
            begin(lanes, places, pool, out, lane, line, k.APIC_ICR)
        lanes[lane + w.L_ICR] = value
        if msr == k.MSR_X2APIC_SELF_IPI:
            lanes[lane + w.L_REGISTER] = k.APIC_SELF_IPI
            lanes[lane + w.L_ICR] = (value & k.ICR_VECTOR) | w.SELF
        lanes[lane + w.L_DOOR] = w.DOOR_SYNTHETIC if msr == k.MSR_HV_ICR else w.DOOR_X2APIC
        lanes[lane + w.L_FAULT] = fault
        if not fault:
            match(lanes, places, pool, out, lane)
        return close(lanes, places, pool, out, lane)
    close(lanes, places, pool, out, lane)
    register = k.ZERO
    door = w.DOOR_SYNTHETIC
    if msr == k.MSR_HV_EOI:
        register = k.APIC_EOI
    elif msr == k.MSR_HV_TPR:
        register = k.APIC_TASKPRI
    elif k.MSR_HV_STIMER0_CONFIG <= msr and msr <= k.MSR_HV_STIMER3_COUNT:
        register = k.APIC_TMICT
    elif msr == k.MSR_TSC_DEADLINE:
        register = w.REG_DEADLINE
        door = w.DOOR_X2APIC
    elif msr >> w.BYTE == w.BYTE:
        register = (msr & U(0xFF)) << U(4)
        door = w.DOOR_X2APIC
        if register == k.APIC_LVTT and not fault and lanes[lane + w.L_PLACE]:
            places[(lanes[lane + w.L_PLACE] - k.ONE) * w.P_STRIDE + w.P_LVTT] = (value & k.ICR_VECTOR) + k.ONE
    if register == k.APIC_EOI or register == k.APIC_TASKPRI or register == k.APIC_TMICT or register == w.REG_DEADLINE:
        if lanes[lane + w.L_REG] != register + k.ONE:
            close_register(lanes, out, lane)
        lanes[lane + w.L_REG] = k.ZERO
        if not fault:
            access(lanes, out, lane, register, door, line)
    else:
        close_register(lanes, out, lane)
    return k.ZERO


@kernel("u8(words, words, words, words, words, u8, u8)")
def apic_write(lanes, places, pool, out, rows, lane, row):
    """kvm_apic of a write."""
    register = rows[row + k.ONE]
    value = rows[row + U(2)]
    line = rows[row + U(5)] & k.LOW32
    if register == k.APIC_ICR or register == k.APIC_SELF_IPI:
        have = lanes[lane + w.L_HAVE]
        if not lanes[lane + w.L_OPEN] or have & (w.APIC_LINE | w.CALL_LINE):
            begin(lanes, places, pool, out, lane, line, register)
            have = k.ZERO
        lanes[lane + w.L_HAVE] = have | w.APIC_LINE
        if register == k.APIC_SELF_IPI:
            lanes[lane + w.L_REGISTER] = register
            lanes[lane + w.L_ICR] = (value & k.ICR_VECTOR) | w.SELF
        elif not have & w.IPI_LINE:
            high = value & k.HIGH32
            lanes[lane + w.L_ICR] = (value & k.LOW32) | (high if high else lanes[lane + w.L_DEST] << U(32))
        match(lanes, places, pool, out, lane)
        return settle(lanes, places, pool, out, lane, k.ONE)
    close(lanes, places, pool, out, lane)
    close_register(lanes, out, lane)
    if register == w.ICR2:
        lanes[lane + w.L_DEST] = value if value < U(1 << 24) else value >> U(24)
    elif register == k.APIC_LVTT and lanes[lane + w.L_PLACE]:
        places[(lanes[lane + w.L_PLACE] - k.ONE) * w.P_STRIDE + w.P_LVTT] = (value & k.ICR_VECTOR) + k.ONE
    elif lanes[lane + w.L_SKIP] == register + k.ONE:
        lanes[lane + w.L_SKIP] = k.ZERO
    elif register == k.APIC_EOI or register == k.APIC_TASKPRI or register == k.APIC_TMICT:
        lanes[lane + w.L_REG] = register + k.ONE
    return k.ZERO


@kernel("u8(words, words, words, words, words, u8, u8)")
def mmio_write(lanes, places, pool, out, rows, lane, row):
    """kvm_mmio of a write into the APIC page: it begins an access."""
    register = rows[row + k.ONE] & U(0xFF0)
    line = rows[row + U(5)] & k.LOW32
    if register == k.APIC_ICR:
        begin(lanes, places, pool, out, lane, line, register)
        lanes[lane + w.L_DOOR] = w.DOOR_PAGE
        lanes[lane + w.L_HAVE] = w.MMIO_LINE
        lanes[lane + w.L_ICR] = (rows[row + U(2)] & k.LOW32) | (lanes[lane + w.L_DEST] << U(32))
        return k.ZERO
    if register == w.ICR2:
        lanes[lane + w.L_DEST] = (rows[row + U(2)] & k.LOW32) >> U(24)
    elif register == k.APIC_EOI or register == k.APIC_TASKPRI or register == k.APIC_TMICT:
        access(lanes, out, lane, register, w.DOOR_PAGE, line)
        lanes[lane + w.L_SKIP] = register + k.ONE
    return k.ZERO


@kernel("u8(words, words, words, words, words, u8, u8, u8)")
def call(lanes, places, pool, out, rows, lane, row, event):
    """A hypercall, an IPI of AVIC, or a line of either."""
    line = rows[row + U(5)] & k.LOW32
    code = rows[row + k.ONE]
    if event == w.E_HV_SEND_IPI and lanes[lane + w.L_OPEN] and lanes[lane + w.L_HAVE] == w.CALL_LINE:
        lanes[lane + w.L_HAVE] |= w.IPI_LINE
        lanes[lane + w.L_ICR] = code & k.ICR_VECTOR
        return k.ZERO
    close(lanes, places, pool, out, lane)
    if event == w.E_HYPERCALL and code != w.KVM_SEND_IPI:
        return k.ZERO
    if event == w.E_HV_HYPERCALL and code != w.SEND_IPI and code != w.SEND_IPI_EX:
        return k.ZERO
    begin(lanes, places, pool, out, lane, line, k.APIC_ICR if event == w.E_AVIC else w.REG_CALL)
    lanes[lane + w.L_HAVE] = w.AVIC_LINE if event == w.E_AVIC else w.CALL_LINE
    lanes[lane + w.L_DOOR] = w.DOOR_AVIC if event == w.E_AVIC else w.DOOR_HYPERCALL
    if event == w.E_AVIC:
        lanes[lane + w.L_ICR] = code
    elif event == w.E_HV_HYPERCALL:
        lanes[lane + w.L_ICR] = rows[row + U(2)] & k.ICR_VECTOR
    elif event == w.E_HV_SEND_IPI:
        lanes[lane + w.L_HAVE] |= w.IPI_LINE
        lanes[lane + w.L_ICR] = code & k.ICR_VECTOR
    return k.ZERO
