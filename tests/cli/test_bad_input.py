"""What a user gets wrong ends in one line that names it, and in the exit status 2: no traceback, no half of a run."""

import json
import shlex

import pytest
from peft import LoraConfig, get_peft_model

from hf_distill.cli.main import main
from tests import tiny


ROWS = {
    "texts": [{"text": text} for text in tiny.SENTENCES * 3],
    "other": [{"text": text[::-1]} for text in tiny.SENTENCES * 3],
    "empty": [],
    "columns": [{"review": "good", "stars": 5}] * 4,
    "numbers": [{"text": 3}] * 4,
    "gaps": [{"text": "good"}, {"text": None}],
    "blank": [{"text": ""}] * 8,
    "strings": [{"input_ids": ["a", "b"]}] * 4,
    "words": [{"messages": "hello"}] * 4,
    "silent": [{"messages": []}] * 4,
    "prompts": [{"prompt": "hello there"}] * 4,
}
MODELS = "--student student --teacher teacher"
SIDES = "--non-members other.jsonl --model"
TRAIN = "train --output_dir out --report_to none --bf16 false --use_cpu --max_steps 1"
PAIR = "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name"
COMPRESS = "compress --output_dir out --report_to none --bf16 false --use_cpu --max_steps 1"
CASES = [
    (f"evaluate {MODELS} --dataset nowhere.jsonl", "`--dataset` is nowhere.jsonl, and there is no such file"),
    (f"evaluate {MODELS} --dataset no/such", "`--dataset` is no/such, whose split 'test' cannot be read"),
    (f"evaluate {MODELS} --dataset folder", "`--dataset` is folder, a folder that holds no dataset"),
    (f"evaluate {MODELS} --dataset broken.jsonl", "`--dataset` is broken.jsonl, which cannot be read as json"),
    (f"evaluate {MODELS} --dataset empty.jsonl", "`--dataset` is empty.jsonl, which has no rows"),
    (f"evaluate {MODELS} --dataset strings.jsonl", "`input_ids` is ['a', 'b']; expected a list of token ids"),
    (f"evaluate {MODELS} --dataset texts.jsonl --assistant-only-loss", "`--assistant-only-loss` is of chats"),
    (f"evaluate {MODELS} --dataset texts.jsonl --out folder", "`--out` is folder, which is a folder"),
    ("evaluate --student cut --teacher teacher --dataset texts.jsonl", "cut short or damaged"),
    ("evaluate --student nowhere --teacher teacher --dataset texts.jsonl", "No model can be read from 'nowhere'"),
    ("evaluate --student foreign --teacher teacher --dataset texts.jsonl", "have different tokenizers: 1 tokens"),
    (f"audit --members texts.jsonl {SIDES} student --reference foreign", "`--model` and `--reference` have different"),
    (f"diagnose {MODELS} --dataset texts.jsonl --trainer-state no.json", "There is no file no.json"),
    (f"diagnose {MODELS} --dataset numbers.jsonl", "has 3 in `text`; expected a string"),
    (f"diagnose {MODELS} --dataset texts.jsonl --json folder", "`--json` is folder, which is a folder"),
    (f"audit --members texts.jsonl {SIDES} student --before report.json", "is not the report of an audit (KeyError"),
    (f"audit --members texts.jsonl {SIDES} student --max-length 0", "`max_length` is 0; expected at least 1"),
    (f"audit --members empty.jsonl {SIDES} student", "`--members` is empty.jsonl, which has no rows"),
    ("plan --teacher nowhere --student student", "`--teacher` is nowhere, and no model can be read there"),
    ("plan --teacher teacher --student adapter", "`--student` is adapter, a PEFT adapter"),
    ("plan --teacher teacher --student student --tokens nan", "`--tokens` is nan; expected a number above 0"),
    ("plan --teacher teacher --student student --gpu-memory inf", "`--gpu-memory` is inf"),
    ("card student --report report.json", "report.json is not a retention report (TypeError"),
    ("card student --regenerate", "There is no file student/card.json; expected the data of a card"),
    ("push student me/x --report nowhere.json", "There is no file nowhere.json; expected a retention report"),
    ("cache build --out new --teacher teacher --dataset numbers.jsonl", "column `text` is of int64; expected strings"),
    ("cache build --out new --teacher nowhere --dataset texts.jsonl", "`--teacher` is nowhere, and no tokenizer"),
    ("cache build --out new --teacher cut --dataset texts.jsonl", "cut short or damaged"),
    ("train", "`--model_name_or_path` is missing"),
    ("train --config broken.yaml", "broken.yaml"),
    (f"{TRAIN} {PAIR} columns.jsonl", "The dataset has the columns ['review', 'stars']"),
    (f"{TRAIN} {PAIR} numbers.jsonl", "column `text` is of int64; expected strings"),
    (f"{TRAIN} {PAIR} gaps.jsonl", "Row 1 of the dataset has None in `text`"),
    (f"{TRAIN} {PAIR} blank.jsonl", "The train dataset has no row with a token to predict"),
    (f"{TRAIN} {PAIR} words.jsonl", "column `messages` is of string; expected messages"),
    (f"{TRAIN} {PAIR} silent.jsonl", "Row 0 of the dataset has [] in `messages`"),
    (f"{TRAIN} {PAIR} prompts.jsonl", "The dataset has the columns ['prompt']"),
    (
        f"{TRAIN} --teacher_model_name_or_path teacher --dataset_name texts.jsonl --model_name_or_path adapter",
        "a PEFT",
    ),
    (
        f"{TRAIN} --teacher_model_name_or_path teacher --dataset_name texts.jsonl --model_name_or_path no",
        "` is no, and",
    ),
    ("compress --config broken.yaml", "broken.yaml"),
    (f"{COMPRESS} --teacher_model_name_or_path teacher --dataset_name blank.jsonl --order KD", "nothing to predict"),
    (f'{COMPRESS} --prune \'{{"params_ratio": "a"}}\'', "`params_ratio` is 'a'; expected a share"),
    (f'{COMPRESS} --prune \'{{"drop_layers": "abc"}}\'', "`drop_layers` is 'abc'; expected numbers of layers"),
    (f'{COMPRESS} --importance \'{{"layer": "taylor"}}\'', "`importance` is {'layer': 'taylor'}; expected some of"),
    (f"{COMPRESS} --max_length 0", "`max_length` is 0; expected a whole number >= 2"),
    (
        f"{COMPRESS} --teacher_model_name_or_path teacher --dataset_name texts.jsonl --order P "
        "--prune '{\"num_hidden_layers\": 2}' --model_kwargs '{\"attention\": 1}'",
        "unexpected keyword argument 'attention'",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, an adapter, a model whose weights are cut short, and datasets and files with one fault each."""
    folder = tmp_path_factory.mktemp("given")
    for name, layers in (("student", 2), ("teacher", 3), ("cut", 2)):
        tiny.model(layers=layers).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    tiny.model().save_pretrained(folder / "foreign")
    foreign = tiny.tokenizer(vocab_size=299)
    foreign.add_tokens(["zebra"])
    foreign.save_pretrained(folder / "foreign")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder / "adapter")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "folder").mkdir()
    (folder / "broken.jsonl").write_text('{"text": \n')
    (folder / "broken.yaml").write_text("a: [1\nb: }")
    (folder / "report.json").write_text('{"rows": 3}')
    return folder


@pytest.mark.parametrize(("command", "message"), CASES, ids=[command[:60] for command, _ in CASES])
def test_a_mistake_is_named_in_a_line(command, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = {path.name for path in folder.iterdir()}

    assert main(shlex.split(command)) == 2

    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert {path.name for path in folder.iterdir()} - before <= {"out"}
