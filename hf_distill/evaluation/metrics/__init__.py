"""Metrics of the `evaluate` library that work without the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from evaluate import EvaluationModule

FOLDER = Path(__file__).parent


def load_metric(name: str) -> EvaluationModule:
    """Load a metric that this package ships; `evaluate.load(name)` would ask the Hub for it.

    Args:
        name: `accuracy`, `f1`, `exact_match` or `rouge`.

    Raises:
        ValueError: No such metric is shipped.
        ImportError: The `evaluate` library is not installed.

    Example:
        ```python
        accuracy = load_metric("accuracy")
        accuracy.compute(predictions=[0, 1], references=[0, 0])  # {"accuracy": 0.5}
        ```
    """
    shipped = sorted(folder.name for folder in FOLDER.iterdir() if (folder / f"{folder.name}.py").is_file())
    if name not in shipped:
        raise ValueError(f"`name` is {name!r}; expected a metric that hf_distill ships: {', '.join(shipped)}.")
    try:
        import evaluate
    except ImportError as error:
        raise ImportError(
            "load_metric needs the `evaluate` library, which is not installed: pip install 'hf_distill[eval]'."
        ) from error
    return evaluate.load(str(FOLDER / name))
