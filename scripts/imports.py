#!/usr/bin/env python3
"""Draws which files of a crate import which, and finds import circles.

  imports.py                every crate: files, layers, circles
  imports.py access         one crate: its files by layer, each with what it imports
  imports.py --check        exit 1 if a crate has a circle of more than two files; of these crates, if any are named

A file imports another if it names it in a path that begins with `crate::`, `super::` or `self::`, outside of
`#[cfg(test)]`. A parent that declares a module (`mod x;`) does not import it by that.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CIRCLE_MAX = 2
# What a `use` brings in, as full paths: `a::{b, c::d}` is a::b and a::c::d.
USE = re.compile(r"^\s*(?:pub(?:\([^)]*\))?\s+)?use\s+((?:crate|super|self)\b[^;]*);", re.M)
PATH = re.compile(r"\b((?:crate|super|self)(?:::[A-Za-z_][A-Za-z0-9_]*)+)")


def expand(tree: str) -> list[list[str]]:
    """The paths of a use tree."""
    tree = re.sub(r"\s+as\s+\w+", "", tree).strip()
    if "{" not in tree:
        return [[part.strip() for part in tree.split("::")]]
    head, body = tree.split("{", 1)
    body = body.rsplit("}", 1)[0]
    parts, depth, item = [], 0, ""
    for char in body:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append(item)
            item = ""
        else:
            item += char
    prefix = [part for part in (p.strip() for p in head.split("::")) if part]
    return [prefix + rest for part in [*parts, item] if part.strip() for rest in expand(part)]


def shipped(text: str) -> str:
    """The source without comments, strings and what is compiled for tests only."""
    # In one pass: a string may contain `//`, and a comment a quote. `'"'` is a char, not the start of a string.
    text = re.sub(r"""//[^\n]*|'"'|"(?:[^"\\]|\\.)*\"""", lambda match: "" if match[0][0] == "/" else '""', text)
    while match := re.search(r"#\[cfg\(test\)\]\s*(?:pub(?:\([^)]*\))?\s+)?(?:mod\s+\w+\s*;|[^;{]*\{)", text):
        end = match.end()
        if text[end - 1] == "{":
            depth = 1
            while depth and end < len(text):
                depth += (text[end] == "{") - (text[end] == "}")
                end += 1
        text = text[: match.start()] + text[end:]
    return text


def crate_imports(source: Path) -> dict[str, set[str]]:
    """The files of a crate, each with those that it imports; a module is named by its path."""
    files = {}
    for path in sorted(source.rglob("*.rs")):
        parts = list(path.relative_to(source).with_suffix("").parts)
        if parts[-1] in ("tests", "main") or "tests" in parts:
            continue
        if parts[-1] == "mod":
            parts.pop()
        files["::".join(parts) if parts != ["lib"] else "crate"] = shipped(path.read_text())
    reexports: dict[tuple[str, str], str] = {}

    def absolute(module: str, path: list[str]) -> list[str]:
        at = [] if module == "crate" else module.split("::")
        if path[0] == "crate":
            return path[1:]
        while path and path[0] in ("super", "self"):
            if path[0] == "super":
                at = at[:-1]
            path = path[1:]
        return at + path

    def home(path: list[str]) -> str:
        """The file that defines the item, through one re-export."""
        for length in range(len(path), 0, -1):
            name = "::".join(path[:length])
            if name in files:
                item = path[length] if length < len(path) else ""
                return reexports.get((name, item), name)
        return reexports.get(("crate", path[0]), "crate") if path else "crate"

    for module, text in files.items():
        for match in re.finditer(r"pub(?:\([^)]*\))?\s+use\s+([^;]+);", text):
            for path in expand(match.group(1)):
                children = [child for child in files if child.rpartition("::")[2] == path[0]]
                own = f"{module}::{path[0]}" if module != "crate" else path[0]
                if path[0] in ("crate", "super", "self"):
                    target = absolute(module, path)
                elif own in children:
                    target = own.split("::") + path[1:]
                else:
                    continue
                for length in range(len(target), 0, -1):
                    if "::".join(target[:length]) in files:
                        reexports[module, path[-1]] = "::".join(target[:length])
                        break
    imports = {}
    for module, text in files.items():
        used = [path for match in USE.finditer(text) for path in expand(match.group(1))]
        rest = USE.sub("", text)
        used += [match.group(1).split("::") for match in PATH.finditer(rest)]
        # Items of a child that the parent names by the child's own path.
        for child in files:
            parent, _, name = child.rpartition("::")
            if (parent or "crate") == module and re.search(rf"\b(?<!mod ){name}::", rest):
                used.append(["crate", *child.split("::")])
            elif (parent or "crate") == module and re.search(rf"\buse\s+{name}::", text):
                used.append(["crate", *child.split("::")])
        imports[module] = {home(absolute(module, path)) for path in used} - {module, "crate"}
    return imports


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one file (Tarjan), largest first."""
    index, low, stack, found = {}, {}, [], []

    def visit(file: str) -> None:
        index[file] = low[file] = len(index)
        stack.append(file)
        for other in sorted(imports[file]):
            if other not in index:
                visit(other)
                low[file] = min(low[file], low[other])
            elif other in stack:
                low[file] = min(low[file], index[other])
        if low[file] == index[file]:
            at = stack.index(file)
            component = stack[at:]
            del stack[at:]
            found.append(sorted(component))

    for file in sorted(imports):
        if file not in index:
            visit(file)
    return sorted((each for each in found if len(each) > 1), key=len, reverse=True)


def layers(imports: dict[str, set[str]]) -> dict[str, int]:
    """The height of each file: one more than the highest file that it uses; a circle has one height."""
    group = {file: file for file in imports}
    for circle in circles(imports):
        group.update(dict.fromkeys(circle, circle[0]))
    heights: dict[str, int] = {}

    def height(of: str) -> int:
        if of not in heights:
            members = [file for file, name in group.items() if name == of]
            below = {group[other] for file in members for other in imports[file]} - {of}
            heights[of] = max((height(name) + 1 for name in below), default=0)
        return heights[of]

    return {file: height(group[file]) for file in imports}


def draw(name: str, imports: dict[str, set[str]]) -> None:
    """Each file stands above what it uses."""
    heights = layers(imports)
    print(f"{name}: {len(imports)} files")
    for height in sorted(set(heights.values()), reverse=True):
        for file in sorted(file for file, at in heights.items() if at == height):
            print(f"  {height:2}  {file}" + "".join(f" {other}" for other in ["→", *sorted(imports[file])] if imports[file]))
    for circle in circles(imports):
        print(f"  circle of {len(circle)}: {', '.join(circle)}")


def main() -> None:
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    sources = {path.parent.name: path for path in [*sorted(ROOT.glob("crates/*/src")), ROOT / "loadtest/src"]}
    sources |= {main.parent.name: main.parent for main in sorted(ROOT.glob("crates/*/benches/*/main.rs"))}
    if unknown := set(names) - set(sources):
        sys.exit(f"no such crate: {', '.join(sorted(unknown))}")
    failed = False
    for name, source in sources.items():
        if names and name not in names:
            continue
        imports = crate_imports(source)
        if "--check" in sys.argv:
            for circle in circles(imports):
                if len(circle) > CIRCLE_MAX:
                    failed = True
                    print(f"{name}: circle of {len(circle)} files: {', '.join(circle)}", file=sys.stderr)
        else:
            draw(name, imports)
    sys.exit(failed)


main()
