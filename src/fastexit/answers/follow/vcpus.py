"""A vCPU's own lines: exits and entries, interrupts that it is given and ends, and where it gets no further."""

from __future__ import annotations

from fastexit.answers.follow import words as w
from fastexit.answers.follow.senders import close, close_register
from fastexit.answers.follow.sources import emit, entered, settle, since
from fastexit.answers.follow.words import NONE, U
from fastexit.jit.declare import kernel
from fastexit.kernels import typed as k


@kernel("u8(words, u8)")
def _cpu(rows, row):
    """A row's CPU plus one."""
    return ((rows[row + U(6)] >> U(32)) + k.ONE) & U(0xFFFF)


@kernel("u8(words, words, u8, u8, u8)")
def finish_exit(lanes, out, lane, until, cpu):
    """Write the fact of an exit; ``until`` is NONE where its entry did not come."""
    return emit(
        out,
        w.FACT_EXIT | (lanes[lane + w.L_NESTED] << U(24)) | (lanes[lane + w.L_EXIT_NAME] << U(32)),
        lanes[lane + w.L_PLACE],
        lanes[lane + w.L_EXIT_RIP],
        since(until, lanes[lane + w.L_EXIT_TIME]),
        lanes[lane + w.L_EXIT_INFO],
        lanes[lane + w.L_EXIT_TIME],
        lanes[lane + w.L_EXIT_LINE] | (lanes[lane + w.L_EXIT_CPU] << U(32)) | (cpu << U(48)),
    )


@kernel("u8(words, u8, u8, u8, u8, u8)")
def _run(lanes, lane, rip, line, time, counts):
    """One more look at where the guest is: a run at one address grows, or another one begins."""
    if lanes[lane + w.L_RIP] != rip or not counts or not rip:
        lanes[lane + w.L_RIP] = rip
        lanes[lane + w.L_RUN] = k.ZERO
        lanes[lane + w.L_RUN_LINE] = line
        lanes[lane + w.L_RUN_TIME] = time
    if counts and rip:
        lanes[lane + w.L_RUN] += k.ONE
        if lanes[lane + w.L_RUN] > lanes[lane + w.L_SPIN]:
            lanes[lane + w.L_SPIN] = lanes[lane + w.L_RUN]
            lanes[lane + w.L_SPIN_RIP] = rip
            lanes[lane + w.L_SPIN_LINE] = lanes[lane + w.L_RUN_LINE]
            lanes[lane + w.L_SPIN_NS] = since(time, lanes[lane + w.L_RUN_TIME])
    return k.ZERO


@kernel("u8(words, words, words, words, u8, u8, u8)")
def leave(lanes, places, out, rows, lane, row, kind):
    """kvm_exit."""
    line = rows[row + U(5)] & k.LOW32
    rip = rows[row + k.ONE]
    if lanes[lane + w.L_EXIT_LINE]:
        finish_exit(lanes, out, lane, NONE, k.ZERO)
    lanes[lane + w.L_EXIT_TIME] = rows[row]
    lanes[lane + w.L_EXIT_LINE] = line
    lanes[lane + w.L_EXIT_NAME] = (rows[row + U(6)] + k.ONE) & k.LOW32
    lanes[lane + w.L_EXIT_RIP] = rip
    lanes[lane + w.L_EXIT_CLASS] = kind
    lanes[lane + w.L_EXIT_INFO] = rows[row + U(4)] | rows[row + U(3)]
    lanes[lane + w.L_EXIT_CPU] = _cpu(rows, row)
    lanes[lane + w.L_NESTED] = k.ZERO
    lanes[lane + w.L_FRESH] = k.ONE
    lanes[lane + w.L_SKIP] = k.ZERO
    if lanes[lane + w.L_FAULT_RIP] != rip:
        lanes[lane + w.L_FAULT_RIP] = k.ZERO  # it has got further
    _run(lanes, lane, rip, line, rows[row], k.ONE if kind == w.CLASS_AGAIN else k.ZERO)
    if lanes[lane + w.L_PLACE]:
        place = (lanes[lane + w.L_PLACE] - k.ONE) * w.P_STRIDE
        places[place + w.P_IN] = k.ONE
        if kind == w.CLASS_TRAP or kind == w.CLASS_AVIC or kind == w.CLASS_INDUCED:
            places[place + w.P_APICV] = k.ONE
        if kind == w.CLASS_HLT:
            places[place + w.P_HALTED] = line
            places[place + w.P_CALLED] = NONE
    return k.ZERO


