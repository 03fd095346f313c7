from __future__ import annotations

import pytest

from hf_distill.cards.check import check_card, without_paths


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("teacher: /opt/models/teacher", "absolute path"),
        ("Trained on `/data/reviews`.", "absolute path"),
        ("python train.py --out=/mnt/x", "absolute path"),
        ("path:/var/tmp/x", "absolute path"),
        ("[data](file:///srv/data)", "absolute path"),
        ("~/models/teacher", "absolute path"),
        (r"C:\Users\me\teacher", "absolute path"),
        (r"\\server\share\teacher", "absolute path"),
        ("| perplexity | nan |", "not a number"),
        ("value: .nan", "not a number"),
        ("value: NaN,", "not a number"),
        ("| perplexity | -inf |", "not a number"),
        ("seed: None", "missing value"),
        ("seed None.", "missing value"),
        ("seed: null", "missing value"),
        ("teacher {{ name }}", "placeholder"),
        ("{% if name %}", "placeholder"),
        ("[More Information Needed]", "placeholder"),
    ],
)
def test_what_must_not_be_published_is_refused_with_its_line(line, what):
    with pytest.raises(ValueError, match=f"{what}.*line 2"):
        check_card(f"# Title\n{line}\nrest\n")


@pytest.mark.parametrize(
    "line",
    [
        "https://huggingface.co/org/name and http://localhost:8080/a/b",
        "tokens/second, w/o, and/or, 1/2, 3/4/5, km / h, 40 tokens /s",
        "org/name, recipes/quickstart.py, ./outputs/run/x, ../a/b/c",
        "</details></p>",
        "None of the rows was seen in training.",
        "A finance model, nanochat, nan-tokenizer, Nancy; information, infinite",
        "{'a': {'b': 1}}",
        "ratio 3:1, 12:30",
    ],
)
def test_plain_text_is_left_alone(line):
    check_card(line)
    assert without_paths(line) == line


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python /srv/repo/recipes/quickstart.py --lora", "python quickstart.py --lora"),
        ("--out=/mnt/x/ --seed 1", "--out=x --seed 1"),
        ("teacher `/models/big one`", "teacher `big one`"),
        (r"C:\Users\me\teacher", "teacher"),
        ("[data](file:///srv/data)", "[data](data)"),
    ],
)
def test_paths_are_cut_to_their_last_part(line, expected):
    assert without_paths(line) == expected
    check_card(without_paths(line))
