"""Every benchmark of a CPU, one after the other: `python -m benchmarks [NAME …] [--out=runs/benchmarks]`, meant for under 10 minutes.

Each runs in a process of its own, prints its table, and writes OUT/NAME.json (and PNG); this prints which bars were met.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time

from benchmarks.timing import OUT

NAMES = ("layer", "model", "length", "scaling", "decode", "trainer", "loader")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="those to run; none: all")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    missed, began = [], time.monotonic()
    for name in options.names or NAMES:
        start = time.monotonic()
        if code := subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", f"--out={options.out}"]
        ).returncode:
            return code
        print(f"  {name}: {time.monotonic() - start:.0f} s", flush=True)
        found = json.loads((options.out / f"{name}.json").read_text())
        missed += [f"{name}: {row}" for row in found["rows"] if row.get("met") is False]
        missed += [f"{name}: {found['growth']}"] if found.get("met") is False else []
    print(
        f"{time.monotonic() - began:.0f} s; {'bars missed:' if missed else 'every bar was met'}",
        *missed,
        sep="\n  ",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
