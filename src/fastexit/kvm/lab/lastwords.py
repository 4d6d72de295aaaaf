"""What an emulated machine said last: a line for whoever asks, and all of it where its kernel crashed.

Models: nothing.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fastexit.kvm.lab.kernels import directory

KEPT = "last-console"
"""File beside the kernels: the console of the last machine whose kernel crashed."""
_STAMP = re.compile(r"^\[ *\d+\.\d+\] ?")
_ESCAPES = re.compile(r"\x1b(\[[0-9;?=]*[A-Za-z]|c)")
"""The firmware clears its screen in front of the first line."""
_TELLING = re.compile(r"Kernel panic|>>PANIC<<|fastexit-init:|BUG:|Oops|unable to|Out of memory")


def last_words(console: Path, *others: Path) -> str:
    """One line of the kernel's console, or of what the emulator wrote; "" where nothing was said.

    The first that tells of a crash, the console's before all; else the last of the last of these files. A kernel that
    crashed has registers and a call trace to tell as well: its console is kept, and the line says where.
    """
    said = [_lines(path) for path in (console, *others)]
    for path, lines in zip((console, *others), said, strict=True):
        for line in lines:
            if _TELLING.search(line):
                return f"{line}{_kept(console) if path == console else ''}"
    return next((lines[-1] for lines in reversed(said) if lines), "")


def _kept(console: Path) -> str:
    kept = directory() / KEPT
    try:
        shutil.copyfile(console, kept)
    except OSError:
        return ""
    return f" (all of it: {kept})"


def _lines(path: Path) -> list[str]:
    try:
        said = _ESCAPES.sub("", path.read_text(errors="replace")).splitlines()
    except OSError:
        return []
    return [line for line in (_STAMP.sub("", line).strip() for line in said) if line]
