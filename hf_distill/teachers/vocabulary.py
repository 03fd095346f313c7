"""Whether the columns of the student's and the teacher's logits stand for the same tokens."""

from __future__ import annotations

import warnings

from transformers import PreTrainedTokenizerBase

from hf_distill.vocabularies import disagreement


def check_vocabularies(
    student_tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    student_vocab_size: int,
    teacher_vocab_size: int,
) -> None:
    """Check that an id means the same token to both models.

    Models of one family are often padded to different sizes (Qwen2.5: 151,936 and 152,064 columns for 151,665 tokens).
    The columns beyond the smaller size are dropped from both distributions, with a warning that names the shared size.

    A token that only the student's tokenizer has is accepted: a `[PAD]` that was added to the student is never read by
    the teacher. Any other such token gives a warning here, because the data may not contain it, and a ValueError
    from the teacher at the first batch that does. Tokens that only the teacher has are harmless.

    Args:
        student_tokenizer: Tokenizer that made the training data; None when it is not known.
        teacher_tokenizer: Tokenizer that the teacher was trained with; None when it is not known.
        student_vocab_size: Columns of the student's logits.
        teacher_vocab_size: Columns of the teacher's logits.

    Raises:
        ValueError: The tokenizers give one id to two tokens, or one token two ids; three of them are named.
    """
    shared = min(student_vocab_size, teacher_vocab_size)
    sizes = f"the student's logits have {student_vocab_size} columns and the teacher's {teacher_vocab_size}"
    if student_tokenizer is None or teacher_tokenizer is None:
        if student_vocab_size != teacher_vocab_size:
            missing = "student" if student_tokenizer is None else "teacher"
            warnings.warn(
                f"The {missing} has no tokenizer, so it cannot be checked that ids mean the same tokens, and {sizes}. "
                f"Both are sliced to the first {shared}; pass the {missing}'s tokenizer to have them checked.",
                stacklevel=2,
            )
        return
    student_ids, teacher_ids = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if student_ids != teacher_ids:
        _refuse_disagreement(student_ids, teacher_ids)
        _warn_about_unknown_tokens(student_ids, teacher_ids, student_tokenizer.pad_token)
    if student_vocab_size != teacher_vocab_size:
        warnings.warn(
            f"The tokenizers agree, but {sizes}: both distributions are sliced to the {shared} that they share.",
            stacklevel=2,
        )


def _refuse_disagreement(student_ids: dict[str, int], teacher_ids: dict[str, int]) -> None:
    """Raise where an id that both tokenizers can produce is another token, or a token another id."""
    count, examples = disagreement(student_ids, teacher_ids)
    if not count:
        return
    raise ValueError(
        f"Student and teacher have different tokenizers: they disagree on {count} of {len(student_ids)} "
        f"tokens ({examples}). Logits can only be compared column by column if they share a vocabulary: use a teacher "
        "of the student's family, or build the student from the teacher's tokenizer with "
        "`AutoTokenizer.from_pretrained(teacher_name)`."
    )


def _warn_about_unknown_tokens(
    student_ids: dict[str, int], teacher_ids: dict[str, int], pad_token: str | None
) -> None:
    """Warn of tokens that the student's tokenizer can produce and the teacher has never seen."""
    unknown = sorted(student_ids.keys() - teacher_ids.keys() - {pad_token}, key=student_ids.__getitem__)
    if unknown:
        names = ", ".join(f"{token!r} (id {student_ids[token]})" for token in unknown[:3])
        warnings.warn(
            f"The student's tokenizer has {len(unknown)} tokens that the teacher's lacks, such as {names}. The "
            "teacher cannot judge text that contains them: a batch with one raises a ValueError. Remove such rows, or "
            "prepare the data with the teacher's tokenizer.",
            stacklevel=3,
        )
