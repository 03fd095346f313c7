"""`hf-distill cache` builds a cache from files alone and says what it is."""

import json

import pytest
from datasets import Dataset, DatasetDict

from hf_distill import KDSFTConfig, KDSFTTrainer
from hf_distill.cache import CacheReader
from hf_distill.cache.rows import rows_of
from hf_distill.cli.main import main
from tests import tiny
from tests.cache.distillkit_files import polynomial_files, texts
from tests.cache.model_server import ModelServer


ROWS = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10, 11]}]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def save(kind, folder):
    if kind == "jsonl":
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "splits":
        path = folder / "splits"
        DatasetDict(train=Dataset.from_list(ROWS[:1]), test=Dataset.from_list(ROWS)).save_to_disk(path)
    else:
        path = folder / "saved"
        Dataset.from_list(ROWS).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "saved", "splits"])
def test_build_runs_a_teacher_over_a_dataset_on_disk_and_prints_what_it_made(tmp_path, teacher, kind, capsys):
    arguments = ["--teacher", teacher, "--dataset", save(kind, tmp_path), "--out", str(tmp_path / "out")]
    arguments += ["--split", "test"] if kind == "splits" else []
    assert main(["cache", "build", *arguments, "--k", "7", "--temperatures", "1", "2"]) == 0
    said = capsys.readouterr().out
    assert "5 in 1 shards" in said
    assert "k 7" in said
    reader = CacheReader(tmp_path / "out")
    assert [row.ids.tolist() for row in reader.rows()] == [row["input_ids"] for row in ROWS]
    assert reader.encoding.temperatures == (1.0, 2.0)
    assert main(["cache", "info", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("rows.txt", "expected a file of"), ("reviews.jsonl", "expected `input_ids`, or one of TRL's formats")],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, teacher, dataset, message, capsys):
    (tmp_path / dataset).write_text('{"review": "a"}\n')
    arguments = ["--teacher", teacher, "--dataset", str(tmp_path / dataset), "--out", str(tmp_path / "out")]
    assert main(["cache", "build", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert main(["cache", "info", str(tmp_path / "out")]) == 2
    assert "holds no cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "given", "fields"),
    [
        (["text"], [], {}),
        (["text"], ["--max-length", "9"], {"max_length": 9}),
        (["prompt", "completion"], [], {}),
        (["messages"], ["--assistant-only-loss"], {"assistant_only_loss": True}),
    ],
)
def test_texts_and_chats_become_the_rows_that_the_trainer_will_ask_for(tmp_path, teacher, columns, given, fields):
    examples = tiny.messages_dataset(4) if columns == ["messages"] else tiny.prompt_completion_dataset(4)
    if columns == ["text"]:
        examples = examples.map(lambda row: {"text": row["prompt"] + row["completion"]})
    examples = examples.select_columns(columns)
    examples.to_json(tmp_path / "rows.jsonl")
    arguments = ["--teacher", teacher, "--dataset", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["cache", "build", *arguments, "--k", "7", *given]) == 0
    fixed = {"bf16": False, "use_cpu": True, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
    args = KDSFTConfig(str(tmp_path / "run"), teacher_cache=str(tmp_path / "out"), **fixed, **fields)
    data = {"train_dataset": examples, "processing_class": tiny.tokenizer()}
    trainer = KDSFTTrainer(tiny.model("llama", seed=1), args=args, **data)
    rows = [row for example in trainer.train_dataset for row in rows_of(example)]
    reader = CacheReader(tmp_path / "out")
    assert [(row.ids.tolist(), row.kept.tolist()) for row in reader.rows()] == [
        (row.ids.tolist(), row.kept.tolist()) for row in rows
    ]
    assert any(row.kept.any() for row in rows)
    trainer.train()


@pytest.mark.parametrize(
    ("row", "given", "message"),
    [
        ({"input_ids": [1, 2]}, ["--max-length", "9"], "are of texts, and `--dataset` has `input_ids`"),
        ({"text": "a"}, ["--teacher-model", "tiny", "--vocab-size", "320"], "name its tokenizer by `--tokenizer`"),
    ],
)
def test_how_rows_are_made_must_be_known(tmp_path, row, given, message, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["--teacher", "http://127.0.0.1:1", "--teacher-model", "tiny", "--vocab-size", "320"]
    arguments += ["--dataset", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"), *given]
    assert main(["cache", "build", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_build_asks_a_server_by_its_address(tmp_path, capsys):
    arguments = ["cache", "build", "--dataset", save("saved", tmp_path), "--out", str(tmp_path / "out"), "--k", "7"]
    with ModelServer(tiny.model("llama")).serving() as server:
        assert main([*arguments, "--teacher", server.url, "--teacher-model", "tiny", "--vocab-size", "320"]) == 0
    assert "a server; entropies are those of the most likely tokens" in capsys.readouterr().out
    assert CacheReader(tmp_path / "out").manifest.teacher.name == "tiny"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--teacher", "http://127.0.0.1:1"], "`--teacher-model NAME`"),
        (["--teacher", "http://127.0.0.1:1", "--teacher-model", "tiny"], "`--vocab-size N`"),
        (["--teacher", "folder", "--teacher-model", "tiny"], "are of a server"),
    ],
)
def test_what_a_server_needs_is_said(tmp_path, given, message, capsys):
    assert main(["cache", "build", "--dataset", "never", "--out", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err


def test_verify_tells_the_teacher_from_another_by_its_exit_status(tmp_path, teacher, capsys):
    out, dataset = str(tmp_path / "out"), save("saved", tmp_path)
    assert main(["cache", "build", "--teacher", teacher, "--dataset", dataset, "--out", out]) == 0
    capsys.readouterr()
    assert main(["cache", "verify", out, "--teacher", teacher, "--rows", "1", "--all"]) == 0
    said = capsys.readouterr().out
    assert "of 1 rows, digests of 1 shards" in said
    assert "KL at T = 1" in said
    assert "the cache is what the teacher says" in said
    tiny.model("llama", seed=1).save_pretrained(tmp_path / "other")
    assert main(["cache", "verify", out, "--teacher", str(tmp_path / "other")]) == 1
    said = capsys.readouterr().out
    assert "another teacher: weights" in said
    assert "the cache is not what the teacher says" in said
    shard = next((tmp_path / "out").glob("*.kd"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["cache", "verify", out, "--teacher", teacher]) == 2
    assert f"{shard.name} is damaged" in capsys.readouterr().err


def test_import_distillkit_says_what_it_read(tmp_path, teacher, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    kit, out = str(polynomial_files(tmp_path / "kit")), tmp_path / "out"
    assert main(["cache", "import-distillkit", kit, str(out), "--tokenizer", teacher, "--teacher", "org/a"]) == 0
    said = capsys.readouterr().out
    assert f"{CacheReader(out).manifest.tokens:,} tokens read; the ids of 0 had more" in said
    assert "files of DistillKit" in said
    assert [row.ids.tolist() for row in CacheReader(out).rows()] == texts()
