"""Benchmarks of what models write: greedy generations from prompts, scored against references."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from hf_distill.anatomy import unwrap
from hf_distill.evaluation.benchmarks import Benchmark, check_positive
from hf_distill.evaluation.bootstrap import ItemScores
from hf_distill.evaluation.scoring import Lineup, module_of
from hf_distill.evaluation.text_scores import ROUGE_KINDS, exact_match, rouge


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt", "completion")


class GenerationBenchmark(Benchmark):
    """A score of greedy generations, one prompt an item; benchmarks with the same settings share the generations.

    Prompts are padded on the left, with a copy of the tokenizer; what a model's own `generation_config` says of
    sampling and penalties is not used, so that student and teacher are asked the same.

    Args:
        dataset: `prompt` and `completion` columns as TRL's: both text, or both lists of messages, which go through
            the tokenizer's chat template.
        max_new_tokens: A generation is cut after so many tokens, or at the end-of-text token.
        until: It is cut before the first of these texts too, for base models that do not stop by themselves.
        batch_size: Prompts that are generated from at once.
        name: How reports call it; the metric's name when not given.
        license: Licence of the dataset.

    Raises:
        ValueError: The dataset is empty or has no such columns; a size is below 1.
    """

    higher_is_better = True
    tasks = frozenset({"causal_lm"})

    def __init__(
        self,
        dataset: Dataset,
        *,
        max_new_tokens: int = 64,
        until: Sequence[str] = (),
        batch_size: int = 8,
        name: str | None = None,
        license: str | None = None,
    ) -> None:
        super().__init__(name, license)
        check_positive(max_new_tokens=max_new_tokens, batch_size=batch_size)
        _check_columns(dataset)
        if isinstance(until, str):
            raise ValueError(f"`until` is the text {until!r}; expected a list of texts: `until=[{until!r}]`.")
        self.dataset = dataset
        self.max_new_tokens = max_new_tokens
        self.until = tuple(until)
        self.batch_size = batch_size

    @abstractmethod
    def score_text(self, prediction: str, reference: str) -> float:
        """Score one generation."""

    def check(self, lineup: Lineup) -> None:
        """Check the tokenizer and the lengths of the prompts.

        Raises:
            ValueError: There is no tokenizer, a teacher is no model, or a prompt and its generation are longer than
                a model's positions.
        """
        super().check(lineup)
        lineup.check_text_models(type(self).__name__)
        longest = max(len(ids) for ids in self._prompts(lineup)) + self.max_new_tokens
        for role, model in lineup.models.items():
            limit = _positions(module_of(model))
            if limit is not None and longest > limit:
                raise ValueError(
                    f"The longest prompt and `max_new_tokens`={self.max_new_tokens} are {longest} tokens, but the "
                    f"{role} has {limit} positions; drop long prompts, or give a smaller `max_new_tokens`."
                )

    def score(self, lineup: Lineup) -> dict[str, ItemScores]:
        """Generate, once for all benchmarks that ask for the same, and score."""
        references = [_text(completion) for completion in self.dataset["completion"]]
        scores = {}
        for role in lineup.models:
            key = ("texts", role, id(self.dataset), self.max_new_tokens, self.batch_size)
            texts = lineup.once(key, partial(self._generate, lineup, role))
            pairs = zip((self._cut(text) for text in texts), references, strict=True)
            values = np.array([self.score_text(*pair) for pair in pairs], dtype=np.float64)
            scores[role] = ItemScores(values, np.ones(len(values)))
        return scores

    def _prompts(self, lineup: Lineup) -> list[list[int]]:
        return lineup.once(("prompts", id(self.dataset)), lambda: _encode(self.dataset, lineup.tokenizer))

    def _generate(self, lineup: Lineup, role: str) -> list[str]:
        """Generate from every prompt, longest first so that batches hold little padding."""
        prompts, texts = self._prompts(lineup), [""] * len(self.dataset)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        with lineup.running(role) as model:
            for batch in tqdm(batches, desc=f"Generating ({role})", disable=None, leave=False):
                written = generate(model, [prompts[i] for i in batch], lineup.tokenizer, self.max_new_tokens)
                for index, text in zip(batch, written, strict=True):
                    texts[index] = text
        return texts

    def _cut(self, text: str) -> str:
        return text[: min((text.find(mark) for mark in self.until if mark in text), default=None)]


class ExactMatch(GenerationBenchmark):
    """The share of generations that equal their reference, but for white space around them.

    It is the shipped `exact_match` metric.
    """

    metric = "exact_match"

    def score_text(self, prediction: str, reference: str) -> float:
        """1.0 or 0.0."""
        return exact_match(prediction, reference)


class Rouge(GenerationBenchmark):
    """ROUGE of generations, the mean F-measure, as the shipped `rouge` metric and Google's `rouge_score`.

    Args:
        dataset: As that of every `GenerationBenchmark`.
        kind: "rouge1", "rouge2" or "rougeL".
        **kwargs: Arguments of `GenerationBenchmark`.

    Raises:
        ValueError: `kind` is another one; see also `GenerationBenchmark`.
    """

    def __init__(self, dataset: Dataset, kind: str = "rougeL", **kwargs: Any) -> None:
        if kind not in ROUGE_KINDS:
            raise ValueError(
                f"`kind` is {kind!r}; expected one of {', '.join(ROUGE_KINDS)}: Rouge(dataset, 'rougeL')."
            )
        self.metric = kind
        super().__init__(dataset, **kwargs)

    def score_text(self, prediction: str, reference: str) -> float:
        """Between 0 and 1."""
        return rouge(prediction, reference, self.metric)


def generate(
    model: Any, prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[str]:
    """Continue prompts greedily.

    Args:
        model: A causal language model, wrapped or not, in eval mode.
        prompts: Token ids.
        tokenizer: Decodes; it is not changed.
        max_new_tokens: Per prompt.

    Returns:
        The new text of each prompt, without special tokens.
    """
    from transformers import GenerationConfig

    base = unwrap(model)
    while not hasattr(model, "generate"):  # DDP and its like; a PEFT model generates itself
        model = model.module
    ends = getattr(base.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    first_end = ends[0] if isinstance(ends, list) else ends
    pad = next((token for token in (tokenizer.pad_token_id, first_end) if token is not None), 0)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=base.device)
    own = base.generation_config
    # Everything that the model's own settings would add is left out: they may sample or punish repetitions.
    base.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    try:
        written = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens
        )
    finally:
        base.generation_config = own
    return tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)


def _check_columns(dataset: Any) -> None:
    from datasets import Dataset

    if not isinstance(dataset, Dataset) or len(dataset) == 0:
        found = "no rows" if isinstance(dataset, Dataset) else f"the type {type(dataset).__name__}"
        raise ValueError(f"`dataset` has {found}; expected a datasets.Dataset of one split with at least one row.")
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`dataset` has the columns {dataset.column_names}; expected `prompt` and `completion`. Rename yours: "
            f'dataset.rename_column("answer", "{missing[0]}").'
        )


def _encode(dataset: Dataset, tokenizer: Any) -> list[list[int]]:
    """Prompts as token ids, chats through the tokenizer's template."""
    tokenizer = copy.deepcopy(tokenizer)  # it may remember truncation and padding
    prompts = dataset.with_format(None)["prompt"]
    if isinstance(prompts[0], str):
        encoded = tokenizer(list(prompts), padding=False)["input_ids"]
    else:
        template = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        encoded = [tokenizer.apply_chat_template(messages, **template) for messages in prompts]
    empty = [index for index, ids in enumerate(encoded) if not ids]
    if empty:
        raise ValueError(f"Row {empty[0]} of `dataset` has an empty `prompt`; expected text to continue.")
    return encoded


def _text(completion: Any) -> str:
    """A reference: text, or the content of the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _positions(model: Any) -> int | None:
    """How many positions a model has; None where its config does not say."""
    return getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
