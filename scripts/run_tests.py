#!/usr/bin/env python3
"""Runs the workspace's test binaries, two at a time, the longest first; what measures runs by itself at the end.

Cargo runs them one after the other, and most of them wait for servers for most of their time. A binary's output is
printed when it has ended, if a test of it failed; the rest is one line each.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 2
# For one binary. A test that hangs is named in its output, as running for over 60 seconds.
LIMIT_SECONDS = 25 * 60
# What takes minutes, so that it does not begin last. The order is all that depends on it.
LONG = ["barid-e2e e2e", "barid-access node", "barid-e2e model", "barid-mailbox redis", "barid-purger pipeline"]
# What compares CPU times, memory or latencies with bounds, or uses the usual ports.
ALONE = ["barid-e2e figures", "barid dev"]


def binaries() -> list[tuple[str, Path, Path]]:
    """Name, executable and package directory of each test binary. Builds what is not built."""
    command = ["cargo", "test", "--locked", "--workspace", "--no-run", "--message-format", "json-render-diagnostics"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found = []
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("reason") == "compiler-artifact" and message["profile"]["test"] and message["executable"]:
            package = Path(message["manifest_path"]).parent
            name = f"{package_name(message['package_id'])} {message['target']['name']}"
            found.append((name, Path(message["executable"]), package))
    return found


def package_name(package_id: str) -> str:
    """path+file:///x/crates/access#barid-access@0.1.0, or …/barid#0.1.0 where the folder has the package's name."""
    path, _, version = package_id.partition("#")
    return version.split("@")[0] if "@" in version else path.rsplit("/", 1)[1]


class Runner:
    def __init__(self, waiting: list[tuple[str, Path, Path]]):
        self.waiting = waiting
        self.lock = threading.Lock()
        self.failed: list[str] = []

    def work(self) -> None:
        while True:
            with self.lock:
                if not self.waiting:
                    return
                test = self.waiting.pop(0)
            self.run(*test)

    def run(self, name: str, executable: Path, package: Path) -> None:
        begun = time.monotonic()
        environment = {**os.environ, "CARGO_MANIFEST_DIR": str(package)}
        process = subprocess.Popen(
            [executable], cwd=package, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )
        timer = threading.Timer(LIMIT_SECONDS, process.kill)
        timer.start()
        output = process.stdout.read()
        code = process.wait()
        timer.cancel()
        took = time.monotonic() - begun
        results = [line for line in output.splitlines() if line.startswith("test result:")]
        summary = results[-1].removeprefix("test result: ") if results else f"ended with {code}"
        with self.lock:
            if code != 0:
                self.failed.append(name)
                print(f"\n==== {name} failed; its output:\n{output}\n==== end of {name}", flush=True)
            print(f"{name:<32} {took:4.0f} s  {summary}", flush=True)


def main() -> int:
    tests = binaries()
    alone = [test for test in tests if test[0] in ALONE]
    beside = [test for test in tests if test[0] not in ALONE]
    beside.sort(key=lambda test: LONG.index(test[0]) if test[0] in LONG else len(LONG))
    failed = []
    for group, at_once in ((beside, AT_ONCE), (alone, 1)):
        runner = Runner(list(group))
        workers = [threading.Thread(target=runner.work) for _ in range(at_once)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        failed += runner.failed
    print(f"{len(tests)} test binaries, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
