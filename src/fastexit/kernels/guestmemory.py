"""The guest's memory, as far as KVM itself reads and writes it: kvm_read_guest, kvm_write_guest and their caches.

One memory slot from guest-physical address 0 on, which the embedder gives (Machine.guest_memory). An access that does
not lie in it whole fails, as one without a slot does in KVM; nothing is then read or written. Bytes are little-endian.
Not modelled: dirty pages, several slots.
"""

from ..jit.bytesaddressed import load_byte, store_byte
from ..jit.declare import kernel
from . import typed as k


@kernel("u8(words, u8, u8)")
def reaches(m, gpa, size):
    """1 when so many bytes from an address on lie in the guest's memory."""
    have = m[k.H_GUEST_BYTES]
    return k.ONE if size <= have and gpa <= have - size else k.ZERO


@kernel("u8(words, u8, u8)")
def load(m, gpa, size):
    """The value of 1 to 8 bytes, of which the caller knows that they are the guest's."""
    at = m[k.H_GUEST_MEMORY] + gpa
    value = k.ZERO
    for i in range(size):
        value = value | load_byte(at + k.U(i)) << (k.U(i) << k.U(3))
    return value


@kernel("u8(words, u8, u8, u8)")
def store(m, gpa, size, value):
    """Write 1 to 8 bytes, of which the caller knows that they are the guest's."""
    at = m[k.H_GUEST_MEMORY] + gpa
    for i in range(size):
        store_byte(at + k.U(i), value >> (k.U(i) << k.U(3)) & k.U(0xFF))
    return k.ZERO


@kernel("u8(words, u8, u8)")
def clear(m, gpa, size):
    """Write zeroes to bytes of which the caller knows that they are the guest's."""
    at = m[k.H_GUEST_MEMORY] + gpa
    for i in range(size):
        store_byte(at + k.U(i), k.ZERO)
    return k.ZERO
