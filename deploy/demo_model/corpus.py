"""Python source text -> what the demo model learns from: whole files, and the functions in them taken apart.

Pure: text in, values out; no file is read here. Invariants:
- a file is wholly training text or wholly held out, by a hash of its path alone, so another machine splits the same way;
- a `Function`'s `signature + docstring + body` parses as Python and starts at column 0;
- what is held out is not also in the training set: a function whose body was seen in a training file is dropped.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

HELD_OUT_ONE_IN = 20
FILE_CHARS_MIN, FILE_CHARS_MAX = 200, 400_000
NON_ASCII_SHARE_MAX = 0.005
WIDEST_LINE_MAX = 400  # wider lines are data tables
BODY_LINES_MAX = 60
BODY_CHARS_MAX = 2_400
SIGNATURE_LINES_MAX = 8

# Generated tables and documentation dumps: megabytes of text with nothing to learn about writing code.
TABLES = (
    "encodings/",
    "pydoc_data/",
    "config-",
    "_sysconfigdata",
    "site-packages/",
    "dist-packages/",
    "test/test_email/data",
    "__phello__",
)
TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "testmock"})


class Source(NamedTuple):
    path: str  # relative to the library's root, with forward slashes
    text: str
    is_test: bool
    is_held_out: bool


class Function(NamedTuple):
    name: str
    owner: str | None  # the class, for a method
    arguments: str  # "a, b=None", as `ast` writes them
    signature: str  # "def name(...):\n", decorators left out
    docstring: str  # its source lines, indented by 4; "" where there is none
    summary: str  # the docstring's first paragraph on one line; "" where there is none
    body: str  # the statements after the docstring, indented by 4, ending in a newline

    @property
    def whole(self) -> str:
        return self.signature + self.body


def source(path: str, text: str) -> Source | None:
    """The file as corpus text, or None where it is a table, no Python, too long, or not English enough."""
    if any(path.startswith(table) or f"/{table}" in path for table in TABLES):
        return None
    if not FILE_CHARS_MIN <= len(text) <= FILE_CHARS_MAX or "\x00" in text:
        return None
    if (
        sum(not char.isascii() for char in text) > NON_ASCII_SHARE_MAX * len(text)
        or max(map(len, text.split("\n"))) > WIDEST_LINE_MAX
    ):
        return None
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return Source(path, text, not TEST_FOLDERS.isdisjoint(path.split("/")), is_held_out(path))


def is_held_out(path: str) -> bool:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def without_duplicates(sources: Iterable[Source]) -> list[Source]:
    """One of each text, in the order of their paths; where a text is on both sides of the split, the training side keeps it."""
    seen: set[str] = set()
    kept = []
    for item in sorted(sources, key=lambda one: (one.is_held_out, one.path)):
        if item.text not in seen:
            seen.add(item.text)
            kept.append(item)
    return sorted(kept)


def functions(text: str) -> list[Function]:
    """Every function and method of the file that can be taken apart cleanly, in the order of the file."""
    lines = text.split("\n")
    return [function for node, owner in _definitions(ast.parse(text), None) if (function := _take_apart(node, owner, lines))]


def distinct_functions(files: Iterable[Source]) -> dict[str, list[Function]]:
    """Functions by file path, each (name, body) once over all files, training files first."""
    seen: set[tuple[str, str]] = set()
    found: dict[str, list[Function]] = {}
    for item in sorted(files, key=lambda one: (one.is_held_out, one.path)):
        for function in functions(item.text):
            key = (function.name, ast.dump(ast.parse(function.whole)))
            if key not in seen:
                seen.add(key)
                found.setdefault(item.path, []).append(function)
    return found


def _definitions(node: ast.AST, owner: str | None) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str | None]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, owner
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, child.name)
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child, owner)


def _take_apart(node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str | None, lines: list[str]) -> Function | None:
    """None where the text can't be cut at line ends, is too long, or has nothing but a docstring."""
    dedented = _dedented(lines[node.lineno - 1 : node.end_lineno], node.col_offset)
    has_docstring = ast.get_docstring(node, clean=False) is not None
    statements = node.body[1:] if has_docstring else node.body
    if dedented is None or not statements:
        return None
    header_end = _header_end(dedented, (node.body[0].lineno - node.lineno))
    if header_end is None or header_end > SIGNATURE_LINES_MAX:
        return None
    docstring_end = (node.body[0].end_lineno or node.lineno) - node.lineno + 1 if has_docstring else header_end
    if has_docstring and statements[0].lineno == node.body[0].end_lineno:
        return None
    body = dedented[docstring_end:]
    while body and not body[0].strip():
        body = body[1:]
    text = "\n".join(body) + "\n"
    if not body or len(body) > BODY_LINES_MAX or len(text) > BODY_CHARS_MAX or not text.startswith("    ") or text[4] in " \t":
        return None
    signature = "\n".join(dedented[:header_end]) + "\n"
    docstring = "".join(line + "\n" for line in dedented[header_end:docstring_end])
    if not _parses(signature + docstring + text) or not _parses(signature + text):
        return None
    return Function(node.name, owner, ast.unparse(node.args), signature, docstring, _summary(node), text)


def _dedented(lines: list[str], columns: int) -> list[str] | None:
    """The lines moved left; None where one (inside a string, say) has not that much space to give."""
    if any(line.strip() and line[:columns].strip() for line in lines):
        return None
    return [line[columns:].rstrip() for line in lines]


def _header_end(lines: list[str], body_start: int) -> int | None:
    """How many lines the signature takes: the fewest that parse with a body put behind them."""
    return next((count for count in range(1, body_start + 1) if _parses("\n".join(lines[:count]) + "\n    pass\n")), None)


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def _summary(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    docstring = ast.get_docstring(node) or ""
    return " ".join(docstring.split("\n\n")[0].split())
