"""Whether the loops that read a cache are compiled."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType


@cache
def loops() -> ModuleType | None:
    """The loops that numba compiles; None where it is not installed, and numpy does the same in more time."""
    if importlib.util.find_spec("numba") is None:
        return None
    from hf_distill.cache import loops as compiled_loops

    return compiled_loops
