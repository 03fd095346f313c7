"""Where two tokenizers give one id to two tokens, or one token two ids."""

from __future__ import annotations

import heapq
from collections.abc import Mapping


EXAMPLES = 3


def disagreement(student_ids: Mapping[str, int], teacher_ids: Mapping[str, int]) -> tuple[int, str]:
    """Count the student's tokens that are others to the teacher, and name some.

    Tokens that only one side has, at an id that the other does not use, are no disagreement.

    Args:
        student_ids: `get_vocab()` of the student's tokenizer.
        teacher_ids: That of the teacher's.

    Returns:
        How many, and the first three of them in words; 0 and no words where there are none.
    """
    taken = set(teacher_ids.values())
    # Set operations on the items keep the loop short: between tokenizers of one family they leave a few added tokens.
    differing = student_ids.items() - teacher_ids.items()
    disagreeing = [(i, token) for token, i in differing if i in taken or token in teacher_ids]
    teacher_tokens = {i: token for token, i in teacher_ids.items()} if disagreeing else {}
    examples = "; ".join(
        f"id {i} is {token!r} to the student and {teacher_tokens.get(i)!r} to the teacher"
        for i, token in heapq.nsmallest(EXAMPLES, disagreeing)
    )
    return len(disagreeing), examples
