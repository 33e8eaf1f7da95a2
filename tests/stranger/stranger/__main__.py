"""Drives a real Barid cluster through faults and says which promises it kept.

python -m stranger                 everything (half an hour)
python -m stranger --short         a chosen part, at most four minutes
python -m stranger --only NAME     one scenario, or several with commas between
python -m stranger check DIR       reads the traces of a run again
"""

import argparse
import asyncio
import dataclasses
import fcntl
import functools
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from .checker import RULES, check_directory
from .cluster import BINARIES, ROLES, TARGET, Kafka
from .scenarios import SCENARIOS, Scenario
from .selftest import MUTANTS, selftest
from .world import World

HERE = Path(__file__).resolve().parents[1]
OUT = TARGET / "stranger"
# Of the table: heading and width.
COLUMNS = (
    ("scenario", 18),
    ("sent", 5),
    ("shown", 6),
    ("lost", 5),
    ("rep.", 5),
    ("reord.", 6),
    ("stuck", 5),
    ("closes", 6),
    ("s", 4),
)


def say(name: str, text: str) -> None:
    print(f"  {name}: {text}"[:79], flush=True)


def options():
    parser = argparse.ArgumentParser(prog="stranger", description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=("run", "check", "selftest"), default="run")
    parser.add_argument("directory", nargs="?", type=Path, help="of check: target/stranger/NAME")
    parser.add_argument("--list", action="store_true", help="name the scenarios and what they do")
    parser.add_argument("--only", metavar="NAMES", help="scenarios, with commas between")
    parser.add_argument("--short", action="store_true", help="the scenarios marked * in --list")
    parser.add_argument("--seed", type=int, default=1, help="of the load and the faults (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="scenarios at once; those that stop Kafka run alone")
    parser.add_argument("--quiet", action="store_true", help="one line a scenario")
    return parser.parse_args()


def chosen(o) -> list[Scenario]:
    if o.only:
        names = o.only.split(",")
        unknown = [n for n in names if n not in SCENARIOS]
        if unknown:
            raise SystemExit(f"no scenario {', '.join(unknown)}; --list names them")
        return [SCENARIOS[n] for n in names]
    return [s for s in SCENARIOS.values() if s.short or not o.short]


async def run_one(scenario: Scenario, seed: int, kafka: Kafka, quiet: bool) -> dict:
    directory = OUT / scenario.name
    start = time.monotonic()
    tell = (lambda text: None) if quiet else functools.partial(say, scenario.name)
    world = World(scenario, seed, kafka, directory, tell)
    broken = ""
    try:
        async with asyncio.timeout(400):
            await world.start()
            await scenario.run(world)
            await world.settle()
    except Exception as error:  # a scenario that cannot be run is a failure like another, and the next one runs
        broken = f"{type(error).__name__}: {error}"
    finally:
        await world.stop()
        if scenario.alone:
            kafka.proxy.set_hold()
            kafka.process.signal(signal.SIGCONT)
            if not kafka.process.alive():
                await kafka.restart()
    expected = dataclasses.replace(scenario.expected, retry_base_ms=scenario.retry_base_ms)
    (directory / "expected.json").write_text(json.dumps(dataclasses.asdict(expected)))
    verdict = check_directory(directory)
    if broken:
        verdict.found.setdefault("vacuous", []).append(broken)
    row = {
        "scenario": scenario.name,
        "about": scenario.about,
        "seed": seed,
        "messages": verdict.messages,
        "shown": verdict.shown,
        "sent_again": verdict.again,
        "closes": verdict.closes,
        **{rule: verdict.count(rule) for rule in RULES},
        "median_s": round(verdict.median_s, 3),
        "slowest_s": round(verdict.slowest_s, 1),
        "seconds": round(time.monotonic() - start),
        "verdict": "kept" if verdict.kept else "broken: " + ", ".join(sorted(verdict.found)),
    }
    # What was shown again behind an ack is a repeat to whoever counts them.
    row["repeated"] += row.pop("acked")
    (directory / "verdict.json").write_text(json.dumps({**row, "found": verdict.found}, indent=1))
    print_row(row, verdict)
    return row


def print_row(row: dict, verdict) -> None:
    values = (
        row["scenario"],
        row["messages"],
        row["shown"],
        row["lost"],
        row["repeated"],
        row["reordered"],
        row["stuck"],
        row["closes"],
        row["seconds"],
    )
    print(
        " ".join(str(v).ljust(w) if i == 0 else str(v).rjust(w) for i, (v, (_, w)) in enumerate(zip(values, COLUMNS)))
        + ("  ok" if verdict.kept else "  FAILED"),
        flush=True,
    )
    for rule, found in sorted(verdict.found.items()):
        print(f"  {rule}: {RULES[rule]}", flush=True)
        for line in found[:3]:
            print(textwrap.fill(line, 78, initial_indent="    ", subsequent_indent="      "), flush=True)
        if len(found) > 3:
            print(f"    and {len(found) - 3} more: target/stranger/{row['scenario']}/verdict.json", flush=True)


def write_tables(rows: list[dict]) -> None:
    (OUT / "outcomes.json").write_text(json.dumps(rows, indent=1) + "\n")
    head = (
        "scenario",
        "what is done",
        "seed",
        "messages",
        "shown",
        "lost",
        "repeated",
        "reordered",
        "stuck",
        "closes",
        "s",
        "verdict",
    )
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * 9 + "---|"]
    for r in rows:
        cells = (
            f"`{r['scenario']}`",
            r["about"],
            r["seed"],
            r["messages"],
            r["shown"],
            r["lost"],
            r["repeated"],
            r["reordered"],
            r["stuck"],
            r["closes"],
            r["seconds"],
            r["verdict"],
        )
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    (OUT / "outcomes.md").write_text("\n".join(lines) + "\n")


