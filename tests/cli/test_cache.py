"""`hf-distill cache` builds a cache from files alone and says what it is."""

import json

import pytest
from datasets import Dataset, DatasetDict

from hf_distill.cache import CacheReader
from hf_distill.cli.main import main
from tests import tiny


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
    [("rows.txt", "expected a file of"), ("text.jsonl", "no `input_ids`")],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, teacher, dataset, message, capsys):
    (tmp_path / dataset).write_text('{"text": "a"}\n')
    arguments = ["--teacher", teacher, "--dataset", str(tmp_path / dataset), "--out", str(tmp_path / "out")]
    assert main(["cache", "build", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert main(["cache", "info", str(tmp_path / "out")]) == 2
    assert "holds no cache" in capsys.readouterr().err
