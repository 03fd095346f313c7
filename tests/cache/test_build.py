"""A build that is stopped anywhere goes on, and ends in the bytes of one that was not."""

import errno
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_distill.cache import writer as writers
from hf_distill.cache.build import build_cache
from hf_distill.cache.manifest import BUILDING, MANIFEST, Manifest, save_identity
from hf_distill.cache.registry import encoding_from_config, make_encoding
from hf_distill.cache.rows import Row, rows_of, unpack_ids
from hf_distill.cache.shard import map_shard
from hf_distill.cache.source import LocalSource, uniforms_of
from hf_distill.cache.writer import ENCODED
from hf_distill.signals import Projection, identity
from hf_distill.teachers import ModelTeacher
from tests import tiny
from tests.processes import exit_code, run_on_two_ranks


SETTINGS = {"shard_tokens": 60, "batch_tokens": 64, "show_progress": False}
OPTIONS = {
    "topk": {"k": 8, "temperatures": (1.0, 2.0)},
    "sampled": {},
    "topk_tail": {"k": 4},
    "dense": {},
    "hidden": {},
}


def rows(count=24, seed=0):
    generator = np.random.default_rng(seed)
    return [{"input_ids": generator.integers(0, 300, generator.integers(3, 30)).tolist()} for _ in range(count)]


def build(folder, encoding="topk", **changes) -> Manifest:
    torch.set_num_threads(1)
    arguments = {"teacher": tiny.model("llama"), "dataset": rows(), **SETTINGS, **OPTIONS[encoding], **changes}
    return build_cache(out=folder, encoding=encoding, **arguments)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("encoding", OPTIONS)
def test_a_cache_holds_what_the_encoding_makes_of_the_teacher_row_by_row(tmp_path, encoding):
    manifest = build(tmp_path, encoding)
    teacher, kind = ModelTeacher(tiny.model("llama")), encoding_from_config(manifest.encoding)
    alone = LocalSource(teacher, kind)
    data = iter(rows())
    for entry in manifest.shards:
        arrays = map_shard(tmp_path, entry)
        packed = {name.removeprefix(ENCODED): array for name, array in arrays.items() if name.startswith(ENCODED)}
        stored = kind.open(packed)(np.arange(entry.tokens))
        own = [next(rows_of(next(data))) for _ in range(entry.rows)]
        assert unpack_ids(arrays["ids"]).tolist() == np.concatenate([row.ids for row in own]).tolist()
        pieces = [alone.columns([row]) for row in own]
        again = kind.pack({name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})
        expected = kind.open(again)(np.arange(entry.tokens))
        for name, column in expected.items():
            # Padding rounds otherwise, which may move a step of the quantisation.
            close = torch.isclose(stored[name].double(), column.double(), rtol=1e-5, atol=1e-5)
            assert close.float().mean() > 0.97, name
    assert manifest.rows == len(rows())


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_builds_of_two_ranks_and_of_one_are_equal_byte_for_byte(tmp_path, kind):
    build(tmp_path / "one", kind)
    (tmp_path / "meeting").mkdir()
    run_on_two_ranks(_RankBuild(tmp_path / "two", kind), tmp_path / "meeting")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