def build_clock() -> None:
    command = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", OUT / "clock.so", HERE / "clock.c"]
    subprocess.run(command, check=True)


async def run(o) -> int:
    scenarios = chosen(o)
    absent = [f"barid-{r}" for r in ROLES if not (BINARIES / f"barid-{r}").exists()]
    if absent:
        raise SystemExit(f"no {', '.join(absent)} in {BINARIES}: run cargo build --workspace --bins")
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"{OUT} is in use by another run") from None
        return await run_all(o, scenarios)


async def run_all(o, scenarios: list[Scenario]) -> int:
    build_clock()
    start = time.monotonic()
    kafka = Kafka(OUT / "kafka")
    rows = []
    try:
        await kafka.start()
        print(" ".join(h.ljust(w) if i == 0 else h.rjust(w) for i, (h, w) in enumerate(COLUMNS)), flush=True)
        for scenario in (s for s in scenarios if s.alone):
            rows.append(await run_one(scenario, o.seed, kafka, o.quiet))
        turns = asyncio.Semaphore(o.jobs)

        async def in_turn(scenario):
            async with turns:
                rows.append(await run_one(scenario, o.seed, kafka, o.quiet))

        await asyncio.gather(*(in_turn(s) for s in scenarios if not s.alone))
    finally:
        rows.sort(key=lambda row: list(SCENARIOS).index(row["scenario"]))
        write_tables(rows)
        await kafka.stop()
    failed = [r["scenario"] for r in rows if r["verdict"] != "kept"]
    print(f"table: {OUT / 'outcomes.md'}; traces and logs beside it, by scenario")
    for name in failed:
        print(f"again: scripts/stranger.sh --only {name} --seed {o.seed}")
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


def test_the_checker() -> int:
    wrong = selftest()
    for line in wrong:
        print(f"the checker: {line}")
    if not wrong:
        print(f"the checker names each of {len(MUTANTS)} spoilt traces by its rule")
    return 1 if wrong else 0


def main() -> int:
    o = options()
    if o.list:
        for s in SCENARIOS.values():
            print(textwrap.fill(f"{'*' if s.short else ' '} {s.name:18} {s.about}", 79, subsequent_indent=" " * 21))
        return 0
    if o.command == "check":
        verdict = check_directory(o.directory)
        for rule, found in sorted(verdict.found.items()):
            print(f"{rule}: {RULES[rule]}")
            print("".join(f"  {line}\n" for line in found), end="")
        print("kept" if verdict.kept else "broken")
        return 0 if verdict.kept else 1
    failed = test_the_checker()
    if failed or o.command == "selftest":
        return failed
    return asyncio.run(run(o))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `--list | head`
        sys.exit(1)