@kernel("u8(words, words, words, words, u8, u8)")
def enter(lanes, places, out, rows, lane, row):
    """kvm_entry: an exit is over, and the vCPU's waiting interrupts reach it."""
    time = rows[row]
    if lanes[lane + w.L_EXIT_LINE]:
        finish_exit(lanes, out, lane, time, _cpu(rows, row))
        lanes[lane + w.L_EXIT_LINE] = k.ZERO
    else:
        line = rows[row + U(5)] & k.LOW32
        _run(lanes, lane, rows[row + k.ONE], line, time, k.ONE)
        emit(out, w.FACT_ENTRY, lanes[lane + w.L_PLACE], rows[row + k.ONE], NONE, k.ZERO, time, line)
    if not lanes[lane + w.L_PLACE]:
        return k.ZERO
    index = lanes[lane + w.L_PLACE] - k.ONE
    place = index * w.P_STRIDE
    places[place + w.P_IN] = U(2)
    places[place + w.P_ENTRIES] += k.ONE
    places[place + w.P_HALTED] = k.ZERO
    kept = k.ZERO
    for i in range(places[place + w.P_WAITING]):
        vector = places[place + w.P_WAIT0 + U(i)]
        v = place + w.V0 + (vector & k.ICR_VECTOR) * w.V_STRIDE
        if places[place + w.P_INJECTS] and not vector >> U(32) and not places[place + w.P_APICV]:
            places[place + w.P_WAIT0 + kept] = vector
            kept += k.ONE
        elif places[v + w.V_SINCE] and places[v + w.V_ENTRY] == NONE:
            places[v + w.V_ENTRY] = time
            if places[v + w.V_KIND] == U(2):
                entered(places, out, index, vector & k.ICR_VECTOR)
    places[place + w.P_WAITING] = kept
    return k.ZERO


@kernel("u8(words, words, u8, u8, u8, u8)")
def eoi(places, out, target, vector, time, line):
    """kvm_eoi of a vector at its place: an interrupt is over."""
    v = (target - k.ONE) * w.P_STRIDE + w.V0 + vector * w.V_STRIDE
    places[v + w.V_EOI] = time
    if not places[v + w.V_SINCE]:
        return k.ZERO
    if places[v + w.V_KIND] == U(2):
        emit(
            out,
            w.FACT_SERVED | (vector << U(32)),
            target,
            k.ZERO,
            since(time, places[v + w.V_ENTRY]),
            since(time, places[v + w.V_TIME]),
            time,
            line,
        )
    places[v + w.V_SINCE] = k.ZERO
    return k.ZERO


