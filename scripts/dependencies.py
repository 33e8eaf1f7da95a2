#!/usr/bin/env python3
"""Checks the locked dependencies: vulnerabilities, licences, sources, and crates that deny.toml bans.

  dependencies.py                exit 1 if something is wrong
  dependencies.py --lock FILE    only the vulnerabilities of another Cargo.lock
  dependencies.py --update DIR   write advisories.jsonl anew from a checkout of https://github.com/rustsec/advisory-db

It takes the allowed licences, the bans, the targets and the ignored advisories from deny.toml, and is for machines that
have no cargo-deny or cannot fetch RustSec's database.
advisories.jsonl is that database as of the date in its first line; after 180 days this warns. RustSec's data is in the
public domain (CC0 1.0); entries adapted from GitHub's advisory database (CC BY 4.0) have their source as `url`, as that
licence asks.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "scripts" / "advisories.jsonl"
AGE_MAX_DAYS = 180
REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"

Version = tuple[tuple[int, int, int], tuple]


def version(text: str) -> Version:
    """A SemVer version that compares as SemVer 2.0.0, 11 says; what is left out is 0."""
    match = re.fullmatch(r"v?(\d+)(?:\.(\d+|\*))?(?:\.(\d+|\*))?(?:-([0-9A-Za-z.-]+))?(?:\+.*)?", text.strip())
    if not match:
        raise ValueError(f"no version: {text!r}")
    numbers = tuple(int(part) if part and part != "*" else 0 for part in match.group(1, 2, 3))
    if match.group(4) is None:
        return numbers, ((2,),)
    rank = tuple((0, int(part)) if part.isdigit() else (1, part) for part in match.group(4).split("."))
    return numbers, rank


def caret_end(numbers: tuple[int, int, int]) -> tuple[int, int, int]:
    """The first version that `^` excludes."""
    major, minor, patch = numbers
    if major:
        return major + 1, 0, 0
    return (0, minor + 1, 0) if minor else (0, 0, patch + 1)


def meets_one(comparator: str, have: Version) -> bool:
    match = re.fullmatch(r"(>=|<=|>|<|=|\^|~)?\s*(\S+)", comparator.strip())
    if not match:
        raise ValueError(f"no comparator: {comparator!r}")
    sign, want = match.group(1) or "^", version(match.group(2))
    if sign in (">", "<=", "=") and match.group(2).split("-")[0].count(".") < 2:
        # Cargo would mean all of 1.2.x by 1.2.
        raise ValueError(f"an incomplete version: {comparator!r}")
    match sign:
        case ">=":
            return have >= want
        case ">":
            return have > want
        case "<=":
            return have <= want
        case "<":
            return have < want
        case "=":
            return have == want
        case "~":
            return have >= want and have[0] < (want[0][0], want[0][1] + 1, 0)
        case _:
            return have >= want and have[0] < caret_end(want[0])


def meets(requirement: str, have: Version) -> bool:
    """Whether Cargo's requirement admits the version.

    >>> [meets(">= 1.2, < 2", version(have)) for have in ("1.1.9", "1.2.0", "2.0.0")]
    [False, True, False]
    >>> [meets("^0.3.2", version(have)) for have in ("0.3.1", "0.3.9", "0.4.0")]
    [False, True, False]
    >>> [meets("~1.4", version(have)) for have in ("1.4.7", "1.5.0")]
    [True, False]
    >>> [meets(">= 1.0.0-rc.2", version(have)) for have in ("1.0.0-rc.1", "1.0.0-rc.10", "1.0.0")]
    [False, True, True]
    """
    return requirement.strip() == "*" or all(meets_one(part, have) for part in requirement.split(","))


def affects(advisory: dict, have: str) -> bool:
    fine = advisory["patched"] + advisory["unaffected"]
    return not any(meets(requirement, version(have)) for requirement in fine)


def read_advisory(text: str) -> dict | None:
    """What is needed of an advisory's page; None if it was withdrawn."""
    head, _, rest = text.partition("```toml\n")[2].partition("```")
    data = tomllib.loads(head)
    about, versions = data["advisory"], data.get("versions", {})
    if "withdrawn" in about:
        return None
    title = re.search(r"^# (.+)$", rest, re.M)
    return {
        "id": about["id"],
        "package": about["package"],
        "title": title.group(1).strip() if title else "",
        "patched": versions.get("patched", []),
        "unaffected": versions.get("unaffected", []),
        "informational": about.get("informational", ""),
        "url": about.get("url", f"https://rustsec.org/advisories/{about['id']}"),
    }


