"""Let a guest program the PIC pair by its ports, and a vCPU acknowledge an interrupt of it.

Models: picdev_write and picdev_read with pic_ioport_write, pic_ioport_read, pic_poll_read, elcr_ioport_write and _read,
kvm_pic_reset; kvm_pic_read_irq with pic_intack; pic_clear_isr. i8259.py has lines and priorities. Differs by release:
up to 6.1 a poll answers the pin alone, without bit 7.
Spec: Intel 8259A data sheet, as far as KVM follows it.
"""

from ..jit.declare import kernel
from . import i8254, irqack
from . import typed as k
from .i8259 import CASCADE, MASTER, NO_PIN, SLAVE, bit, first_accepting, priority, update, wanted
from .irqlock import lock, unlock
from .shared import own

NOT_MINE = k.NONE

SPURIOUS = k.U(7)
"""The pin that answers for none: the lowest of a chip in its reset state."""
ICW1, OCW3 = k.U(0x10), k.U(0x08)
EOI, EOI_ROTATE, EOI_SPECIFIC, ROTATE_SPECIFIC, EOI_ROTATE_SPECIFIC = (k.U(i) for i in (1, 5, 3, 6, 7))
"""OCW2's commands, bits 7:5. 0 and 4 are ROTATE_AUTO off and on."""
ROTATE_AUTO = k.U(3)


@kernel("u8(words, u8, u8, u8)")
def clear_isr(m, chip, pin, me):
    """pic_clear_isr: out of service, whether or not it was in it, and the ack notifiers are told either way."""
    m[chip + k.PIC_ISR] = m[chip + k.PIC_ISR] & ~bit(pin)
    if chip == MASTER:
        return irqack.notify_acked(m, k.ZERO, pin, me) & k.CODE_EFFECTS
    return irqack.notify_acked(m, k.ONE, pin + k.U(8), me) & k.CODE_EFFECTS


# ------------------------------------------------------------------------------------------------------- acknowledging


@kernel("u8(words, u8, u8, u8)")
def _intack(m, chip, pin, me):
    """pic_intack: a level request stays in IRR."""
    m[chip + k.PIC_ISR] = m[chip + k.PIC_ISR] | bit(pin)
    if not m[chip + k.PIC_ELCR] & bit(pin):
        m[chip + k.PIC_IRR] = m[chip + k.PIC_IRR] & ~bit(pin)
    if not m[chip + k.PIC_AUTO_EOI]:
        return k.ZERO
    if m[chip + k.PIC_ROTATE_ON_AUTO_EOI]:
        m[chip + k.PIC_PRIORITY_ADD] = (pin + k.ONE) & k.U(7)
    return clear_isr(m, chip, pin, me)


@kernel("u8(words, u8)")
def _acknowledge(m, me):
    """Take the pair's first interrupt: its vector, in the low byte of the code of whom that had effects for.

    A slave that wants nothing any more answers with a spurious vector, and only the master has something in service.
    """
    pin = wanted(m, MASTER)
    if pin == NO_PIN:
        return (m[MASTER + k.PIC_IRQ_BASE] + SPURIOUS) & k.ICR_VECTOR
    code = _intack(m, MASTER, pin, me)
    chip = MASTER
    if pin == CASCADE:
        chip = SLAVE
        pin = wanted(m, SLAVE)
        if pin == NO_PIN:
            pin = SPURIOUS
        else:
            code = code | _intack(m, SLAVE, pin, me)
    return code | ((m[chip + k.PIC_IRQ_BASE] + pin) & k.ICR_VECTOR)


@kernel("u8(words, u8)")
def read_irq(m, v):
    """kvm_pic_read_irq for a vCPU that injects: the vector. Effects for others are kept in K_SENT."""
    lock(m)
    m[k.PIC_OUTPUT] = k.ZERO
    code = _acknowledge(m, v)
    code = code | update(m, v)
    unlock(m)
    code = code | i8254.work(m, v)
    m[own(m, v) + k.K_SENT] = m[own(m, v) + k.K_SENT] | (code & k.CODE_EFFECTS)
    return code & k.ICR_VECTOR


# --------------------------------------------------------------------------------------------------------------- writes


