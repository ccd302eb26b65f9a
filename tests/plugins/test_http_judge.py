"""The judge against a local server that answers well, late, with nonsense, or not at all."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from rlhf_engine import Prompt
from rlhf_engine.config import ConfigError, build
from rlhf_plugins.http_judge import HTTPJudge

Answer = tuple[int, dict[str, str], str]


def says(content: str | None) -> Answer:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


class Server(ThreadingHTTPServer):
    """Answers by `answer(question)`, and counts."""

    request_queue_size = 64
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[str], Answer] = lambda question: says("Score: 5")
        self.asked: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with self.server.lock:
            self.server.asked[question] += 1
            self.server.requests.append((self.path, dict(self.headers), body))
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        status, headers, said = self.server.answer(question)
        with self.server.lock:
            self.server.in_flight -= 1
        self.send_response(status)
        for name, value in {"Content-Length": str(len(said.encode())), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def judge(server: Server, **options: Any) -> HTTPJudge:
    return HTTPJudge(base_url=server.base_url, model="judge", question="{prompt}|{response}", **options)


def values(plugin: HTTPJudge, *texts: str) -> list[float]:
    return plugin.rlhf_reward(texts=list(texts), prompts=[Prompt(text="p")] * len(texts)).values.tolist()


def test_what_is_asked_and_what_comes_of_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = lambda question: says(f"I had thought of Score: 9, but no.\nScore: {len(question) / 2}")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    plugin = judge(server, key_variable="JUDGE_KEY", max_tokens=7, weight=0.5)
    prompts = [Prompt(text="{response}"), Prompt(text="é")]
    reward = plugin.rlhf_reward(texts=["{prompt}", "b"], prompts=prompts)
    assert list(server.asked) == ["{response}|{prompt}", "é|b"] or list(server.asked) == ["é|b", "{response}|{prompt}"]
    assert reward.values.tolist() == [9.5, 1.5]
    assert (reward.name, reward.weight, reward.values.dtype) == ("http_judge", 0.5, torch.float32)
    for path, headers, body in server.requests:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer secret"
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge", 7, 0)


def test_the_question_that_comes_with_it_asks_for_the_form_that_is_read(server: Server) -> None:
    plugin = HTTPJudge(base_url=server.base_url + "/", model="judge")
    assert values(plugin, "an answer") == [5]
    (question,) = server.asked
    assert "[Prompt]\np\n" in question
    assert "[Response]\nan answer\n" in question
    assert '"Score: N"' in question


@pytest.mark.parametrize("content", ["7", "", None, "Score: high", "Score: 11", "Score: -1", "SCORE: 5"])
def test_an_answer_without_a_score_in_range_abstains(server: Server, content: str | None) -> None:
    server.answer = lambda question: says(content if question == "p|bad" else "Score: 3")
    bad, good = values(judge(server), "bad", "good")
    assert math.isnan(bad)
    assert good == 3


def test_the_range_and_the_pattern_are_options(server: Server) -> None:
    server.answer = lambda question: says("-0.5 of 1")
    assert values(judge(server, pattern=r"(\S+) of 1", lowest=-1.0, highest=1.0), "a") == [-0.5]


def test_as_many_calls_as_allowed_are_in_flight_and_no_more(server: Server) -> None:
    def slow(question: str) -> Answer:
        time.sleep(0.05)
        return says("Score: 1")

    server.answer = slow
    texts = [str(number) for number in range(24)]
    start = time.monotonic()
    assert values(judge(server, at_once=8), *texts) == [1] * 24
    assert server.most_in_flight == 8
    assert time.monotonic() - start < 24 * 0.05
    server.most_in_flight = 0
    assert values(judge(server, at_once=1), *texts[:3]) == [1] * 3
    assert server.most_in_flight == 1


def test_the_same_response_to_the_same_prompt_is_asked_about_once(server: Server) -> None:
    assert values(judge(server), "a", "b", "a") == [5, 5, 5]
    assert server.asked == {"p|a": 1, "p|b": 1}


def test_an_error_says_what_the_server_said_and_a_second_try_asks_only_what_is_left(server: Server) -> None:
    refused = {"p|b"}
    server.answer = lambda question: (500, {}, "out of memory " * 99) if question in refused else says("Score: 2")
    plugin = judge(server, at_once=1)
    with pytest.raises(RuntimeError, match="/v1/chat/completions answered 500 Internal Server Error: out of") as caught:
        values(plugin, "a", "b", "c")
    assert len(str(caught.value)) < 500
    assert server.asked["p|a"] == 1
    refused.clear()
    assert values(plugin, "b") == [2]  # as the engine does, which asks about each of a failed call alone
    server.asked["p|b"] -= 1
    assert values(plugin, "a", "b", "c") == [2, 2, 2]
    assert (server.asked["p|a"], server.asked["p|b"], server.asked["p|c"]) == (1, 2, 1)
    assert values(plugin, "a") == [2]
    assert server.asked["p|a"] == 2  # what is remembered is for the next try alone


def test_after_an_error_no_more_calls_begin(server: Server) -> None:
    server.answer = lambda question: (400, {}, "no such model")
    with pytest.raises(RuntimeError, match="answered 400 Bad Request: no such model"):
        values(judge(server, at_once=2), *(str(number) for number in range(200)))
    assert sum(server.asked.values()) < 100


def test_too_many_requests_waits_as_long_as_the_server_says(server: Server) -> None:
    def busy(question: str) -> Answer:
        return (429, {"Retry-After": "0.2"}, "busy") if server.asked[question] < 3 else says("Score: 4")

    server.answer = busy
    start = time.monotonic()
    assert values(judge(server), "a") == [4]
    assert time.monotonic() - start >= 0.4
    assert server.asked["p|a"] == 3


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "5"}, {"Retry-After": "nan"}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, {}]
)
def test_it_does_not_wait_longer_than_its_patience_nor_without_being_told(server: Server, headers: dict) -> None:
    server.answer = lambda question: (429, headers, "busy")
    with pytest.raises(RuntimeError, match="answered 429 Too Many Requests: busy"):
        values(judge(server, patience=1.0), "a")
    assert server.asked["p|a"] == 1


def test_patience_is_for_all_waits_of_a_call_together(server: Server) -> None:
    server.answer = lambda question: (
        (503, {"Retry-After": "0.2"}, "busy") if server.asked[question] < 5 else says("Score: 1")
    )
    with pytest.raises(RuntimeError, match="answered 503 Service Unavailable: busy"):
        values(judge(server, patience=0.5), "a")
    assert server.asked["p|a"] == 3


@pytest.mark.parametrize("said", ["0", "-3"])
def test_a_server_that_says_at_once_is_not_flooded(server: Server, said: str) -> None:
    server.answer = lambda question: (429, {"Retry-After": said}, "busy")
    with pytest.raises(RuntimeError, match="answered 429"):
        values(judge(server, patience=0.7), "a")
    assert 2 <= server.asked["p|a"] <= 4


@pytest.mark.parametrize("content", [[{"type": "text", "text": "Score: 4"}], 4])
def test_an_answer_that_is_no_text_is_named(server: Server, content: object) -> None:
    server.answer = lambda question: (200, {}, json.dumps({"choices": [{"message": {"content": content}}]}))
    with pytest.raises(RuntimeError, match="chat/completions answered with something that is no chat completion"):
        values(judge(server), "a")


def test_what_is_not_http_is_named_with_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def babble() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"not http at all\r\n\r\n")

        threading.Thread(target=babble, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=f"{url}/chat/completions gave no answer: BadStatusLine: not http"):
            values(HTTPJudge(base_url=url, model="m"), "a")


def test_a_server_that_says_nothing_and_one_that_is_not_there(server: Server) -> None:
    def hangs(question: str) -> Answer:
        time.sleep(1)
        return says("Score: 1")

    server.answer = hangs
    with pytest.raises(RuntimeError, match="gave no answer: timed out"):
        values(judge(server, seconds=0.1), "a")
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError, match="gave no answer: .*refused"):
        values(judge(server), "a")


@pytest.mark.parametrize("said", ["<html>", "{}", '{"choices": []}', "[1]", '{"choices": [{"message": null}]}'])
def test_what_is_no_chat_completion_raises_and_does_not_abstain(server: Server, said: str) -> None:
    server.answer = lambda question: (200, {}, said)
    with pytest.raises(RuntimeError, match="that is no chat completion: .") as caught:
        values(judge(server), "a")
    assert said in str(caught.value)


def test_a_redirect_does_not_carry_the_key_away(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = lambda question: (302, {"Location": f"{server.base_url}/elsewhere"}, "moved")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with pytest.raises(RuntimeError, match="answered 302 Found"):
        values(judge(server, key_variable="JUDGE_KEY"), "a")
    assert [path for path, *_ in server.requests] == ["/v1/chat/completions"]


def test_a_key_that_is_not_there_is_missed_before_the_run_begins(server: Server) -> None:
    plugin = judge(server, key_variable="NO_SUCH_JUDGE_KEY")
    with pytest.raises(ValueError, match="environment variable NO_SUCH_JUDGE_KEY, which is not set"):
        plugin.rlhf_run_started()
    assert "Authorization" not in (values(judge(server), "a") and server.requests[0][1])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url = 'localhost:8000/v1': it must begin with \"http://\""),
        ({"base_url": "file:///etc/passwd"}, "it must begin with"),
        ({"question": "How good is it?"}, "question does not say where the response goes"),
        ({"pattern": "(a"}, "is not a regular expression"),
        ({"pattern": r"\d"}, "has 0 groups; one, the score, is needed"),
        ({"lowest": 10.0}, "lowest = 10.0 must be less than highest = 10.0"),
        ({"at_once": 0}, "at_once = 0"),
    ],
)
def test_options_that_cannot_be_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(HTTPJudge, {"base_url": "http://x/v1", "model": "judge", **table}, where="run.toml: [http_judge]")