def update(checkout: Path) -> int:
    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    names = [name for name in git("ls-tree", "-r", "--name-only", "HEAD", "crates").splitlines() if name.endswith(".md")]
    found = [read_advisory(git("show", f"HEAD:{name}")) for name in names]
    kept = sorted((one for one in found if one), key=lambda one: (one["package"], one["id"]))
    about = {
        "source": "https://github.com/rustsec/advisory-db",
        "commit": git("rev-parse", "HEAD").strip(),
        "date": git("log", "-1", "--format=%cs").strip(),
    }
    DATA.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [about, *kept]))
    print(f"{len(kept)} advisories of {about['date']}")
    return 0


def licensed(expression: str, allowed: set[str]) -> bool:
    """Whether an SPDX expression can be met with the allowed terms.

    >>> licensed("MIT/Apache-2.0", {"MIT"}), licensed("(MIT OR GPL-3.0) AND Zlib", {"MIT"})
    (True, False)
    >>> licensed("Apache-2.0 WITH LLVM-exception OR GPL-3.0", {"Apache-2.0"})
    False
    """
    words = re.findall(r"[()]|[^\s()]+(?:\s+WITH\s+[^\s()]+)?", expression.replace("/", " OR "))
    means = {"(": "(", ")": ")", "AND": "and", "OR": "or"}
    # Only brackets, `and`, `or`, True and False are left.
    return eval(" ".join(means.get(word, str(" ".join(word.split()) in allowed)) for word in words))


def vulnerabilities(lock: Path, deny: dict) -> list[str]:
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    about, advisories = rows[0], rows[1:]
    ignored = {entry["id"] if isinstance(entry, dict) else entry for entry in deny["advisories"]["ignore"]}
    by_name: dict[str, list[str]] = {}
    for package in tomllib.loads(lock.read_text())["package"]:
        if "source" in package:
            by_name.setdefault(package["name"], []).append(package["version"])
    found = []
    for advisory in advisories:
        for have in by_name.get(advisory["package"], []):
            if not affects(advisory, have):
                continue
            text = f"{advisory['id']}: {advisory['package']} {have}: {advisory['title']} ({advisory['url']})"
            # Unmaintained, unsound or only notable: told, as cargo-audit does.
            if advisory["informational"] or advisory["id"] in ignored:
                print(f"note: {advisory['informational'] or 'ignored'}: {text}")
            else:
                found.append(f"vulnerability {text}")
    age = (datetime.date.today() - datetime.date.fromisoformat(about["date"])).days
    if age > AGE_MAX_DAYS:
        print(f"warning: the advisories are {age} days old; renew them with --update", file=sys.stderr)
    print(f"{sum(map(len, by_name.values()))} locked crates, {len(advisories)} advisories of {about['date']}")
    return found


def policies(deny: dict) -> set[str]:
    """Violations of the rules about licences, sources and bans, for each target."""
    return {problem for target in deny["graph"]["targets"] for problem in policies_of(target, deny)}


def policies_of(target: str, deny: dict) -> list[str]:
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target]
    metadata = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
    used = {node["id"] for node in metadata["resolve"]["nodes"]}
    packages = {package["id"]: package for package in metadata["packages"] if package["id"] in used}
    allowed = set(deny["licenses"]["allow"])
    found = []
    for package in packages.values():
        name = f"{package['name']} {package['version']}"
        if package["source"] not in (None, REGISTRY):
            found.append(f"source of {name}: {package['source']}")
        if not licensed(package["license"] or "none", allowed):
            found.append(f"licence of {name}: {package['license']}")
    bans = {ban["crate"]: ban.get("wrappers", []) for ban in deny["bans"]["deny"]}
    for node in metadata["resolve"]["nodes"]:
        user = packages[node["id"]]["name"]
        for used in (packages[needed]["name"] for needed in node["dependencies"]):
            if used in bans and user not in bans[used]:
                found.append(f"banned crate {used}, used by {user}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lock", type=Path, metavar="FILE")
    parser.add_argument("--update", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.update:
        return update(args.update)
    deny = tomllib.loads((ROOT / "deny.toml").read_text())
    found = vulnerabilities(args.lock or ROOT / "Cargo.lock", deny)
    if not args.lock:
        found += policies(deny)
    for problem in sorted(found):
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
