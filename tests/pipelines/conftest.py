import pytest

from hf_distill.evaluation import KLDivergence, Perplexity, Top1Agreement
from hf_distill.pipelines import CompressConfig
from tests import tiny
from tests.pipelines.runs import SETTINGS


@pytest.fixture
def teacher(tmp_path):
    """The folder of a tiny model."""
    folder = tmp_path / "teacher"
    sizes = {"hidden_size": 64, "intermediate_size": 256, "tie_word_embeddings": True}
    tiny.model("llama", layers=3, initializer_range=0.1, **sizes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path):
    """Settings of a short pipeline in a folder of its own."""

    def make(**changed) -> CompressConfig:
        return CompressConfig(str(tmp_path / "out"), **(SETTINGS | changed))

    return make


@pytest.fixture(scope="session")
def benchmarks():
    held_out = tiny.tokenized_dataset(8, seed=1)
    return [benchmark(held_out) for benchmark in (Perplexity, KLDivergence, Top1Agreement)]
