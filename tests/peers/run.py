"""Runs the hosts' own test suites with the plugin attached to every model they handle.

learn2learn installs its tests beside itself (the top-level package ``tests``). higher ships none
in its releases: give a checkout of it with ``--higher DIR`` to run those as well.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

# Tests that compare what attaching is meant to change.
EXPECTED = {"testSameInitialWeightsPostPatch": "compares names; attached weights end in _orig"}


def suite(target: list[str], folder: Path, plugin: bool, path: list[str]) -> tuple[set[str], str]:
    """Outcome of a suite: the tests that did not pass, and pytest's closing lines."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *target]
    command += ["--rootdir", str(folder), "-c", os.devnull, "-W", "ignore"]
    if plugin:
        command += ["-p", "attach_everywhere"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*path, str(Path(__file__).parent)]),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failed = set(re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE))
    words = ("passed", "failed", "error", "attached")
    closing = [line for line in done.stdout.splitlines()[-6:] if any(w in line for w in words)]
    return failed, "; ".join(closing)


def learn2learn_tests() -> tuple[list[str], Path]:
    """The unit tests that need no download, as learn2learn installed them."""
    files = metadata.files("learn2learn") or []
    tests = [f for f in files if re.fullmatch(r"tests/unit/.*_test\.py", str(f))]
    folder = Path(str(tests[0].locate())).parents[len(tests[0].parts) - 1]
    return [str(f) for f in tests], folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--higher",
        type=Path,
        help="a checkout of higher (its tests need the package parameterized)",
    )
    options = parser.parse_args()
    suites = {"learn2learn": (*learn2learn_tests(), [])}
    if options.higher:
        suites["higher"] = (["tests"], options.higher, [str(options.higher)])
    worse = False
    for name, (target, folder, path) in suites.items():
        before, plain = suite(target, folder, plugin=False, path=path)
        after, attached = suite(target, folder, plugin=True, path=path)
        print(f"{name} without the plugin: {plain}")
        print(f"{name} with the plugin:    {attached}")
        for test in sorted(after - before):
            again, _ = suite([test], folder, plugin=True, path=path)
            reason = EXPECTED.get(test.rpartition("::")[2], "" if again else "flaky, passes again")
            print(f"  fails only with the plugin: {test} {reason and f'({reason})'}")
            worse |= not reason
    return int(worse)


if __name__ == "__main__":
    raise SystemExit(main())