class _RankBuild:
    def __init__(self, folder, kind):
        self.folder, self.kind = folder, kind

    def __call__(self, rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, not used: the group is there
        build(self.folder, self.kind)


def _killed_after(folder, seconds):
    threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    build(folder)


def _timed(folder, out):
    start = time.perf_counter()
    build(folder)
    out.write_text(str(time.perf_counter() - start))


@pytest.mark.parametrize("moments", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_build_that_is_killed_at_any_moment_ends_in_the_same_bytes(tmp_path, moments):
    assert exit_code(_timed, tmp_path / "whole", tmp_path / "seconds") == 0
    seconds, generator = float((tmp_path / "seconds").read_text()), np.random.default_rng(moments)
    stopped = 0
    for moment in generator.uniform(0, seconds, moments):
        folder = tmp_path / f"{moment:.6f}"
        code = exit_code(_killed_after, folder, float(moment))
        if code == -signal.SIGKILL and not (folder / MANIFEST).exists():
            stopped += 1
            if folder.exists() and any(folder.iterdir()):
                with pytest.raises(ValueError, match=r"is not whole|holds no cache"):
                    Manifest.load(folder)
        for path in folder.glob("*.tmp"):
            assert path.name.startswith(("shard-", "building", "manifest"))
        build(folder)
        assert files_of(folder) == files_of(tmp_path / "whole")
    assert stopped


def test_a_build_goes_on_without_asking_the_teacher_again(tmp_path, monkeypatch):
    build(tmp_path / "whole")
    count = len(build(tmp_path / "cache").shards)
    (tmp_path / "cache" / MANIFEST).unlink()
    (tmp_path / "cache" / BUILDING).write_bytes(b"")
    with pytest.raises(ValueError, match=r"building\.json is damaged"):
        build(tmp_path / "cache")
    manifest = Manifest.load(tmp_path / "whole")
    save_identity(tmp_path / "cache", manifest.identity)
    (tmp_path / "cache" / "shard-00001.kd").unlink()
    (tmp_path / "cache" / "shard-00003.kd.tmp").write_bytes(b"half")
    asked = []
    write = writers.Writer._write

    def counting(self, number, bar):
        asked.append(number)
        return write(self, number, bar)

    monkeypatch.setattr(writers.Writer, "_write", counting)
    build(tmp_path / "cache")
    assert asked == [1]
    assert count > 3
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


def test_a_damaged_shard_of_a_stopped_build_is_written_again(tmp_path):
    build(tmp_path / "whole")
    manifest = build(tmp_path / "cache")
    (tmp_path / "cache" / MANIFEST).unlink()
    save_identity(tmp_path / "cache", manifest.identity)
    shard = tmp_path / "cache" / "shard-00002.kd"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"shard-00002\.kd is damaged.*written again"):
        build(tmp_path / "cache")
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


def test_a_build_that_was_killed_when_it_had_just_finished_leaves_nothing(tmp_path):
    manifest = build(tmp_path)
    before = files_of(tmp_path)
    save_identity(tmp_path, manifest.identity)
    assert build(tmp_path) == manifest
    assert files_of(tmp_path) == before


def test_what_is_stored_once_is_made_again_by_a_build_that_goes_on(tmp_path):
    manifest = build(tmp_path / "cache", "hidden")
    before = files_of(tmp_path / "cache")
    (tmp_path / "cache" / MANIFEST).unlink()
    save_identity(tmp_path / "cache", manifest.identity)
    shared = tmp_path / "cache" / "shared.safetensors"
    damaged = bytearray(shared.read_bytes())
    damaged[-1] ^= 1
    shared.write_bytes(damaged)
    build(tmp_path / "cache", "hidden")
    assert files_of(tmp_path / "cache") == before


def test_a_whole_cache_is_given_back_without_running_the_teacher(tmp_path, monkeypatch):
    manifest = build(tmp_path)
    monkeypatch.setattr(ModelTeacher, "_signals", None)
    assert build(tmp_path) == manifest


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher": tiny.model("llama", seed=1)}, r"teacher\.weights"),
        ({"dataset": rows(seed=1)}, "dataset"),
        ({"tokenizer": tiny.tokenizer()}, r"tokenizer\.chat_template.*tokenizer\.vocabulary"),
        ({"k": 9}, r"encoding\.k: 8 and not 9"),
        ({"temperatures": (1.0, 3.0)}, r"encoding\.temperatures"),
        ({"shard_tokens": 61}, "shard_tokens: 60 and not 61"),
    ],
)
def test_another_build_into_the_same_folder_is_refused_with_what_differs(tmp_path, changes, named):
    build(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=f"holds another cache.*{named}"):
        build(tmp_path, **changes)
    assert files_of(tmp_path) == before


