"""``make bench-check``: one line for each bar that the last run missed; exit status 1 if there is any."""

from __future__ import annotations

import json
import sys

from bars import BARS, RESULTS


def missed(values: list[dict]) -> list[str]:
    """One line for each value that misses its bar, and for each row that has none."""
    lines = []
    for entry in values:
        bar = BARS[entry["row"]]
        if bar.misses(entry["value"]):
            limit = f"at {'most' if bar.most else 'least'} {bar.bar:,g}"
            lines.append(f"row {entry['row']}, {entry['case']}: {entry['value']:,.4g} {bar.unit}, {limit}: {bar.what}")
    return lines


def main() -> int:
    """Exit status."""
    if not RESULTS.exists():
        print("no results: run make bench first", file=sys.stderr)
        return 1
    content = json.loads(RESULTS.read_text())
    lines = missed(content["values"])
    for line in content["skipped"]:
        print(f"skipped, {line}")
    seen = {entry["row"] for entry in content["values"]}
    excused = {row.split()[0] for line in content["skipped"] for row in line[4:].partition(":")[0].split(", ")}
    lines += [f"row {row}: not measured" for row in BARS if row not in seen and row.split()[0] not in excused]
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
