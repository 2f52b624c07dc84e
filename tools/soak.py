"""`make soak`: what takes as long as it takes, again and again; the result in results/soak.json.

python tools/soak.py [--repeats 1]: tests marked `soak` (a thousand kills; FEDVPA_KILLS says how
many of each command), the slow tests that kill or stop, and the property tests with many more
examples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUITES = {
    "a thousand kills": ["-n", "2", "-m", "soak", "tests"],
    "kills in the middle": ["-m", "slow", "-k", "kill or stopped or survives", "tests"],
    "fuzzing": ["tests/property", "tests/corpus"],
}


def main() -> int:
    """Run all suites; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=1, help="how often (default: 1)")
    repeats = parser.parse_args().repeats
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    rows = [
        {"repeat": repeat, "suite": name} | run(arguments)
        for repeat in range(repeats)
        for name, arguments in SUITES.items()
    ]
    result = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit, "python": platform.python_version(),
        "cores": os.cpu_count(), "runs": rows,
    }  # fmt: skip
    (ROOT / "results" / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(any(row["failed"] for row in rows))


def run(arguments: list[str]) -> dict[str, object]:
    """One run of pytest: how many tests, which failed, seconds."""
    report = ROOT / "build" / "soak.xml"
    report.parent.mkdir(exist_ok=True)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, f"--junit-xml={report}"],
        cwd=ROOT, env=os.environ | {"HYPOTHESIS_PROFILE": "soak"},
    )  # fmt: skip
    cases = ElementTree.parse(report).getroot().iter("testcase")
    names = {case.get("name", ""): case for case in cases}
    broken = [
        n for n, c in names.items() if c.find("failure") is not None or c.find("error") is not None
    ]
    return {
        "tests": len(names), "failed": broken, "seconds": round(time.perf_counter() - started),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