@kernel("u8(words, words, u8, u8, u8, u8)")
def inject(lanes, places, lane, vector, again, line):
    """kvm_inj_virq: the vector is on its way into the guest, or is tried again."""
    if again:
        if lanes[lane + w.L_AGAIN] != vector + k.ONE:
            lanes[lane + w.L_AGAIN] = vector + k.ONE
            lanes[lane + w.L_AGAIN_RUN] = k.ZERO
            lanes[lane + w.L_AGAIN_LINE] = line
        lanes[lane + w.L_AGAIN_RUN] += k.ONE
        if lanes[lane + w.L_AGAIN_RUN] > lanes[lane + w.L_AGAIN_MOST]:
            lanes[lane + w.L_AGAIN_MOST] = lanes[lane + w.L_AGAIN_RUN]
            lanes[lane + w.L_AGAIN_VECTOR] = vector
            lanes[lane + w.L_AGAIN_FIRST] = lanes[lane + w.L_AGAIN_LINE]
            stays = lanes[lane + w.L_PAGE_RUN] >= lanes[lane + w.L_AGAIN_RUN]
            lanes[lane + w.L_AGAIN_PAGE] = lanes[lane + w.L_PAGE] if stays else k.ZERO
            lanes[lane + w.L_AGAIN_PAGE_LINE] = lanes[lane + w.L_PAGE_LINE]
        return k.ZERO
    lanes[lane + w.L_AGAIN] = k.ZERO
    if lanes[lane + w.L_PLACE]:
        place = (lanes[lane + w.L_PLACE] - k.ONE) * w.P_STRIDE
        places[place + w.P_INJECTS] = k.ONE
        places[place + w.V0 + vector * w.V_STRIDE + w.V_INJECTED] += k.ONE
        places[place + w.V0 + vector * w.V_STRIDE + w.V_TAKEN] += k.ONE
        for i in range(places[place + w.P_WAITING]):
            if places[place + w.P_WAIT0 + U(i)] == vector:
                places[place + w.P_WAIT0 + U(i)] = vector | (k.ONE << U(32))
    return k.ZERO


@kernel("u8(words, words, u8, u8)")
def exception(lanes, rows, lane, row):
    """kvm_inj_exception: the same one at the same address as the one before, or another."""
    name = (rows[row + U(6)] + k.ONE) & k.LOW32
    line = rows[row + U(5)] & k.LOW32
    rip = lanes[lane + w.L_EXIT_RIP]
    if not lanes[lane + w.L_EXIT_LINE] or not rip:
        return k.ZERO
    if lanes[lane + w.L_FAULT_RIP] != rip or lanes[lane + w.L_FAULT_NAME] != name:
        lanes[lane + w.L_FAULT_RIP] = rip
        lanes[lane + w.L_FAULT_NAME] = name
        lanes[lane + w.L_FAULT_RUN] = k.ZERO
        lanes[lane + w.L_FAULT_LINE] = line
    lanes[lane + w.L_FAULT_RUN] += k.ONE
    if lanes[lane + w.L_FAULT_RUN] > lanes[lane + w.L_FAULTS]:
        lanes[lane + w.L_FAULTS] = lanes[lane + w.L_FAULT_RUN]
        lanes[lane + w.L_FAULTS_RIP] = rip
        lanes[lane + w.L_FAULTS_NAME] = name
        lanes[lane + w.L_FAULTS_LINE] = lanes[lane + w.L_FAULT_LINE]
    return k.ZERO


@kernel("u8(words, words, u8, u8)")
def page_fault(lanes, rows, lane, row):
    """kvm_page_fault: the same address as the one before on this thread, or another."""
    line = rows[row + U(5)] & k.LOW32
    if lanes[lane + w.L_PAGE] != rows[row + k.ONE]:
        lanes[lane + w.L_PAGE] = rows[row + k.ONE]
        lanes[lane + w.L_PAGE_RUN] = k.ZERO
        lanes[lane + w.L_PAGE_LINE] = line
    lanes[lane + w.L_PAGE_RUN] += k.ONE
    return k.ZERO


@kernel("u8(words, words, words, words, words, u8, u8)")
def gap(lanes, places, pool, out, rows, lane, row):
    """A line long after the exit that is open: it has no part in it."""
    past = since(rows[row], lanes[lane + w.L_EXIT_TIME])
    if past == NONE or past < w.GAP or lanes[lane + w.L_EXIT_CLASS] == w.CLASS_HLT:
        return k.ZERO
    close(lanes, places, pool, out, lane)
    settle(lanes, places, pool, out, lane, k.ZERO)
    close_register(lanes, out, lane)
    finish_exit(lanes, out, lane, NONE, k.ZERO)
    lanes[lane + w.L_EXIT_LINE] = k.ZERO
    lanes[lane + w.L_GAP] = rows[row + U(5)] & k.LOW32
    return k.ZERO
