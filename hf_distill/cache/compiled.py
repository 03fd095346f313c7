"""Whether the loops that write and read a cache are compiled."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from types import ModuleType


@cache
def loops() -> ModuleType | None:
    """The loops that numba compiles; None where it is not installed, and numpy does the same in more time."""
    try:
        from hf_distill.cache import loops as compiled_loops
    except ImportError as error:
        if importlib.util.find_spec("numba") is not None:
            warnings.warn(
                f"numba is installed and cannot be imported ({error}): numpy writes and reads caches, in more time. "
                "Bring numba and numpy to versions that fit, or uninstall numba.",
                stacklevel=2,
            )
        return None
    return compiled_loops
