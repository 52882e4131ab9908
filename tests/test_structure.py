"""The shape of the sources, which keeps them readable for the next contributor."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
LONGEST = 90  # lines of a C++ function, its signature included

# Comments and literals may hold braces, and a preprocessor line may hold any of them.
NO_CODE = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|^[ \t]*#(?:\\\n|[^\n])*', re.S | re.M
)
SCOPE = re.compile(r"(?:template\s*<[^{]*>\s*)?(?:inline\s+)?(?:namespace|struct|class|enum|union|extern)\b")


def function_lengths(source: str) -> dict[str, int]:
    """Lines of each function, by its signature. A function within another counts as part of that one."""
    code = NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)
    lengths: dict[str, int] = {}
    outer: list[str | None] = []  # for each open brace: a function's signature, "" for another scope, None for a value
    head = 0
    for brace in re.finditer(r"[{};]", code):
        if brace[0] == "{" and not code[brace.start() - 1].isspace():  # clang-format leaves no space before a value's
            outer.append(None)
            continue
        if brace[0] == "{":
            signature = re.sub(r"^\s*(?:(?:public|private|protected):\s*)*", "", code[head : brace.start()])
            function = "(" in signature and not SCOPE.match(signature) and not any(outer)
            outer.append(signature if function else "")
            if function:
                begin = brace.start() - len(signature)
        elif brace[0] == "}":
            closed = outer.pop()
            if closed is None:
                continue
            if closed:
                lengths[" ".join(closed.split())] = code.count("\n", begin, brace.start()) + 1
        head = brace.end()
    assert not outer
    return lengths


def test_the_lengths_of_functions_are_counted():
    source = """
    namespace a {
    struct B : C<int> {
      B(int x)
          : x_{x} {
        if (x) { "}"; }  // }
      }
    };
    template <class T>
    T f() { return [] { return 1; }(); }
    }
    """
    assert function_lengths(source) == {"B(int x) : x_{x}": 4, "template <class T> T f()": 2}


@pytest.mark.skipif(not CSRC.is_dir(), reason="needs the repository's files")
def test_no_cpp_function_is_long():
    """A longer one is split into parts with names."""
    lengths = {
        f"{file.relative_to(CSRC)}: {name}": lines
        for file in sorted(CSRC.rglob("*"))
        if file.suffix in {".h", ".cpp", ".cuh", ".cu"}
        for name, lines in function_lengths(file.read_text()).items()
    }
    assert len(lengths) > 200
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}
