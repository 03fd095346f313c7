"""A small server on 127.0.0.1 that speaks vLLM's completions API with `prompt_logprobs`, over a tiny model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass
class ModelServer:
    """What is served, and what went on.

    Args:
        model: The model.
        name: What it is called.
        max_model_len: Tokens read and written for a request.
        max_logprobs: Most tokens at a position.
        mode: "raw_logprobs" as vLLM's default; "raw_logits"; "processed_logprobs", which applies the temperature of
            the request; "top_k", which normalises over the tokens that it gives; "none" knows no `prompt_logprobs`.
        default_temperature: Where a request has none, as from the model's generation config.
        api_key: Asked for, if there is one.
        delay: Seconds that each answer takes at least.
        failures: HTTP statuses to answer the next completions with; 0 closes the connection.
        dies_after: Completions that are answered; all connections after them are closed. None for all.
    """

    model: PreTrainedModel
    name: str = "tiny"
    max_model_len: int = 64
    max_logprobs: int = 20
    mode: str = "raw_logprobs"
    default_temperature: float = 0.5
    api_key: str | None = None
    delay: float = 0.0
    failures: list[int] = field(default_factory=list)
    dies_after: int | None = None
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def serving(self) -> Iterator[ModelServer]:
        """Serve until the block ends."""
        served = self

        class Handler(_Handler):
            server_state = served

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The answer to a completion, and its HTTP status."""
        prompt, k = body["prompt"], body["prompt_logprobs"]
        if body["model"] != self.name:
            return 404, _error(f"The model `{body['model']}` does not exist.")
        if k > self.max_logprobs:
            return 400, _error(
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            )
        if len(prompt) + body["max_tokens"] > self.max_model_len:
            return 400, _error(f"This model's maximum context length is {self.max_model_len} tokens.")
        choice = {"index": 0, "text": "x", "finish_reason": "length"}
        if self.mode != "none":
            choice["prompt_logprobs"] = self._entries(body)
        return 200, {"object": "text_completion", "model": self.name, "choices": [choice]}

    def _entries(self, body: dict[str, Any]) -> list[dict[str, Any] | None]:
        prompt, k = body["prompt"], body["prompt_logprobs"]
        with self._lock, torch.no_grad():
            logits = self.model(input_ids=torch.tensor([prompt])).logits[0].float()
        if self.mode == "processed_logprobs":
            logits = logits / body.get("temperature", self.default_temperature)
        values = logits if self.mode == "raw_logits" else logits.log_softmax(-1)
        entries: list[dict[str, Any] | None] = [None]
        for row, label in zip(values, prompt[1:], strict=False):
            top = row.topk(k)
            kept = top.values.log_softmax(-1) if self.mode == "top_k" else top.values
            entry = {str(label): _token(row[label], 1 + int((row > row[label]).sum()))}
            for rank, (token, value) in enumerate(zip(top.indices.tolist(), kept, strict=True), start=1):
                entry[str(token)] = _token(value, rank)
            entries.append(entry)
        return entries


class _Handler(BaseHTTPRequestHandler):
    server_state: ModelServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        state = self.server_state
        if self._is_allowed():
            card = {"id": state.name, "object": "model", "root": state.name, "max_model_len": state.max_model_len}
            self._answer(200, {"object": "list", "data": [card]})

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        with state._lock:
            state.requests.append(body)
            state._at_once += 1
            state.most_at_once = max(state.most_at_once, state._at_once)
            failure = state.failures.pop(0) if state.failures else None
            if state.dies_after is not None and len(state.requests) > state.dies_after:
                failure = 0
        time.sleep(state.delay)
        status, answer = (failure, _error("not now")) if failure is not None else state.complete(body)
        with state._lock:
            state._at_once -= 1
        if status:
            self._answer(status, answer)
        else:
            self.close_connection = True

    def _is_allowed(self) -> bool:
        key = self.server_state.api_key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._answer(401, {"error": "Unauthorized"})
        return False

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Nothing on the screen."""


def _token(value: torch.Tensor, rank: int) -> dict[str, Any]:
    # What JSON cannot hold, vLLM clamps.
    return {"logprob": max(float(value), -9999.0), "rank": rank, "decoded_token": "x"}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
