"""Whether this machine has a KVM to compare with, and the mark of tests that need it; nothing is tested here."""

from __future__ import annotations

from typing import Any

import pytest

from fastexit.kvm import host


def why_not() -> str | None:
    """Why /dev/kvm cannot be used, or None."""
    try:
        host.running()
    except host.KvmUnavailable as error:
        return str(error)
    return None


WHY_NOT = why_not()


def kvm(test: Any) -> Any:
    """A test that skips where there is no usable /dev/kvm, saying why."""
    return pytest.mark.kvm(pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")(test))
