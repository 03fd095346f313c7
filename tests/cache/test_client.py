from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hf_distill.cache.client import Client, RefusedError


@contextmanager
def answering(*answers: tuple[int, str, dict[str, str]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that gives its answers one after another; its address, and the headers of what it was asked."""
    left, asked = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(dict(self.headers))
            status, body, headers = left.pop(0)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


OK = (200, '{"fine": 1}', {})


def test_a_server_that_is_busy_or_fails_is_asked_again() -> None:
    with answering((500, "oh", {}), (429, "", {}), (503, "", {}), OK) as (url, asked):
        assert Client(url, wait=0.01).post("completions", {}) == {"fine": 1}
    assert len(asked) == 4


def test_waits_become_longer_and_a_server_may_ask_for_more() -> None:
    with answering((500, "", {}), (500, "", {}), OK) as (url, _):
        start = time.perf_counter()
        Client(url, wait=0.1).get("models")
        assert time.perf_counter() - start > 0.3
    with answering((429, "", {"Retry-After": "1"}), OK) as (url, _):
        start = time.perf_counter()
        Client(url, wait=0.01).get("models")
        assert time.perf_counter() - start > 1


def test_what_a_server_refuses_is_not_asked_again() -> None:
    message = "the prompt is too long"
    for body in ({"error": {"message": message}}, {"object": "error", "message": message}, {"error": message}):
        with answering((400, json.dumps(body), {}), OK) as (url, asked):
            with pytest.raises(RefusedError, match=f"HTTP 400: .*{message}"):
                Client(url).post("completions", {})
            assert len(asked) == 1


def test_a_server_that_is_gone_ends_with_what_to_do() -> None:
    with answering() as (url, _):
        pass
    with pytest.raises(
        ConnectionError, match=r"did not answer 3 times in a row .*refused.*run the same command again"
    ):
        Client(url, attempts=3, wait=0.01).get("models")


def test_an_answer_that_is_cut_off_is_asked_for_again() -> None:
    with answering((200, '{"fi', {"Content-Length": "11"}), OK) as (url, asked):
        assert Client(url, wait=0.01).get("models") == {"fine": 1}
    assert len(asked) == 2


def test_a_page_is_no_answer() -> None:
    with answering((200, "<html>", {})) as (url, _), pytest.raises(ValueError, match="JSON but with '<html>'"):
        Client(url).get("models")


def test_the_key_is_sent_and_never_shown() -> None:
    with answering((401, '{"error": "Unauthorized"}', {})) as (url, asked):
        client = Client(url, api_key="secret-7")
        with pytest.raises(RefusedError) as refusal:
            client.get("models")
    assert asked[0]["Authorization"] == "Bearer secret-7"
    assert "secret-7" not in f"{refusal.value} {client}"


def test_the_key_is_not_sent_to_where_a_server_points() -> None:
    with (
        answering(OK) as (other, asked_other),
        answering((302, "", {"Location": f"{other}/models"})) as (url, asked),
    ):
        Client(url, api_key="secret-7").get("models")
    assert "Authorization" in asked[0]
    assert "Authorization" not in asked_other[0]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="`url`"):
        Client(url)


def test_a_password_in_an_address_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match="holds a password") as error:
        Client("http://me:secret-7@host/v1")
    assert "secret-7" not in str(error.value)
