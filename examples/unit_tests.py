"""Run kvm-unit-tests' interrupt tests on fastexit's irqchip, and on KVM's own beside it.

    python examples/unit_tests.py kvm-unit-tests/x86 --vcpus 1 2 4 [--only apic] [--beside]

DIR has the .flat files of a kvm-unit-tests that you built. A test that fails is named; one that fails, or hangs, on
KVM's own irqchip too (--beside) is not counted. xAPIC is a guest whose CPUID has no x2APIC.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

VMEXIT = "ipi", "ipi_halt", "self_ipi_sti_hlt", "self_ipi_tpr_sti_hlt", "mov_to_cr8", "tscdeadline_immed"
TESTS = [("smptest", ""), ("apic", ""), ("ioapic", ""), ("hyperv_synic", ""), ("hyperv_stimer", "")]
TESTS += [("vmexit", argument) for argument in VMEXIT]
RESULT = re.compile(r"^(PASS|FAIL): (.*?)\r?$", re.MULTILINE)


def run(image: Path, *options: str) -> tuple[int, list[tuple[str, str]]]:
    """The exit code and what the guest's tests said."""
    command = [sys.executable, "-m", "fastexit", "boot", str(image), "--quiet", *options]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.returncode, RESULT.findall(done.stdout.decode(errors="replace"))


def failures(code: int, results: list[tuple[str, str]]) -> list[str]:
    """Of one run: the tests' names, and how it ended where that was not their doing."""
    failed = [name for result, name in results if result == "FAIL"]
    return failed if code == bool(failed) else [*failed, {124: "no end"}.get(code, f"exit code {code}")]


def main() -> None:
    """Run what was asked for, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--vcpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", metavar="NAME")
    parser.add_argument("--seconds", default="600", help="for each; default: 600")
    parser.add_argument("--beside", action="store_true", help="what fails runs on KVM's own irqchip, too")
    asked = parser.parse_args()
    wrong = 0
    for name, test in (pair for pair in TESTS if asked.only in (None, pair[0])):
        for vcpus, mode in ((n, mode) for n in asked.vcpus for mode in ("x2apic", "xapic")):
            options = ["--vcpus", str(vcpus), "--seconds", asked.seconds, "--append", test]
            options += ["--no-x2apic"] * (mode == "xapic")
            image = asked.directory / f"{name}.flat"
            hyperv = name.startswith("hyperv")  # there the irqchip has to be fastexit
            code, results = run(image, *options, *["--hyperv"] * hyperv)
            failed = failures(code, results)
            again = failed and asked.beside and not hyperv
            beside = failures(*run(image, *options, "--irqchip", "kernel")) if again else []
            wrong += len(set(failed) - set(beside))
            said = ", ".join(f"{why}{' (on KVM its own, too)' * (why in beside)}" for why in failed)
            print(f"{name} {test:20} {vcpus} vCPUs {mode:6}: {len(results)} tests; {said or 'ok'}", flush=True)
    sys.exit(wrong != 0)


if __name__ == "__main__":
    main()
