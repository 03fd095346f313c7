import pytest

from hf_distill.functional import tile


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of rows in every chunk of the fused loss, the last one ragged."""
    monkeypatch.setattr(tile, "_CPU_BLOCK", 700)
