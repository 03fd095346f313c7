from __future__ import annotations

import re
import sys

import pytest

from hf_distill.evaluation import Footprint, RetentionReport, RetentionRow


VALUES = {"before": 0.4, "labels alone": 0.7}
ROWS = (
    RetentionRow("arc", "acc", True, 0.25, 500, 0.75, 0.65, None, 0.8, 0.75, 0.85, VALUES),
    RetentionRow("news", "perplexity", False, 0.0, 300, 10.0, 12.5, None, 0.8, None, None, dict.fromkeys(VALUES)),
    RetentionRow("kl", "kl", False, 0.0, 300, 0.0, 0.2, None, None, None, None),
)
FOOTPRINTS = tuple(
    Footprint(name, size, 2 * size, 10.0, 3 * size, "bfloat16", "cpu")
    for name, size in {"teacher": 4_000_000, "student": 2_000_000, "before": 2_000_000}.items()
)


def texts(path) -> str:
    """What an SVG says: matplotlib leaves each text as a comment beside its glyphs."""
    return " ".join(re.findall(r"<!-- (.*?) -->", path.read_text()))


def test_a_report_is_drawn_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib")

    written = RetentionReport(ROWS[:1], 0.75, 0.85, FOOTPRINTS).plot(tmp_path / "new")

    assert sorted(path.name for path in written) == ["retention.png", "retention.svg", "tradeoff.png", "tradeoff.svg"]
    assert sorted(written) == sorted((tmp_path / "new").iterdir())
    assert written[0].read_bytes().startswith(b"\x89PNG")
    bars, tradeoff = (texts(tmp_path / "new" / f"{name}.svg") for name in ("retention", "tradeoff"))
    for text in ("arc", "student", "before", "labels alone", "teacher"):
        assert text in bars
    assert "teacher" in tradeoff
    assert "before" in tradeoff
    assert "labels alone" not in tradeoff  # its size is not known
    assert "weights (MB)" in tradeoff
    assert {"4", "8"} <= set(tradeoff.split())  # megabytes, not millions of parameters


def test_what_is_not_defined_is_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")

    bars = RetentionReport(ROWS).plot(tmp_path)

    assert [path.name for path in bars] == ["retention.png", "retention.svg"]
    assert "kl" not in texts(bars[1]).split()
    assert RetentionReport(ROWS[2:], footprints=FOOTPRINTS).plot(tmp_path / "none") == []


def test_the_same_report_gives_the_same_bytes_and_the_global_style_stays(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    report = RetentionReport(ROWS, 0.75, 0.85, FOOTPRINTS)

    first, second = ([path.read_bytes() for path in report.plot(tmp_path / name)] for name in "ab")

    assert first == second
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ImportError, match=r"hf_distill\[plots\]"):
        RetentionReport(ROWS).plot(tmp_path / "new")
    assert not (tmp_path / "new").exists()