def test_a_build_that_was_killed_before_it_had_written_anything_goes_on(tmp_path):
    (tmp_path / f"{BUILDING}.tmp").write_bytes(b"half")
    build(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="not empty and holds no cache"):
        build(tmp_path)


def test_a_full_disk_stops_a_build_that_then_goes_on(tmp_path, monkeypatch):
    build(tmp_path / "whole")
    real = writers.shutil.disk_usage
    monkeypatch.setattr(writers.shutil, "disk_usage", lambda path: real(path)._replace(free=100))
    with pytest.raises(OSError, match=r"The rest of the cache needs about .* goes on from here") as error:
        build(tmp_path / "cache")
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    build(tmp_path / "cache")
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": tiny.model("bert")}, "masked_lm model"),
        ({"teacher": 7}, "`teacher` is a int"),
        ({"compression": "zip"}, "zip"),
        ({"encoding": "topkk"}, "topkk"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(tmp_path, changes, message):
    arguments = {"teacher": tiny.model("llama"), "dataset": rows(), "out": tmp_path / "cache", **SETTINGS}
    with pytest.raises(ValueError, match=message):
        build_cache(**arguments | changes)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("encoding", OPTIONS)
def test_a_teacher_without_numbers_is_refused_by_the_row_and_nothing_unfinished_stays(tmp_path, encoding):
    data = [row for row in rows() if 7 not in row["input_ids"]]
    data.append({"input_ids": [9, 8, 7]})
    model = tiny.model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    with pytest.raises(ValueError, match=r"nan or inf after token \d of the row \[9, 8, 7\] of 3 tokens"):
        build(tmp_path, encoding, teacher=model, dataset=data)
    assert not (tmp_path / MANIFEST).exists()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("token", "named"),
    [(0, "after token 1 of the row [1, 2, 3]"), (1, "token 0 of the row [4, 5]"), (3, "token 2 of")],
)
def test_the_token_without_numbers_is_named(monkeypatch, token, named):
    kept = {(1, 2, 3): [False, True], (4, 5): [True], (6, 7, 8, 9): [True, False, True]}
    given = [Row(np.array(ids), np.array(positions)) for ids, positions in kept.items()]
    hidden = torch.zeros(4, 50)
    hidden[token, 3] = torch.nan
    source = LocalSource(None, make_encoding("dense", vocab_size=50, temperatures=(1.0,)))
    monkeypatch.setattr(source, "run", lambda rows: Projection(hidden, identity))
    with pytest.raises(ValueError, match=re.escape(named)):
        source.columns(given)


@pytest.mark.parametrize("encoding", [name for name in OPTIONS if name != "hidden"])
def test_a_teacher_whose_logits_overflow_is_refused(tmp_path, encoding):
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.inf
    with pytest.raises(ValueError, match="gives nan or inf"):
        build(tmp_path, encoding, teacher=model)


def test_a_damaged_manifest_is_refused(tmp_path):
    build(tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace('"rows": ', '"rows": 1', 1))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        Manifest.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        Manifest.load(tmp_path)


def test_the_uniform_of_a_token_depends_on_its_row_and_position_alone():
    ids = np.arange(9, dtype=np.int32)
    every = uniforms_of(Row(ids, np.ones(8, dtype=bool)))
    some = uniforms_of(Row(ids, np.arange(8) % 2 == 0))
    assert some.tolist() == every[::2].tolist()
    assert not np.isin(every, uniforms_of(Row(ids + 1, np.ones(8, dtype=bool)))).any()


def test_a_cache_of_another_format_is_refused_by_its_version(tmp_path, monkeypatch):
    build(tmp_path)
    monkeypatch.setattr("hf_distill.cache.manifest.FORMAT_VERSION", 4)
    with pytest.raises(ValueError, match=r"has format version 3, and this hf_distill reads 4; build it again"):
        Manifest.load(tmp_path)
