#!/usr/bin/env python3
"""Runs the workspace's test binaries, two at a time, the longest first; those that measure run alone at the end.

Cargo runs them one after the other, and most of them wait for servers for most of their time. Each prints one line
when it has ended, and all of its output if one of its tests failed.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 2
# For all. What still runs then is printed with what it has said, which names tests that run for over a minute.
LIMIT_SECONDS = 30 * 60
# They take minutes, so they begin first.
LONG = ["barid-e2e e2e", "barid-purger purger", "barid-mailbox contract", "barid-access node"]
# They compare CPU times, memory or latencies with bounds, or use the usual ports: one by one, at the end.
ALONE = ["barid-e2e figures", "barid-loadtest bench", "barid dev"]


@dataclass
class Test:
    name: str
    executable: Path
    package: Path
    said: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None
    code: int | None = None
    seconds: float = 0.0


def tests() -> list[Test]:
    """The workspace's test binaries, built if need be."""
    command = ["cargo", "test", "--locked", "--workspace", "--no-run", "--message-format", "json-render-diagnostics"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found = []
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("reason") == "compiler-artifact" and message["profile"]["test"] and message["executable"]:
            name = f"{package_name(message['package_id'])} {message['target']['name']}"
            found.append(Test(name, Path(message["executable"]), Path(message["manifest_path"]).parent))
    unknown = {*LONG, *ALONE} - {test.name for test in found}
    if unknown:
        sys.exit(f"run_tests.py: no test binary is named {', '.join(sorted(unknown))}")
    return found


def package_name(package_id: str) -> str:
    """path+file:///x/crates/access#barid-access@0.1.0, or …/barid#0.1.0 where the folder has the package's name."""
    path, _, version = package_id.partition("#")
    return version.split("@")[0] if "@" in version else path.rsplit("/", 1)[1]


def run(test: Test, printing: threading.Lock) -> None:
    begun = time.monotonic()
    # A group of its own, so that what it has started can be ended with it.
    test.process = subprocess.Popen(
        [test.executable], cwd=test.package, env={**os.environ, "CARGO_MANIFEST_DIR": str(test.package)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )
    reading = threading.Thread(target=lambda: test.said.extend(test.process.stdout), daemon=True)
    reading.start()
    test.code = test.process.wait()
    # What it left running may hold the pipe open.
    reading.join(timeout=5)
    end_group(test.process)
    test.seconds = time.monotonic() - begun
    results = [line for line in test.said if line.startswith("test result:")]
    summary = results[-1].removeprefix("test result: ").strip() if results else f"ended with {test.code}"
    with printing:
        if test.code != 0:
            print_output(test, "failed")
        print(f"{test.name:<32} {test.seconds:4.0f} s  {summary}", flush=True)


def end_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def print_output(test: Test, why: str) -> None:
    print(f"\n==== {test.name} {why}; its output:\n{''.join(test.said)}\n==== end of {test.name}", flush=True)


def give_up(running: list[Test], why: str) -> None:
    for test in running:
        if test.process and test.code is None:
            print_output(test, why)
            end_group(test.process)
    os._exit(1)


def main() -> int:
    found = tests()
    printing = threading.Lock()
    watch = threading.Timer(LIMIT_SECONDS, give_up, [found, f"did not end within {LIMIT_SECONDS} s of the start"])
    watch.daemon = True
    watch.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: give_up(found, "was interrupted"))
    beside = [test for test in found if test.name not in ALONE]
    beside.sort(key=lambda test: LONG.index(test.name) if test.name in LONG else len(LONG))
    alone = [test for test in found if test.name in ALONE]
    for group, at_once in ((beside, AT_ONCE), (alone, 1)):
        with ThreadPoolExecutor(at_once) as pool:
            # The results, so that an error of this script is one.
            list(pool.map(lambda test: run(test, printing), group))
    failed = [test.name for test in found if test.code != 0]
    print(f"{len(found)} test binaries, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
