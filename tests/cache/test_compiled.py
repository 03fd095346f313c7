import importlib.machinery
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from hf_distill.cache import compiled
from hf_distill.functional import LMHead
from hf_distill.signals import Projection, identity
from tests.cache.encodings import VOCAB, observed, teacher


ENCODINGS = {
    "topk": ("topk", {"k": 9, "bits": 6}),
    "topk of everything": ("topk", {"k": VOCAB, "bits": 10}),
    "sampled": ("sampled", {"draws": 20}),
    "one draw": ("sampled", {"draws": 1}),
    "tail": ("topk_tail", {"k": 5, "draws": 7, "bits": 9}),
    "tail, eight bits": ("topk_tail", {"k": 16, "draws": 64, "bits": 8}),
    "tail, two bits": ("topk_tail", {"k": 1, "draws": 1, "bits": 2}),
    "nothing beside the head": ("topk_tail", {"k": VOCAB, "draws": 3}),
}


def impossible():
    """Logits of which few are possible, so that slots stay unused."""
    logits = torch.full((60, VOCAB), -torch.inf)
    logits[:, ::40] = torch.randn(60, 6)
    return Projection(logits, identity)


def unsure():
    """A distribution that is next to uniform: all draws are of different tokens."""
    output = teacher(60)
    return Projection(output.hidden, LMHead(output.head.weight * 0.01))


OUTPUTS = {"plain": lambda: teacher(300), "unsure": unsure, "impossible": impossible}


@pytest.mark.parametrize(("name", "options"), ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_compiled_loops_pack_and_read_what_numpy_does(name, options, output, monkeypatch):
    pytest.importorskip("numba")
    encoding, columns = observed(name, output(), **options)
    arrays = encoding.pack(columns)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "loops", lambda: None)
        expected = encoding.pack(columns)
    assert arrays.keys() == expected.keys()
    for key, array in expected.items():
        assert arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(arrays[key], array)
    count = len(columns["entropies"])
    for numbers in (np.arange(count), np.random.default_rng(0).integers(0, count, 50), np.arange(0)):
        fast = encoding.open(arrays)(numbers)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "loops", lambda: None)
            slow = encoding.open(arrays)(numbers)
        assert fast.keys() == slow.keys()
        for key, column in slow.items():
            assert fast[key].dtype == column.dtype
            assert torch.equal(fast[key], column), key


@pytest.fixture
def without_loops(monkeypatch):
    """As before the first token was read."""
    monkeypatch.delitem(sys.modules, "hf_distill.cache.loops", raising=False)
    monkeypatch.delattr("hf_distill.cache.loops", raising=False)


def test_without_numba_numpy_reads_and_nothing_is_said(without_loops, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled.loops.__wrapped__() is None
    assert not recwarn.list


def test_a_numba_that_does_not_fit_is_named_and_numpy_reads(without_loops, monkeypatch):
    broken = types.ModuleType("numba")
    broken.__spec__ = importlib.machinery.ModuleSpec("numba", None)
    monkeypatch.setitem(sys.modules, "numba", broken)
    monkeypatch.delitem(sys.modules, "numba.extending", raising=False)
    with pytest.warns(UserWarning, match="numba is installed and cannot be imported"):
        assert compiled.loops.__wrapped__() is None


def test_code_that_cannot_be_kept_is_compiled_all_the_same():
    pytest.importorskip("numba")
    code = (
        "import numpy, numba.core.caching as caching; caching.CacheImpl._locator_classes = []; "
        "from hf_distill.cache import loops; ids, counts = numpy.zeros((2, 3), int), numpy.zeros((2, 3), 'f4'); "
        "loops.read_counts(numpy.zeros((2, 1), 'u1'), numpy.arange(2), ids, counts); assert (counts == 1).all()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numba_is_imported_by_the_first_token_that_is_read_and_not_before():
    code = "import sys, hf_distill.cache, hf_distill.cache.sampled; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