@kernel("u8(words, u8, u8, u8)")
def _reset(m, chip, icw1, me):
    """kvm_pic_reset for ICW1: requests of edge pins are dropped, and told as acknowledged if anybody could take them.

    What is in service, the poll command, rotation and the vector base stay, and so does the output.
    """
    irr, elcr = m[chip + k.PIC_IRR], m[chip + k.PIC_ELCR]
    m[chip + k.PIC_INIT4] = icw1 & k.ONE
    m[chip + k.PIC_LAST_IRR] = k.ZERO
    m[chip + k.PIC_IRR] = irr & elcr
    m[chip + k.PIC_IMR] = k.ZERO
    m[chip + k.PIC_PRIORITY_ADD] = k.ZERO
    m[chip + k.PIC_SPECIAL_MASK] = k.ZERO
    m[chip + k.PIC_READ_REG_SELECT] = k.ZERO
    if not icw1 & k.ONE:
        m[chip + k.PIC_SPECIAL_FULLY_NESTED] = k.ZERO
        m[chip + k.PIC_AUTO_EOI] = k.ZERO
    m[chip + k.PIC_INIT_STATE] = k.ONE
    code = k.ZERO
    if first_accepting(m) == k.NONE:
        return code
    for i in range(8):
        if irr & ~elcr & bit(k.U(i)):
            code = code | clear_isr(m, chip, k.U(i), me)
    return code


@kernel("u8(words, u8, u8)")
def _set_mode(m, chip, ocw3):
    """OCW3: poll command, which register reads give, special mask mode."""
    if ocw3 & k.U(0x04):
        m[chip + k.PIC_POLL] = k.ONE
    if ocw3 & k.U(0x02):
        m[chip + k.PIC_READ_REG_SELECT] = ocw3 & k.ONE
    if ocw3 & k.U(0x40):
        m[chip + k.PIC_SPECIAL_MASK] = (ocw3 >> k.U(5)) & k.ONE
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _command(m, chip, ocw2, me):
    """OCW2: ends of interrupts and rotations. Without anything in service an unspecific end does nothing at all."""
    command = ocw2 >> k.U(5)
    if not command & ROTATE_AUTO:
        m[chip + k.PIC_ROTATE_ON_AUTO_EOI] = command >> k.U(2)
        return k.ZERO
    pin = ocw2 & k.U(7)
    if command == EOI or command == EOI_ROTATE:
        first = priority(m, chip, m[chip + k.PIC_ISR])
        if first == NO_PIN:
            return k.ZERO
        pin = (first + m[chip + k.PIC_PRIORITY_ADD]) & k.U(7)
    elif command != EOI_SPECIFIC and command != ROTATE_SPECIFIC and command != EOI_ROTATE_SPECIFIC:
        return k.ZERO
    code = k.ZERO
    if command & k.U(4):
        m[chip + k.PIC_PRIORITY_ADD] = (pin + k.ONE) & k.U(7)
    if command != ROTATE_SPECIFIC:
        code = clear_isr(m, chip, pin, me)
    return code | update(m, me)


@kernel("u8(words, u8, u8, u8)")
def _set_imr(m, chip, value, me):
    """OCW1: whoever listens is told of each pin that is masked or unmasked."""
    changed = m[chip + k.PIC_IMR] ^ value
    m[chip + k.PIC_IMR] = value
    number = k.ZERO if chip == MASTER else k.ONE
    for i in range(8):
        pin = k.U(i)
        if changed & bit(pin):
            masked = k.ONE if value & bit(pin) else k.ZERO
            irqack.notify_mask(m, number, pin + number * k.U(8), masked, me)
    return update(m, me)


@kernel("u8(words, u8, u8, u8)")
def _data(m, chip, value, me):
    """The data port: IMR, or what the state of the initialisation expects. ICW3 is not looked at."""
    state = m[chip + k.PIC_INIT_STATE]
    if state == k.ZERO:
        return _set_imr(m, chip, value, me)
    if state == k.ONE:
        m[chip + k.PIC_IRQ_BASE] = value & k.U(0xF8)
        m[chip + k.PIC_INIT_STATE] = k.U(2)
    elif state == k.U(2):
        m[chip + k.PIC_INIT_STATE] = k.U(3) if m[chip + k.PIC_INIT4] else k.ZERO
    elif state == k.U(3):
        m[chip + k.PIC_SPECIAL_FULLY_NESTED] = (value >> k.U(4)) & k.ONE
        m[chip + k.PIC_AUTO_EOI] = (value >> k.ONE) & k.ONE
        m[chip + k.PIC_INIT_STATE] = k.ZERO
    return k.ZERO


