"""A teacher behind a server: vLLM, or another with OpenAI's completions API and `prompt_logprobs`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from hf_distill.cache.client import Client, RefusedError
from hf_distill.cache.encoding import Columns, Encoding
from hf_distill.cache.manifest import TeacherIdentity
from hf_distill.cache.prompt_logprobs import check_raw, parse_prompt_logprobs
from hf_distill.cache.rows import Row
from hf_distill.cache.top_tokens import TopTokens, join, topk_columns, topk_of


API_KEY = "VLLM_API_KEY"
# Sampling that leaves every probability as it is. Said in each request: what is left out, vLLM takes from the model's
# generation config, and a server that processes its log-probabilities would apply it to them.
UNPROCESSED = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
# vLLM generates one token at least; it is thrown away.
GENERATED = 1


@dataclass(frozen=True)
class RemoteTeacher:
    """A teacher that answers at an address, for `build_cache`.

    Only distributions at temperature 1 can be had from a server: those at others need the whole vocabulary.

    Args:
        url: The address of its API, such as "http://127.0.0.1:8000/v1".
        model: Its name there; for vLLM the name that it was started with, or `--served-model-name`.
        vocab_size: Columns of its logits, `vocab_size` in its config.json.
        api_key: Key of the API; the environment's VLLM_API_KEY if None. It is written nowhere.
        requests: How many are under way at once.
        timeout: Seconds until a request that is not answered is made again.
        attempts: How often a request is made before the server counts as gone.
        wait: Seconds before the second attempt; each later one waits twice as long.

    Example:
        ```python
        # vllm serve meta-llama/Llama-3.1-70B-Instruct --max-logprobs 50
        teacher = RemoteTeacher("http://127.0.0.1:8000/v1", "meta-llama/Llama-3.1-70B-Instruct", 128256)
        build_cache(teacher, dataset, "labels", encoding="topk", k=50)
        ```
    """

    url: str
    model: str
    vocab_size: int
    api_key: str | None = field(default=None, repr=False)
    requests: int = 16
    timeout: float = 600.0
    attempts: int = 6
    wait: float = 1.0

    def client(self) -> Client:
        """Requests to the server."""
        url = self.url.rstrip("/").removesuffix("/v1") + "/v1"
        key = self.api_key or os.environ.get(API_KEY)
        return Client(url, key, timeout=self.timeout, attempts=self.attempts, wait=self.wait)

    def identity(self) -> TeacherIdentity:
        """What is known of it: its address may change."""
        return TeacherIdentity(self.model, None, None, None, self.vocab_size)


class RemoteSource:
    """Asks a server for the columns of the `topk` encoding.

    Of the entropy it knows what the k tokens and the rest together have, which is a lower bound.

    Args:
        teacher: Where it is and what it is called.
        encoding: A `topk` at temperature 1.
        longest: Tokens of the longest row.

    Raises:
        ValueError: The encoding needs more than a server gives, or the server does not serve this model, rows of this
            length or so many log-probabilities.
        ConnectionError: The server does not answer.
    """

    def __init__(self, teacher: RemoteTeacher, encoding: Encoding, longest: int) -> None:
        self._encoding = topk_of(encoding, "a server")
        self._teacher = teacher
        self._client = teacher.client()
        served = self._length_served()
        if longest + GENERATED > served:
            raise ValueError(
                f"The longest row has {longest} tokens, and the server at {self._client.url} reads "
                f"{served - GENERATED} (and writes {GENERATED}); start it with "
                f"`--max-model-len {longest + GENERATED}`, or drop longer rows."
            )
        self._score(np.zeros(2, dtype=np.int32), "a prompt of two tokens")

    def columns(self, rows: Sequence[Row]) -> Columns:
        """The columns of all kept tokens of the rows.

        Raises:
            ValueError: An answer is not what was asked for.
            ConnectionError: The server went away.
        """
        pool = ThreadPoolExecutor(self._teacher.requests)
        try:
            parts = list(pool.map(self.top_tokens, rows))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        top = join(parts)
        check_raw(top, self._encoding.vocab_size)
        return topk_columns(top, self._encoding.vocab_size)

    def shared_tensors(self, row: Row) -> dict[str, Tensor]:
        """See `Source`."""
        return {}

    def top_tokens(self, row: Row) -> TopTokens:
        """What the server says at the kept positions of a row."""
        return parse_prompt_logprobs(self._score(row.ids, f"row {row.key.hex()}"), row, self._encoding.k)

    def _score(self, ids: np.ndarray, what: str) -> Sequence[Mapping[str, Any] | None]:
        """The server's `prompt_logprobs` of some tokens."""
        body = {
            "model": self._teacher.model,
            "prompt": ids.tolist(),
            "max_tokens": GENERATED,
            "prompt_logprobs": self._encoding.k,
            **UNPROCESSED,
        }
        try:
            answer = self._client.post("completions", body)
        except RefusedError as refusal:
            raise ValueError(
                f"The server refused {what}: {refusal.message}{_fix(refusal, self._encoding.k)}"
            ) from refusal
        entries = answer["choices"][0].get("prompt_logprobs")
        if entries is None:
            raise ValueError(
                f"The server at {self._client.url} gives no `prompt_logprobs`; vLLM does, in `POST /v1/completions`. "
                "Serve the teacher with vLLM, or load it here and give it to `build_cache`."
            )
        return entries

    def _length_served(self) -> float:
        """The tokens that the server reads and writes for a request, where it says so."""
        try:
            served = {card["id"]: card for card in self._client.get("models")["data"]}
        except RefusedError as refusal:
            raise ValueError(
                f"The server refused to list its models: {refusal.message}{_fix(refusal, 0)}"
            ) from refusal
        if self._teacher.model not in served:
            raise ValueError(
                f"`model` is {self._teacher.model!r}, and the server at {self._client.url} serves {sorted(served)}."
            )
        return served[self._teacher.model].get("max_model_len") or math.inf


def _fix(refusal: RefusedError, k: int) -> str:
    """What can be done about a refusal, where that is known."""
    if refusal.status in {401, 403}:
        return f" Give the key as `api_key` or in the environment's {API_KEY}."
    if "max allowed" in refusal.message:
        return f" Start vLLM with `--max-logprobs {k}`, or cache fewer tokens (`k`)."
    return ""
