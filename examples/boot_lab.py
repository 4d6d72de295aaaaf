"""Boot a kernel again and again on fastexit's irqchip, inside a lab's machine: how often it came to user space.

    fastexit kernels run 6.1 --cpus 2 --memory 3072 --with VMLINUZ -- python examples/boot_lab.py VMLINUZ --times 20

A boot counts when the command of its user space has run, the guest has switched itself off, every vCPU has ended as
many interrupts as it took, and replay predicts its trace without a mismatch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fastexit.trace.replay import replay

TRACE = str(Path(tempfile.gettempdir()) / "boot.trace")


def boot(image: str, vcpus: int) -> str:
    """Nothing, or what went wrong."""
    command = [sys.executable, "-m", "fastexit", "boot", image, "--vcpus", str(vcpus), "--seconds", "600"]
    command += ["--append", "quiet", "--run", "echo came to user space", "--json", "--trace", TRACE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if "came to user space" not in done.stderr:
        return f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing was said'])[-1]}"
    told = json.loads(done.stdout)
    if told["ended"] != "switched off":
        return f"it ended with {told['ended']}"
    uneven = [v for v in told["vcpus"] if v["interrupts"] != v["eois"]]
    wrong = [f"vCPU {v['vcpu']}: {v['interrupts']} interrupts, {v['eois']} EOIs" for v in uneven]
    wrong += [str(mismatch) for mismatch in replay(TRACE).mismatches[:1]]
    return ", ".join(wrong)


def main() -> None:
    """Boot as often as asked, with each number of vCPUs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--vcpus", type=int, nargs="+", default=[1, 2, 4])
    asked = parser.parse_args()
    failed = 0
    for vcpus in asked.vcpus:
        good = 0
        for n in range(1, asked.times + 1):
            wrong = boot(asked.image, vcpus)
            good += not wrong
            print(f"{vcpus} vCPUs, boot {n}: {wrong or 'ok'}; {good} of {n}", flush=True)
        failed += asked.times - good
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
