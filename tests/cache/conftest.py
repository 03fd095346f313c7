from __future__ import annotations

from pathlib import Path

import pytest

from hf_distill.cache import compiled


@pytest.fixture(autouse=True)
def _own_cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(params=["compiled", "numpy"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What reads caches: the loops that numba compiles, or numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(compiled, "loops", lambda: None)
    else:
        pytest.importorskip("numba")
    return request.param
