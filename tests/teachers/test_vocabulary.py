from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from hf_distill.teachers import check_vocabularies
from tests import tiny


def tokenizer_of(vocabulary: dict[str, int], pad_token: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: dict(vocabulary), pad_token=pad_token)


def test_equal_tokenizers_and_sizes_pass_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_vocabularies(tiny.tokenizer(), tiny.tokenizer(), 320, 320)


def test_padded_sizes_give_one_warning_that_names_the_shared_size():
    with pytest.warns(UserWarning, match="sliced to the 304") as caught:
        check_vocabularies(tiny.tokenizer(), tiny.tokenizer(), 304, 320)
    assert len(caught) == 1


def test_different_tokenizers_raise_and_name_three_disagreeing_tokens():
    student, teacher = tiny.tokenizer(), tiny.tokenizer()
    swapped = student.get_vocab()
    swapped["A"], swapped["B"], swapped["C"] = swapped["B"], swapped["C"], swapped["A"]
    ids = teacher.get_vocab()
    with pytest.raises(ValueError, match="different tokenizers") as error:
        check_vocabularies(tokenizer_of(swapped), teacher, 320, 320)
    message = str(error.value)
    assert "disagree on 3 of" in message
    for own, other in (("A", "B"), ("B", "C"), ("C", "A")):
        assert f"id {ids[other]} is {own!r} to the student and {other!r} to the teacher" in message
    assert "from_pretrained" in message


def test_one_token_with_two_ids_is_a_disagreement():
    with pytest.raises(ValueError, match="id 9 is 'b' to the student and None to the teacher"):
        check_vocabularies(tokenizer_of({"a": 0, "b": 9}), tokenizer_of({"a": 0, "b": 1}), 10, 10)


def test_an_added_pad_token_of_the_student_is_accepted_in_silence():
    student = tiny.tokenizer(extra_tokens=("[PAD]",))
    student.pad_token = "[PAD]"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_vocabularies(student, tiny.tokenizer(), 320, 320)


def test_other_added_tokens_of_the_student_give_a_warning_that_names_them():
    student = tiny.tokenizer(extra_tokens=("<tool>", "<think>"))
    with pytest.warns(UserWarning, match=r"has 2 tokens that the teacher's lacks, such as '<tool>' \(id \d+\)"):
        check_vocabularies(student, tiny.tokenizer(), 320, 320)


def test_tokens_that_only_the_teacher_has_are_harmless():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_vocabularies(tiny.tokenizer(), tiny.tokenizer(extra_tokens=("<image>",)), 320, 320)


@pytest.mark.parametrize("missing", ["student", "teacher"])
def test_without_a_tokenizer_only_different_sizes_give_a_warning(missing):
    pair = {"student": tiny.tokenizer(), "teacher": tiny.tokenizer()} | {missing: None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_vocabularies(pair["student"], pair["teacher"], 320, 320)
    with pytest.warns(UserWarning, match=f"{missing} has no tokenizer.*first 304"):
        check_vocabularies(pair["student"], pair["teacher"], 320, 304)
