"""Accept lines: what each does at its target, and who raised it, as lines before or behind it tell."""

from __future__ import annotations

from fastexit.answers.follow import words as w
from fastexit.answers.follow.words import NONE, U
from fastexit.jit.declare import kernel
from fastexit.kernels import typed as k


@kernel("u8(u8, u8)")
def since(later, earlier):
    """A duration, or NONE where a time is missing or runs backwards."""
    if later == NONE or earlier == NONE:
        return NONE
    return NONE if (later - earlier) >> w.SIGN else later - earlier


@kernel("u8(words, u8, u8, u8, u8, u8, u8, u8)")
def emit(out, word, who, value, x, y, time, line):
    """Write one fact."""
    at = (out[0] + k.ONE) * w.ROW
    out[at] = word
    out[at + k.ONE] = who
    out[at + U(2)] = value
    out[at + U(3)] = x
    out[at + U(4)] = y
    out[at + U(5)] = k.ZERO
    out[at + U(6)] = time
    out[at + U(7)] = line
    out[0] += k.ONE
    return k.ZERO


@kernel("u8(words, words, u8, u8)")
def entered(places, out, place, vector):
    """Write how long an IPI took until its target's entry."""
    v = place * w.P_STRIDE + w.V0 + vector * w.V_STRIDE
    entered = places[v + w.V_ENTRY]
    return emit(
        out,
        w.FACT_ENTERED | (vector << U(32)),
        place + k.ONE,
        k.ZERO,
        since(entered, places[v + w.V_TIME]),
        since(entered, places[v + w.V_SENT]),
        entered,
        places[v + w.V_LINE],
    )


@kernel("u8(words, words, u8, u8)")
def _hang(lanes, pool, lane, node):
    """Put an accept line at the end of a lane's list."""
    pool[node + w.N_NEXT] = k.ZERO
    if lanes[lane + w.L_HEAD]:
        pool[lanes[lane + w.L_TAIL] + w.N_NEXT] = node
    else:
        lanes[lane + w.L_HEAD] = node
    lanes[lane + w.L_TAIL] = node
    return k.ZERO


@kernel("u8(words, words, words, words, u8, u8, u8, u8, u8)")
def _give(lanes, places, pool, out, lane, node, source, door, gsi):
    """Write the fact of an accept line whose source is known, and free its node."""
    word = pool[node + w.N_WORD]
    target = pool[node + w.N_TARGET]
    time = pool[node + w.N_TIME]
    line = pool[node + w.N_LINE]
    vector = word & k.ICR_VECTOR
    sent = pool[node + w.N_SENT]
    emit(
        out,
        w.FACT_ACCEPT | (door << w.BYTE) | (source << U(16)) | ((word >> U(32)) << U(24)) | (vector << U(32)),
        target | (lanes[lane + w.L_PLACE] << U(32)),
        since(time, sent) if source == w.FROM_IPI else NONE,
        NONE,
        word & k.LOW32,
        time,
        line | (gsi << U(32)),
    )
    if target:
        v = (target - k.ONE) * w.P_STRIDE + w.V0 + vector * w.V_STRIDE
        if places[v + w.V_LINE] == line and places[v + w.V_KIND] == k.ONE:
            places[v + w.V_KIND] = U(3)
    pool[node + w.N_NEXT] = pool[0]
    pool[0] = node
    return k.ZERO