# --------------------------------------------------------------------------------------------------------------- ports


@kernel("u8(words, u8, u8)")
def _claims(m, port, length):
    """Tell whether an access of ``length`` bytes lies within the two ports of a chip, or of the ELCRs."""
    first = port & ~k.ONE
    if m[k.H_CONFIG] & k.CONFIG_SPLIT_IRQCHIP or (port & k.ONE) + length > k.U(2) or not length:
        return k.ZERO
    return k.ONE if first == k.PIC_PORT or first == k.PIC_PORT_SLAVE or first == k.PIC_PORT_ELCR else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def _write(m, v, port, value):
    """pic_ioport_write, elcr_ioport_write: effects. A new ELCR changes no request."""
    if port & ~k.ONE == k.PIC_PORT_ELCR:
        chip = SLAVE if port & k.ONE else MASTER
        m[chip + k.PIC_ELCR] = value & m[chip + k.PIC_ELCR_MASK]
        return k.ZERO
    chip = SLAVE if port & k.U(0x80) else MASTER
    if port & k.ONE:
        return _data(m, chip, value, v)
    if value & ICW1:
        return _reset(m, chip, value, v)
    if value & OCW3:
        return _set_mode(m, chip, value)
    return _command(m, chip, value, v)


@kernel("u8(words, u8, u8, u8, u8)")
def io_write(m, v, port, length, value):
    """picdev_write: a delivery code, or NOT_MINE. Two bytes at once are the PIC's, which ignores them."""
    if not _claims(m, port, length):
        return NOT_MINE
    if length != k.ONE:
        return k.ZERO
    lock(m)
    code = _write(m, v, port, value & k.U(0xFF))
    unlock(m)
    return code | i8254.work(m, v)


@kernel("u8(words, u8, u8, u8)")
def _poll(m, chip, out, me):
    """pic_poll_read: take the chip's first interrupt in one go, a level request too."""
    pin = wanted(m, chip)
    if pin == NO_PIN:
        m[out] = SPURIOUS
        return update(m, me)
    if chip == SLAVE:
        m[MASTER + k.PIC_ISR] = m[MASTER + k.PIC_ISR] & ~bit(CASCADE)
        m[MASTER + k.PIC_IRR] = m[MASTER + k.PIC_IRR] & ~bit(CASCADE)
    m[chip + k.PIC_IRR] = m[chip + k.PIC_IRR] & ~bit(pin)
    m[out] = pin | (k.ZERO if m[k.H_RULES] & k.R_PIC_POLL_BARE else k.U(0x80))
    code = clear_isr(m, chip, pin, me)
    if chip == SLAVE or pin != CASCADE:
        code = code | update(m, me)
    return code


@kernel("u8(words, u8, u8, u8)")
def _read(m, v, port, out):
    """pic_ioport_read, elcr_ioport_read: the value in word ``out``, and effects."""
    if port & ~k.ONE == k.PIC_PORT_ELCR:
        m[out] = m[(SLAVE if port & k.ONE else MASTER) + k.PIC_ELCR]
        return k.ZERO
    chip = SLAVE if port & k.U(0x80) else MASTER
    if m[chip + k.PIC_POLL]:
        code = _poll(m, chip, out, v)
        m[chip + k.PIC_POLL] = k.ZERO
        return code
    if port & k.ONE:
        m[out] = m[chip + k.PIC_IMR]
    else:
        m[out] = m[chip + (k.PIC_ISR if m[chip + k.PIC_READ_REG_SELECT] else k.PIC_IRR)]
    return k.ZERO


@kernel("u8(words, u8, u8, u8)")
def io_read(m, v, port, length):
    """picdev_read: what was read in K_MSR_DATA, and a delivery code, or NOT_MINE. Two bytes at once read as 0.

    After a poll command either port of the chip answers with it.
    """
    if not _claims(m, port, length):
        return NOT_MINE
    out = own(m, v) + k.K_MSR_DATA
    m[out] = k.ZERO
    if length != k.ONE:
        return k.ZERO
    lock(m)
    code = _read(m, v, port, out)
    unlock(m)
    return code | i8254.work(m, v)
