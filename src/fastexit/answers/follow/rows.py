"""All rows in order: each goes to who knows it."""

from __future__ import annotations

from fastexit.answers.follow import words as w
from fastexit.answers.follow.senders import (
    access,
    apic_write,
    begin,
    call,
    close,
    close_register,
    mmio_write,
    msr_write,
)
from fastexit.answers.follow.sources import accept, match, raised, settle
from fastexit.answers.follow.vcpus import enter, eoi, exception, finish_exit, gap, inject, leave, page_fault
from fastexit.answers.follow.words import NONE, U
from fastexit.jit.declare import entry, kernel, open_words
from fastexit.kernels import typed as k


@kernel("u8(words, words, words, words, words, words, u8)")
def _follow(rows, marks, lanes, places, pool, out, n):
    """All rows of a block, in order."""
    for i in range(n):
        row = U(i) * w.ROW
        event = rows[row + U(7)] & U(0xFF)
        if event < U(64) and (w.BESIDE >> event) & k.ONE:
            continue
        lane = marks[U(i)] & k.LOW32
        if lane == w.NOWHERE:
            continue
        lane = lane * w.L_STRIDE
        other = (marks[U(i)] >> U(32)) & U(0xFFFFFF)
        kind = marks[U(i)] >> U(56)
        line = rows[row + U(5)] & k.LOW32
        if lanes[lane + w.L_EXIT_LINE]:
            gap(lanes, places, pool, out, rows, lane, row)
        if event == w.E_ACCEPT:
            accept(lanes, places, pool, out, rows, lane, row, other)
            continue
        if event == w.E_APICV_ACCEPT:
            if other:
                places[(other - k.ONE) * w.P_STRIDE + w.P_APICV] = k.ONE
            continue
        if event == w.E_SET_IRQ:
            settle(lanes, places, pool, out, lane, k.ONE)
            lanes[lane + w.L_SOURCE] = k.ZERO
            lanes[lane + w.L_GSI] = rows[row + k.ONE] + k.ONE if rows[row + U(2)] else k.ZERO
            continue
        if event == w.E_MSI_SET_IRQ:
            lanes[lane + w.L_SOURCE] = w.FROM_MSI
            lanes[lane + w.L_SOURCE_VECTOR] = rows[row + U(2)] & k.ICR_VECTOR
            lanes[lane + w.L_SOURCE_GSI] = lanes[lane + w.L_GSI]
            lanes[lane + w.L_GSI] = k.ZERO
            continue
        if event == w.E_IOAPIC_SET_IRQ:
            gsi = lanes[lane + w.L_GSI] if lanes[lane + w.L_GSI] else rows[row + k.ONE] + k.ONE
            raised(lanes, places, pool, out, lane, rows[row + U(2)] & k.ICR_VECTOR, w.FROM_IOAPIC, gsi)
            continue
        if event == w.E_HV:
            if kind == w.CLASS_SYNIC or kind == w.CLASS_STIMER:
                source = w.FROM_SYNIC if kind == w.CLASS_SYNIC else w.FROM_STIMER
                raised(lanes, places, pool, out, lane, k.ZERO, source, k.ZERO)
            continue
        if event == w.E_AVIC and kind != w.CLASS_INCOMPLETE:
            continue
        if event == w.E_PAGE_FAULT:
            page_fault(lanes, rows, lane, row)
            continue
        if event == w.E_INJ_EXCEPTION:
            exception(lanes, rows, lane, row)
            continue
        if event == w.E_APIC_IPI:
            have = lanes[lane + w.L_HAVE]
            if not lanes[lane + w.L_OPEN] or have & (w.IPI_LINE | w.CALL_LINE):
                begin(lanes, places, pool, out, lane, line, k.APIC_ICR)
                have = k.ZERO
            lanes[lane + w.L_HAVE] = have | w.IPI_LINE
            lanes[lane + w.L_ICR] = (rows[row + U(2)] & k.LOW32) | (rows[row + k.ONE] << U(32))
            match(lanes, places, pool, out, lane)
            settle(lanes, places, pool, out, lane, k.ONE)
            lanes[lane + w.L_GSI] = k.ZERO
            lanes[lane + w.L_FRESH] = k.ZERO
            continue
        if event == w.E_APIC and rows[row + U(3)]:
            apic_write(lanes, places, pool, out, rows, lane, row)
        elif event == w.E_MSR and rows[row + U(3)]:
            msr_write(lanes, places, pool, out, rows, lane, row)
        elif event == w.E_EOI or event == w.E_PV_EOI:
            vector = rows[row + U(2)]
            close(lanes, places, pool, out, lane)
            if event == w.E_PV_EOI:
                access(lanes, out, lane, k.APIC_EOI, w.DOOR_ASSIST, line)
            elif lanes[lane + w.L_EXIT_CLASS] == w.CLASS_INDUCED and lanes[lane + w.L_EXIT_LINE]:
                access(lanes, out, lane, k.APIC_EOI, w.DOOR_INDUCED, line)
            if other and vector < U(256):
                eoi(places, out, other, vector, rows[row], line)
        else:
            if event != w.E_HV_SEND_IPI:
                close(lanes, places, pool, out, lane)
            if event == w.E_EXIT:
                settle(lanes, places, pool, out, lane, k.ZERO)
                close_register(lanes, out, lane)
                leave(lanes, places, out, rows, lane, row, kind)
                lanes[lane + w.L_LAST_LINE] = line
                continue
            if event == w.E_ENTRY:
                settle(lanes, places, pool, out, lane, k.ZERO)
                close_register(lanes, out, lane)
                enter(lanes, places, out, rows, lane, row)
            elif event == w.E_MMIO:
                close_register(lanes, out, lane)
                if rows[row + U(3)] and rows[row + k.ONE] >> U(12) == w.PAGE_FRAME:
                    mmio_write(lanes, places, pool, out, rows, lane, row)
            elif event == w.E_INJ_VIRQ:
                if not rows[row + U(2)]:
                    inject(lanes, places, lane, rows[row + k.ONE] & k.ICR_VECTOR, rows[row + U(3)], line)
            elif event == w.E_NESTED_VMEXIT:
                if lanes[lane + w.L_FRESH]:
                    lanes[lane + w.L_NESTED] = k.ONE
            elif event == w.E_HYPERCALL or event == w.E_HV_HYPERCALL or event == w.E_HV_SEND_IPI or event == w.E_AVIC:
                call(lanes, places, pool, out, rows, lane, row, event)
            elif event == w.E_CR and rows[row + k.ONE] == w.BYTE and rows[row + U(3)]:
                access(lanes, out, lane, k.APIC_TASKPRI, w.DOOR_CR8, line)
        settle(lanes, places, pool, out, lane, lanes[lane + w.L_OPEN])
        lanes[lane + w.L_FRESH] = k.ZERO
        lanes[lane + w.L_GSI] = k.ZERO
        lanes[lane + w.L_SOURCE] = k.ZERO
        lanes[lane + w.L_LAST_LINE] = line
    return k.ZERO