@kernel("u8(words, words, words, words, u8, u8)")
def settle(lanes, places, pool, out, lane, keep):
    """Accept lines that nothing explains any more: of the target's timer, or not told. With ``keep`` those of the open
    ICR write stay, whose door is not known yet.
    """
    node = lanes[lane + w.L_HEAD]
    lanes[lane + w.L_HEAD] = k.ZERO
    lanes[lane + w.L_TAIL] = k.ZERO
    while node:
        following = pool[node + w.N_NEXT]
        label = pool[node + w.N_LABEL]
        if label == w.FROM_IPI and keep:
            _hang(lanes, pool, lane, node)
        elif label == w.FROM_IPI:
            _give(lanes, places, pool, out, lane, node, w.FROM_IPI, lanes[lane + w.L_DOOR], k.ZERO)
        elif lanes[lane + w.L_GSI]:
            _give(lanes, places, pool, out, lane, node, w.FROM_LINE, k.ZERO, lanes[lane + w.L_GSI])
        else:
            target = pool[node + w.N_TARGET]
            source = w.FROM_UNTOLD
            if target:
                timer = places[(target - k.ONE) * w.P_STRIDE + w.P_LVTT]
                if timer == (pool[node + w.N_WORD] & k.ICR_VECTOR) + k.ONE:
                    source = w.FROM_TIMER
                elif not timer and target == lanes[lane + w.L_PLACE]:
                    source = w.FROM_TIMER
            _give(lanes, places, pool, out, lane, node, source, k.ZERO, k.ZERO)
        node = following
    return k.ZERO


@kernel("u8(words, words, words, words, u8, u8)")
def _label(lanes, places, pool, out, lane, node):
    """An accept line is one of the open ICR write's; its door may not be known yet, but that it is an IPI is."""
    pool[node + w.N_LABEL] = w.FROM_IPI
    lanes[lane + w.L_TARGETS] += k.ONE
    if pool[node + w.N_TARGET]:
        vector = pool[node + w.N_WORD] & k.ICR_VECTOR
        place = pool[node + w.N_TARGET] - k.ONE
        v = place * w.P_STRIDE + w.V0 + vector * w.V_STRIDE
        if places[v + w.V_LINE] == pool[node + w.N_LINE] and places[v + w.V_KIND] == k.ONE:
            places[v + w.V_KIND] = U(2)
            if places[v + w.V_ENTRY] != NONE:
                entered(places, out, place, vector)
    return k.ZERO


@kernel("u8(u8, u8)")
def _belongs(icr, accept):
    """An IPI is accepted with its own vector, mode and trigger; lowest priority may turn into Fixed."""
    if (icr ^ accept) & w.TRIGGER_VECTOR:
        return k.ZERO
    mode = accept & k.ICR_DM
    if icr & k.ICR_DM == mode or (not mode and icr & k.ICR_DM == w.LOWEST):
        return k.ONE
    return k.ZERO


@kernel("u8(words, words, words, words, u8)")
def match(lanes, places, pool, out, lane):
    """The open ICR write is known now: accept lines that came before it and fit are its own."""
    icr = lanes[lane + w.L_ICR]
    node = lanes[lane + w.L_HEAD]
    while node:
        if not pool[node + w.N_LABEL] and not lanes[lane + w.L_GSI] and _belongs(icr, pool[node + w.N_WORD]):
            _label(lanes, places, pool, out, lane, node)
        node = pool[node + w.N_NEXT]
    return k.ZERO


@kernel("u8(words, words, words, words)")
def _settle_all(lanes, places, pool, out):
    """There is no room for another accept line: those that nothing explained so far are let go, of every lane."""
    for i in range(pool[w.POOL_LANES]):
        lane = U(i) * w.L_STRIDE
        if lanes[lane + w.L_HEAD]:
            settle(lanes, places, pool, out, lane, lanes[lane + w.L_OPEN])
    return k.ZERO


