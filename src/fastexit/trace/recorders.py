"""The binary files of trace-cmd and perf, made text by those two themselves.

Their formats are theirs: fields, byte orders and plugins that name KVM's exit reasons come from the kernel that
recorded. They are run without a shell, and told the file by a path that cannot be taken for an option.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from typing import IO, NamedTuple

MOST_TIMES = 200
"""Text that is longer than the binary file by more than this is no trace's; real ones reach a tenth of it."""
FREE_BYTES = 1 << 30
"""So much text is taken before that is asked."""

_BLOCK = 1 << 20


class Recorder(NamedTuple):
    """A tool that records in its own format: how the file begins, and the commands that print it, best first."""

    tool: str
    what: str
    package: str
    begins: tuple[bytes, ...]
    commands: tuple[tuple[str, ...], ...]

    @property
    def by_hand(self) -> str:
        """The command that a user runs elsewhere."""
        return {"trace-cmd": "trace-cmd report FILE", "perf": "perf script -i FILE"}[self.tool]


RECORDERS = (
    Recorder("trace-cmd", "a binary trace-cmd file", "trace-cmd", (b"\x17\x08D",), (("report", "-t", "-i"),)),
    Recorder(
        "perf",
        "a binary perf file",
        "linux-perf",
        (b"PERFILE2", b"PERFFILE"),
        (
            ("--no-pager", "script", "-f", "--ns", "-F", "comm,pid,tid,cpu,time,event,trace", "-i"),
            ("--no-pager", "script", "-f", "--ns", "-i"),
        ),
    ),
)


def recorder(magic: bytes) -> Recorder | None:
    """The tool whose file begins so."""
    return next((entry for entry in RECORDERS if magic.startswith(entry.begins)), None)


def printed(entry: Recorder, file: IO[bytes], size: int) -> IO[bytes]:
    """The text of a binary file, in a file without a name.

    LookupError, one line, where the tool is not installed or cannot read the file; the message says what to do.
    """
    path = shutil.which(entry.tool)
    if path is None:
        raise LookupError(
            f"{entry.what}, and {entry.tool} is not installed: install {entry.package}, or run "
            f"`{entry.by_hand} > trace.txt` where it was recorded and pass that"
        )
    said = ""
    for arguments in entry.commands:
        text, said = _run([path, *arguments, f"/dev/fd/{file.fileno()}"], file.fileno(), FREE_BYTES + MOST_TIMES * size)
        if text is not None:
            return text
    raise LookupError(f"{entry.what} that `{entry.by_hand}` cannot read: {said}")


def _run(command: list[str], fd: int, most: int) -> tuple[IO[bytes] | None, str]:
    """What a command prints, and None with what it says where it fails."""
    text = tempfile.TemporaryFile()
    with tempfile.TemporaryFile() as errors:
        environment = {**os.environ, "LC_ALL": "C"}
        os.lseek(fd, 0, os.SEEK_SET)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, pass_fds=(fd,), env=environment
        )
        assert process.stdout is not None
        with process.stdout as pipe:
            while block := pipe.read(_BLOCK):
                text.write(block)
                if text.tell() > most:
                    process.kill()
                    process.wait()
                    text.close()
                    return None, f"it printed more than {most:,} bytes"
        if process.wait() == 0 and text.tell():
            text.seek(0)
            return text, ""
        errors.seek(0)
        said = errors.read(1 << 12).decode("utf-8", "replace").split("\n")
    text.close()
    first = next((line.strip() for line in said if line.strip()), f"it ended with code {process.returncode}")
    return None, "".join(letter if letter.isprintable() else "?" for letter in first[:200])
