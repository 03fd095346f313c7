from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from hf_distill.cache import CacheReader, Manifest, build_cache
from hf_distill.cache.encoding import Columns
from hf_distill.cache.registry import make_encoding
from hf_distill.cache.remote import RemoteSource, RemoteTeacher
from hf_distill.cache.rows import Row, rows_of
from hf_distill.signals import Projection, identity
from tests import tiny
from tests.cache.model_server import ModelServer


VOCABULARY = 320


def model() -> PreTrainedModel:
    """One whose distributions differ from token to token."""
    return tiny.model(initializer_range=0.3)


def rows(count: int = 6) -> list[Row]:
    return [row for example in tiny.tokenized_dataset(count) for row in rows_of(example)]


def remote(server: ModelServer, **settings) -> RemoteTeacher:
    return RemoteTeacher(server.url, **({"model": server.name, "vocab_size": VOCABULARY, "wait": 0.01} | settings))


def source(
    server: ModelServer, k: int = 20, temperatures: tuple[float, ...] = (1.0,), longest: int = 13, **settings
) -> RemoteSource:
    encoding = make_encoding("topk", vocab_size=VOCABULARY, k=k, temperatures=temperatures)
    return RemoteSource(remote(server, **settings), encoding, longest)


@torch.no_grad()
def local_columns(teacher: PreTrainedModel, of: list[Row], k: int = 20) -> Columns:
    logits = [teacher(input_ids=torch.tensor([row.ids.tolist()])).logits[0, :-1][row.kept] for row in of]
    labels = torch.from_numpy(np.concatenate([row.labels for row in of])).long()
    encoding = make_encoding("topk", vocab_size=VOCABULARY, k=k)
    return encoding.observe(Projection(torch.cat(logits), identity), labels, None)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_a_server_gives_the_columns_that_its_model_gives_here(k: int) -> None:
    with ModelServer(model()).serving() as server:
        remote_columns = source(server, k).columns(rows())
    columns = local_columns(model(), rows(), k)
    assert {name: (of.shape, of.dtype) for name, of in remote_columns.items()} == {
        name: (of.shape, of.dtype) for name, of in columns.items()
    }
    order = columns["log_probs"].argsort(1, descending=True)
    assert torch.equal(remote_columns["ids"], columns["ids"].gather(1, order))
    assert torch.allclose(remote_columns["log_probs"], columns["log_probs"].gather(1, order), atol=1e-5)
    for name in ("label_log_probs", "log_rests"):
        assert torch.allclose(remote_columns[name], columns[name], atol=1e-4)
    assert (remote_columns["entropies"] <= columns["entropies"] + 1e-4).all()


def test_the_entropy_is_that_of_the_tokens_and_the_rest() -> None:
    with ModelServer(model()).serving() as server:
        columns = source(server).columns(rows())
    mass = torch.cat([columns["log_probs"], columns["log_rests"]], 1).double()
    assert torch.allclose(mass.exp().sum(1), torch.ones(len(mass), dtype=torch.float64), atol=1e-6)
    assert torch.allclose(columns["entropies"][:, 0].double(), -(mass.exp() * mass).sum(1), atol=1e-5)


def test_a_row_is_a_request_and_several_are_under_way() -> None:
    with ModelServer(model(), delay=0.05).serving() as server:
        source(server, requests=4).columns(rows(12))
        assert 1 < server.most_at_once <= 4
        prompts = [request["prompt"] for request in server.requests[1:]]
        assert sorted(prompts) == sorted(row.ids.tolist() for row in rows(12))


def test_a_server_that_fails_for_a_while_changes_nothing() -> None:
    with ModelServer(model()).serving() as server:
        expected = source(server).columns(rows())
        teacher = source(server)
        server.failures += [500, 503, 0, 429]
        again = teacher.columns(rows())
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_server_that_dies_ends_the_work_with_what_to_do() -> None:
    with ModelServer(model()).serving() as server:
        teacher = source(server, attempts=3)
    with pytest.raises(ConnectionError, match=r"did not answer 3 times in a row.*run the same command again"):
        teacher.columns(rows())


def test_what_a_server_does_to_probabilities_is_switched_off() -> None:
    """Where a request does not say it, vLLM takes the temperature from the model's generation config."""
    with ModelServer(model(), mode="processed_logprobs", default_temperature=0.5).serving() as server:
        columns = source(server).columns(rows())
    expected = local_columns(model(), rows())
    assert torch.allclose(columns["label_log_probs"], expected["label_log_probs"], atol=1e-4)


@pytest.mark.parametrize("mode", ["raw_logits", "top_k"])
def test_a_server_that_gives_no_log_probabilities_of_the_model_is_refused(mode: str) -> None:
    with (
        ModelServer(model(), mode=mode).serving() as server,
        pytest.raises(ValueError, match=r"prompt_logprobs.*raw_logprobs"),
    ):
        source(server).columns(rows())


def test_more_tokens_than_the_server_gives_are_refused_before_the_first_row() -> None:
    with (
        ModelServer(model(), max_logprobs=20).serving() as server,
        pytest.raises(ValueError, match="max allowed: 20 Start vLLM with `--max-logprobs 21`"),
    ):
        source(server, k=21)


