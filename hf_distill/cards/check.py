"""What must never stand in a published card, and how text is kept free of it."""

from __future__ import annotations

import re


# An absolute path: two folders or more on POSIX, so that "/s" and "and/or" are text; a drive or a share on Windows.
# What stands before it must not belong to a URL or a closing HTML tag.
_PATH = re.compile(
    r"(?:file://|(?<![\w/.<~\\-]))(?:~?(?:/[\w.@+~-]+){2,}/?|~/[\w.-]+)"
    r"|(?<![A-Za-z])[A-Za-z]:[\\/](?:[\w.@+ ~-]+[\\/])*[\w.@+~-]+"
    r"|\\\\[\w.-]+(?:\\[\w.$-]+)+"
)
_FORBIDDEN = {
    "an absolute path": _PATH,
    "a value that is not a number": re.compile(r"(?<![\w-])[+-]?\.?(?:nan|NaN|inf|Infinity)(?![\w-])"),
    # English may begin a sentence with it: "None of the rows ...".
    "a missing value": re.compile(r"\bNone\b(?![ \t]+[a-z])|^[ -]*[\w-]+: null$", re.MULTILINE),
    "an unfilled placeholder": re.compile(r"\{\{|\{%|\[More Information Needed\]|\[optional\]"),
}


def check_card(text: str) -> None:
    """Check that a card holds no local path, no missing value and no placeholder.

    Raises:
        ValueError: It does; the first such line is quoted.
    """
    for what, pattern in _FORBIDDEN.items():
        found = pattern.search(text)
        if found:
            number = text.count("\n", 0, found.start()) + 1
            line = text.splitlines()[number - 1].strip()
            raise ValueError(
                f"The card holds {what}, {found.group().strip()!r}, in line {number}: {line!r}. Remove it from the "
                "card's data: leave out what was not measured, and name things instead of giving paths."
            )


def without_paths(text: str) -> str:
    """Put the last part of every absolute path in its place, so that no machine is described."""
    return _PATH.sub(lambda found: re.split(r"[\\/]", found.group().rstrip("\\/"))[-1], text)
