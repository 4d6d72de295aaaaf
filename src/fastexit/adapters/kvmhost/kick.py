"""How a vCPU's thread is reached: one signal, for which it can be in the guest, asleep, or on its way to either.

Models: nothing. The signal is blocked in the thread but for KVM_RUN (KVM_SET_SIGNAL_MASK) and while it sleeps, so one
that comes too early stays pending, and ends the run or the sleep that is begun next: nothing is lost, in any order. A
POSIX timer sends the same signal when the vCPU's next timer is due.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from cffi import FFI

from fastexit.kvm import ioctl as K

SIGNAL = signal.SIGUSR1
"""Nothing else may use it in these threads; how the process treats it does not matter."""
THREAD_ID, MONOTONIC = 4, 1
NS = 1_000_000_000
SOONEST = 1_000
"""A timer of 0 ns would be none."""
_ffi: Any = FFI()
_ffi.cdef(
    """
    struct itimerspec { long interval_s, interval_ns, value_s, value_ns; };
    struct sigevent { void *value; int signo, notify, tid; char rest[44]; };
    int timer_create(int clock, struct sigevent *event, void **timer);
    int timer_settime(void *timer, int flags, const struct itimerspec *new, struct itimerspec *old);
    int timer_delete(void *timer);
    """
)
_libc: Any = _ffi.dlopen(None)


class Kick:
    """The door to one thread, which `attach`es itself and is reached by `kick` from then on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._timer: Any = None
        self._armed: int | None = None
        self._times = _ffi.new("struct itimerspec *")
        self._none = _ffi.new("struct itimerspec *")

    def attach(self, vcpu: int) -> None:
        """The calling thread runs the vCPU with this file descriptor."""
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        running = K.ffi.new("struct signal_set *", {"len": 8})
        mask = sum(1 << number - 1 for number in signal.valid_signals()) & ~(1 << SIGNAL - 1)
        running.signals[0:8] = list(mask.to_bytes(8, "little"))
        K.call(vcpu, K.SET_SIGNAL_MASK, running)
        event = _ffi.new("struct sigevent *", {"signo": SIGNAL, "notify": THREAD_ID, "tid": threading.get_native_id()})
        timer = _ffi.new("void **")
        if _libc.timer_create(MONOTONIC, event, timer):
            raise OSError(_ffi.errno, f"a timer for a vCPU's thread: {os.strerror(_ffi.errno)}")
        self._timer = timer[0]
        with self._lock:
            self._thread = threading.get_ident()

    def detach(self) -> None:
        """The thread ends; whoever kicks it from now on does nothing."""
        with self._lock:
            self._thread = None
        if self._timer is not None:
            _libc.timer_delete(self._timer)
            self._timer = None
        while signal.sigtimedwait([SIGNAL], 0) is not None:
            pass

    def kick(self) -> None:
        """Ends the thread's KVM_RUN or sleep, this one or the next."""
        with self._lock:
            if self._thread is not None:
                signal.pthread_kill(self._thread, SIGNAL)

    def taken(self) -> None:
        """Forgets kicks so far; whoever calls it looks at everything afterwards."""
        if signal.sigtimedwait([SIGNAL], 0) is not None:
            self._armed = None  # it may have been the timer's

    def sleep(self, seconds: float | None) -> None:
        """Until a kick, or so long."""
        if seconds is None:
            signal.sigwaitinfo([SIGNAL])
        elif seconds > 0:
            signal.sigtimedwait([SIGNAL], seconds)
        self._armed = None

    def arm(self, key: int | None, ns: int) -> None:
        """A kick in ``ns``; ``key`` names the deadline, so that one that is armed is not armed again. None: no kick."""
        if key == self._armed and key is not None:
            return
        if key is None:
            if self._armed is not None:
                _libc.timer_settime(self._timer, 0, self._none, _ffi.NULL)
                self._armed = None
            return
        seconds, rest = divmod(max(ns, SOONEST), NS)
        self._times.value_s, self._times.value_ns = seconds, rest
        _libc.timer_settime(self._timer, 0, self._times, _ffi.NULL)
        self._armed = key