def test_a_row_that_is_too_long_is_refused_before_the_first_one_is_asked_for() -> None:
    with ModelServer(model(), max_model_len=13).serving() as server:
        with pytest.raises(ValueError, match=r"longest row has 13 tokens, .* reads 12 .*`--max-model-len 14`"):
            source(server)
        assert not server.requests
        server.max_model_len = 14
        longest = max(rows(), key=lambda row: len(row.ids))
        assert len(longest.ids) == 13
        assert len(source(server).columns([longest])["ids"]) == longest.kept.sum()


def test_a_model_that_is_not_served_is_refused() -> None:
    with ModelServer(model()).serving() as server, pytest.raises(ValueError, match=r"'tinny'.*serves \['tiny'\]"):
        source(server, model="tinny")


def test_a_key_is_taken_from_the_argument_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with ModelServer(model(), api_key="secret-7").serving() as server:
        with pytest.raises(ValueError, match=r"Unauthorized.*VLLM_API_KEY"):
            source(server)
        assert "secret-7" not in repr(remote(server, api_key="secret-7"))
        source(server, api_key="secret-7").columns(rows(1))
        monkeypatch.setenv("VLLM_API_KEY", "secret-7")
        source(server).columns(rows(1))


def test_a_server_without_prompt_logprobs_is_refused() -> None:
    with (
        ModelServer(model(), mode="none").serving() as server,
        pytest.raises(ValueError, match="gives no `prompt_logprobs`"),
    ):
        source(server)


def test_other_temperatures_and_encodings_are_refused_with_the_reason() -> None:
    teacher = RemoteTeacher("http://127.0.0.1:1/v1", "tiny", VOCABULARY)
    with pytest.raises(ValueError, match=r"holds \[2\.0\].*sum over the whole vocabulary"):
        RemoteSource(teacher, make_encoding("topk", vocab_size=VOCABULARY, temperatures=(1.0, 2.0)), 13)
    with pytest.raises(ValueError, match=r"'dense'.*encoding='topk'"):
        RemoteSource(teacher, make_encoding("dense", vocab_size=VOCABULARY), 13)


def build(teacher: RemoteTeacher | PreTrainedModel, out: Path, **settings) -> Manifest:
    return build_cache(teacher, tiny.tokenized_dataset(12), out, k=20, show_progress=False, **settings)


def test_a_cache_of_a_server_is_that_of_its_model_but_for_rounding(tmp_path: Path) -> None:
    with ModelServer(model()).serving() as server:
        manifest = build(remote(server), tmp_path / "remote")
    build(model(), tmp_path / "local")
    assert manifest.identity.source == "server"
    assert manifest.teacher.name == "tiny"
    ours, theirs = CacheReader(tmp_path / "remote"), CacheReader(tmp_path / "local")
    assert ours.manifest.identity.dataset == theirs.manifest.identity.dataset
    for row in theirs.rows():
        one, other = ours.targets([row]), theirs.targets([row])
        same = (one.ids == other.ids).all(1)
        assert same.float().mean() > 0.9
        # A step of 8 bits over some 5 nats.
        assert (one.log_probs - other.log_probs)[same].abs().max() < 0.03
        assert torch.allclose(one.label_log_probs, other.label_log_probs, atol=1e-2)


def test_a_build_goes_on_where_the_server_died(tmp_path: Path) -> None:
    settings = {"shard_tokens": 20}
    with ModelServer(model()).serving() as server:
        build(remote(server), tmp_path / "whole", **settings)
        teacher = remote(server, attempts=2)
        server.dies_after = len(server.requests) + 6
        with pytest.raises(ConnectionError, match="run the same command again"):
            build(teacher, tmp_path / "cache", **settings)
        written = [path.name for path in (tmp_path / "cache").glob("*.kd")]
        assert written
        with pytest.raises(ValueError, match="not whole"):
            CacheReader(tmp_path / "cache")
        server.dies_after, asked = None, len(server.requests)
        build(teacher, tmp_path / "cache", **settings)
        assert len(server.requests) - asked < 12
    whole, cache = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "cache")
    )
    assert whole == cache


def test_a_whole_cache_does_not_need_the_server(tmp_path: Path) -> None:
    with ModelServer(model()).serving() as server:
        manifest = build(remote(server), tmp_path / "cache")
    assert build(remote(server, attempts=1), tmp_path / "cache") == manifest


def test_a_server_of_another_model_is_refused_in_the_same_folder(tmp_path: Path) -> None:
    with ModelServer(model()).serving() as server:
        build(remote(server), tmp_path / "cache")
        server.name = "other"
        with pytest.raises(ValueError, match=r"teacher\.name: 'tiny' and not 'other'"):
            build(remote(server), tmp_path / "cache")


def test_nothing_is_written_where_the_server_refuses(tmp_path: Path) -> None:
    with ModelServer(model(), max_logprobs=5).serving() as server, pytest.raises(ValueError, match="max-logprobs 20"):
        build(remote(server), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_address_alone_is_refused_with_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"RemoteTeacher\('http://127"):
        build("http://127.0.0.1:8000/v1", Path("never"))
    with pytest.raises(ValueError, match="runs elsewhere"):
        build(RemoteTeacher("http://127.0.0.1:8000", "tiny", 320), Path("never"), quantization="nf4")
