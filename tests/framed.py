"""Traces written by hand: lines of vCPUs in the frame that the kernel's own reader gives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastexit.trace.replay import replay
from fastexit.trace.report import Report

RIP = "rip 0xfffff80653f32daf info1 0x0 info2 0x0 intr_info 0x00000000 error_code 0x00000000"


def exit_line(reason: str, vcpu: int = 0) -> tuple[int, str]:
    return vcpu, f"kvm_exit: vcpu {vcpu} reason {reason} {RIP}"


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., Report]:
    """Replays lines of (vCPU or -1 for the VMM's main thread, text), all vCPUs' entries in front."""

    def run(*lines: tuple[int, str], vcpus: int = 3, **options: object) -> Report:
        entries = [(vcpu, f"kvm_entry: vcpu {vcpu}, rip 0x1") for vcpu in range(vcpus)]
        path = tmp_path / "trace.txt"
        path.write_text(
            "".join(
                f"  {'qemu' if vcpu < 0 else f'CPU {vcpu}/KVM'}-{100 + vcpu} (  99) [000] ..... 10.{i:06d}: {text}\n"
                for i, (vcpu, text) in enumerate([*entries, *lines])
            )
        )
        return replay(path, **options)  # type: ignore[arg-type]

    return run