@kernel("u8(words, words, words, words, u8)")
def _finish(lanes, places, pool, out, n):
    """The file is over: what is open is complete."""
    for i in range(n):
        lane = U(i) * w.L_STRIDE
        close(lanes, places, pool, out, lane)
        settle(lanes, places, pool, out, lane, k.ZERO)
        close_register(lanes, out, lane)
        if lanes[lane + w.L_EXIT_LINE]:
            finish_exit(lanes, out, lane, NONE, k.ZERO)
    return k.ZERO


@entry
@kernel("u8(u8, u8, u8, u8, u8, u8, u8, u8, u8, u8, u8)")
def follow_rows(rows, marks, n, lanes, n_lanes, places, n_places, pool, out, room, over):
    """Follow a block of rows, or with ``over`` end the file; the caller has checked every index in ``marks``."""
    held = open_words(lanes, n_lanes * w.L_STRIDE)
    at = open_words(places, n_places * w.P_STRIDE)
    waiting = open_words(pool, U(w.POOL + 1) * w.POOL_STRIDE)
    waiting[w.POOL_LANES] = n_lanes
    facts = open_words(out, room * w.ROW)
    if over:
        return _finish(held, at, waiting, facts, n_lanes)
    return _follow(open_words(rows, n * w.ROW), open_words(marks, n), held, at, waiting, facts, n)
