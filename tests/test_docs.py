"""Documentation says what is there: names exist, figures are the ones the library gives, commands are real."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastexit
from fastexit.jit import declare
from real_kvm import kvm

ROOT = Path(__file__).parents[1]


def _names() -> list[str]:
    return re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "kvm-map.md").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("name", _names())
def test_kvm_map_names_exist(name: str) -> None:
    """Every function on the left of docs/kvm-map.md can be imported."""
    path = name if name.startswith("fastexit.") else f"fastexit.kernels.{name}"
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return
    pytest.fail(f"{path} cannot be imported")


@pytest.mark.skipif(not declare.JIT, reason="replays a whole trace; interpreted that takes minutes")
def test_figures_are_generated() -> None:
    """docs/generate.py would write what is there."""
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


MODEL, BATCH, REAL, LAB = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@kvm
def test_readme_shows_the_real_thing() -> None:
    scope: dict = {"fx": fastexit}
    exec(REAL, scope)
    model, real = scope["model"], scope["real"]
    assert (len(model.vcpus), len(real.vcpus), model.vcpus[2].vcpu_id) == (3, 3, 300)


def test_readme_shows_the_lab() -> None:
    """Its names are there; tests/test_lab.py boots kernels."""
    compile(LAB, "README.md", "exec")
    for name in re.findall(r"fx\.kvm\.(\w+)", LAB):
        assert callable(getattr(fastexit.kvm, name))


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The first Python block of README does what its comments say."""
    lines, values = MODEL.splitlines(), {}
    for number, line in enumerate(lines):
        code, _, comment = line.partition("  # ")
        if code.rstrip() and comment.lstrip()[:1] in ("F", "2"):  # an expression whose value the comment shows
            values[number] = f"shown.append(({code.strip()}))"
    scope: dict = {"shown": []}
    exec("\n".join(values.get(number, line) for number, line in enumerate(lines)), scope)
    (path, completion, accepted), vector = scope["shown"]
    assert (path.name, completion.name, accepted, vector) == ("FAST", "REENTER_GUEST", 1, 253)
    assert "kvm_apic_ipi: dst 0 vec 65 (Fixed|physical|de-assert|edge|all-but-self)" in capsys.readouterr().out


def test_readme_batch_runs() -> None:
    """The second one gives the outcomes and the cycles that it names."""
    scope: dict = {"fx": fastexit}
    exec(BATCH, scope)
    ipi = scope["ipi"]
    assert (ipi.outcomes["path"] == fastexit.Path.FAST).all()
    assert (ipi.outcomes["accepted"] == 1).all()
    said = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:cycles )?until", BATCH)]
    assert [set(ipi.cycles_ipi), set(ipi.cycles)] == [{n} for n in said]


PAGES = [
    *sorted((ROOT / "docs").glob("for-*.md")),
    ROOT / "docs" / "irqchip.md",
    *(ROOT / "docs" / name for name in ("apic-protocol.md", "lenient.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_for_readers_run(page: Path) -> None:
    """Every Python block of a page for one kind of reader, or of the irqchip's, runs as it stands, from the start."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_event_loop_is_its_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The page shows the example, whose IPIs go round and whose timers tick."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "event-loop.md").read_text(), flags=re.DOTALL)
    assert (ROOT / "examples" / "event_loop.py").read_text().split('"""\n\n', 1)[1] == block
    assert len([line for line in block.splitlines() if line]) <= 40
    scope: dict = {}
    exec(block, scope)
    ticks = [(vcpu, ns) for ns, vcpu, vector in scope["taken"] if vector == scope["TICK"]]
    assert sorted(vcpu for vcpu, _ in ticks) == [vcpu for vcpu in range(16) for _ in range(3)]
    path = [vcpu for _, vcpu, vector in scope["taken"] if vector == scope["IPI"]]
    assert path == [(1 + hop) % 16 for hop in range(len(path))]
    assert len(path) > 500
    assert "48 ticks" in capsys.readouterr().out


def test_make_targets_exist() -> None:
    """Every `make TARGET` that README names is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([a-z][a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def of_an_index(text: str) -> list[str]:
    """Words that make pip fetch fastexit by its name, which anyone may take as long as no index has it."""
    words = [word for line in re.findall(r"pip3? install([^\n`#]*)", text) for word in line.split()]
    return [word for word in words if re.match(r"[\"'(]*fastexit\b", word)] + re.findall(r"(?<![\w/])fastexit\[", text)


def test_nobody_is_sent_to_an_index_for_fastexit() -> None:
    """It is installed from a path: docs, error messages and examples name no package that is not ours."""
    places = ["src", "docs", "examples", "native", "benchmarks", ".ci"]
    files = [
        path for place in places for path in (ROOT / place).rglob("*") if path.suffix in (".py", ".md", ".c", ".h")
    ]
    files += [*ROOT.glob("*.md"), ROOT / "Makefile"]
    assert {path.name: found for path in files if (found := of_an_index(path.read_text()))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install 'fastexit[plot]'", 2),
        ("pip install fastexit", 1),
        ("pip install -U fastexit==0.1", 1),
        ("the extra fastexit[sim]", 1),
        ("pip install '/path/to/fastexit[sim]'", 0),
        ("pip install . # fastexit", 0),
        ("pip install matplotlib", 0),
    ],
)
def test_an_index_is_seen(text: str, found: int) -> None:
    assert len(of_an_index(text)) == found
