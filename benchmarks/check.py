"""``make bench-check``: one line for each bar that the last run missed or did not measure; exit status 1 if any.

Rows that need a C compiler are excused where there is none, which is said in one line.
"""

from __future__ import annotations

import json
import sys

from bars import BARS, RESULTS, excused, unmeasured


def missed(content: dict) -> list[str]:
    """One line for each value that misses its bar, and for each case that has none and no excuse."""
    lines = []
    for entry in content["values"]:
        bar = BARS[entry["row"]]
        if bar.misses(entry["value"]):
            limit = f"at {'most' if bar.most else 'least'} {bar.bar:,g}"
            lines.append(f"row {entry['row']}, {entry['case']}: {entry['value']:,.4g} {bar.unit}, {limit}: {bar.what}")
    return lines + [f"row {row}, {case}: not measured" for row, case in unmeasured(content)]


def main() -> int:
    """Exit status."""
    if not RESULTS.exists():
        print("no results of a whole run: run make bench first", file=sys.stderr)
        return 1
    content = json.loads(RESULTS.read_text())
    lines = missed(content)
    if rows := excused(content):
        print(f"rows {', '.join(rows)}: not measured, {'; '.join(sorted(set(rows.values())))}")
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