@kernel("u8(words, words, words, words, words, u8, u8, u8)")
def accept(lanes, places, pool, out, rows, lane, row, target):
    """kvm_apic_accept_irq: what it does at its target, and whose it is, as far as that is known."""
    time = rows[row]
    line = rows[row + U(5)] & k.LOW32
    vector = rows[row + U(2)] & k.ICR_VECTOR
    word = vector | (rows[row + U(3)] & U(0xFFFF)) | ((rows[row + U(4)] & k.ONE) << U(32))
    sent = lanes[lane + w.L_EXIT_TIME] if lanes[lane + w.L_EXIT_LINE] else NONE
    if target and word & k.ICR_DM <= w.LOWEST:
        place = (target - k.ONE) * w.P_STRIDE
        v = place + w.V0 + vector * w.V_STRIDE
        places[v + w.V_ACCEPTED] += k.ONE
        if word & k.ICR_TRIGGER and since(time, places[v + w.V_EOI]) < w.AT_ONCE:
            places[v + w.V_BACK] += k.ONE
            if not places[v + w.V_BACK_LINE]:
                places[v + w.V_BACK_LINE] = line
        if not places[v + w.V_SINCE]:
            places[v + w.V_LINE] = line
            places[v + w.V_TIME] = time
            places[v + w.V_KIND] = k.ONE
            places[v + w.V_TAKEN] = k.ZERO
            places[v + w.V_SENT] = sent
            places[v + w.V_ENTRY] = NONE
            places[v + w.V_ENTRIES] = places[place + w.P_ENTRIES]
            waiting = places[place + w.P_WAITING]
            inside = places[place + w.P_IN] == U(2)
            if waiting < w.WAITING and not (inside and places[place + w.P_APICV]):
                places[place + w.P_WAIT0 + waiting] = vector
                places[place + w.P_WAITING] = waiting + k.ONE
        places[v + w.V_SINCE] += k.ONE
        if places[v + w.V_SINCE] > places[v + w.V_MOST]:
            places[v + w.V_MOST] = places[v + w.V_SINCE]
            places[v + w.V_MOST_NS] = since(time, places[v + w.V_TIME])
            places[v + w.V_MOST_ENTRIES] = places[place + w.P_ENTRIES] - places[v + w.V_ENTRIES]
        if places[place + w.P_HALTED] and places[place + w.P_CALLED] == NONE:
            places[place + w.P_CALLED] = time
            places[place + w.P_CALLED_LINE] = line
    if not pool[0]:
        _settle_all(lanes, places, pool, out)
    node = pool[0]
    if not node:
        return emit(
            out,
            w.FACT_ACCEPT | (w.FROM_UNTOLD << U(16)) | (vector << U(32)),
            target,
            NONE,
            NONE,
            word & k.LOW32,
            time,
            line,
        )
    pool[0] = pool[node + w.N_NEXT]
    pool[node + w.N_WORD] = word
    pool[node + w.N_TARGET] = target
    pool[node + w.N_TIME] = time
    pool[node + w.N_LINE] = line
    pool[node + w.N_SENT] = sent
    pool[node + w.N_LABEL] = k.ZERO
    source = lanes[lane + w.L_SOURCE]
    if source and lanes[lane + w.L_SOURCE_VECTOR] == vector:
        return _give(lanes, places, pool, out, lane, node, source, k.ZERO, lanes[lane + w.L_SOURCE_GSI])
    if lanes[lane + w.L_OPEN] and not lanes[lane + w.L_GSI]:
        if lanes[lane + w.L_HAVE] & w.CALL_LINE or _belongs(lanes[lane + w.L_ICR], word):
            _label(lanes, places, pool, out, lane, node)
    return _hang(lanes, pool, lane, node)


@kernel("u8(words, words, words, words, u8, u8, u8, u8)")
def raised(lanes, places, pool, out, lane, vector, source, gsi):
    """A line that says who raised what was accepted before it: an IOAPIC pin by its vector, the SynIC the last one."""
    node = lanes[lane + w.L_HEAD]
    lanes[lane + w.L_HEAD] = k.ZERO
    lanes[lane + w.L_TAIL] = k.ZERO
    while node:
        following = pool[node + w.N_NEXT]
        fits = not following if source != w.FROM_IOAPIC else pool[node + w.N_WORD] & k.ICR_VECTOR == vector
        if fits and not pool[node + w.N_LABEL]:
            _give(lanes, places, pool, out, lane, node, source, k.ZERO, gsi)
        else:
            _hang(lanes, pool, lane, node)
        node = following
    return k.ZERO
