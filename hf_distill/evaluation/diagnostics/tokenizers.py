"""Whether both models read the same text: one meaning of each id, one template of chats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_distill.evaluation.diagnostics.report import Finding
from hf_distill.evaluation.rows import Row
from hf_distill.vocabularies import disagreement


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stand for what two speakers say: no template changes them, and no header holds them.
USER, ASSISTANT = "hfdistilluser", "hfdistillassistant"
# A header that is in fewer rows than this is not how the dataset was made.
MOST_ROWS = 0.5


def compare_vocabularies(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Finding | None:
    """Find ids that are one token to the student and another to the teacher."""
    student_ids = student.get_vocab()
    count, examples = disagreement(student_ids, teacher.get_vocab())
    if not count:
        return None
    return Finding(
        "tokenizer_mismatch",
        "the tokenizers disagree, so the teacher reads another text and its logits are of other tokens",
        {"tokens of the student": len(student_ids), "of these another to the teacher": count, "examples": examples},
        "take a teacher of the student's family, or build the student from the teacher's tokenizer "
        "(`AutoTokenizer.from_pretrained(teacher_name)`). Nothing else was measured: columns that stand for different "
        "tokens cannot be compared.",
    )


def compare_templates(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, rows: list[Row]
) -> Finding | None:
    """Find chats that are written as the student's template says, when the teacher's says otherwise."""
    ours, theirs = turn_header(student), turn_header(teacher)
    if not ours or not theirs or ours == theirs:
        return None
    texts = [_squeezed(student.decode(row["input_ids"])) for row in rows]
    found = {name: sum(header in text for text in texts) for name, header in (("ours", ours), ("theirs", theirs))}
    if found["ours"] < MOST_ROWS * len(rows) or found["theirs"] >= MOST_ROWS * len(rows):
        return None
    return Finding(
        "template_mismatch",
        "the chats are written in the student's template, and the teacher was trained on another one",
        {
            "rows": len(rows),
            "with the student's header": found["ours"],
            "with the teacher's": found["theirs"],
            "the student's header of an answer": repr(ours),
            "the teacher's": repr(theirs),
        },
        "write the chats in the teacher's template: `tokenizer.chat_template = teacher_tokenizer.chat_template` "
        "before the dataset is prepared, and save the student with it.",
    )


def turn_header(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a chat template writes between a user's turn and the answer, without white space.

    None for a tokenizer without a template, or one that leaves out what was said.
    """
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    if USER not in text or ASSISTANT not in text:
        return None
    return _squeezed(text.split(USER)[-1].split(ASSISTANT)[0])


def _squeezed(text: str) -> str:
    """Decoding may put spaces beside special tokens."""
    return "".join(text.split())
