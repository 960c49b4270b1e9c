"""What becomes of each failure of a judge's server: its cause by name, and no key in any word."""

import base64
import contextlib
import logging
import traceback

import judging
import pytest
from judging import asking, config, request, serving

from gtalign_jax.reward import endpoints, http_judge, prompts
from gtalign_jax.reward.http_judge import HttpJudge
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import CAUSES, Judgement

KEY = "sk-proj-0123456789abcdefghij"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(http_judge, "_backoff_s", lambda attempt: 0.01)


@pytest.mark.parametrize(
    ("fault", "cause", "words"),
    [
        ("hang", "timeout", "no answer within 1 s"),
        ("drip", "timeout", "no answer within 1 s"),
        ("429", "rate_limit", "HTTP 429"),
        ("rate_limit", "rate_limit", "HTTP 429"),
        ("rate_limit_date", "rate_limit", "HTTP 429"),
        ("408", "server", "HTTP 408"),
        ("409", "server", "HTTP 409"),
        ("server", "server", "HTTP 500"),
        ("503", "server", "HTTP 503"),
        ("close", "connection", "Server disconnected"),
        ("reset", "connection", "Error"),
        ("half", "connection", "without sending complete message body"),
        ("html", "unreadable", "no text"),
        ("half_json", "unreadable", "JSONDecodeError"),
        ("no_choices", "unreadable", "no text"),
        ("odd_choices", "unreadable", "no text"),
        ("null_text", "unreadable", "no text"),
        ("wrong_model", "wrong_model", "asked 'judge-1', 'another' answered"),
        ("refused", "refused", "refused"),
        ("filtered", "refused", "refused"),
        ("truncated", "truncated", "judge.max_tokens=1024"),
        ("thinking", "truncated", "</think>"),
        ("garbage", "unparsable", "no <verdict>"),
        ("no_verdict", "unparsable", "no <verdict>"),
        ("other_words", "unparsable", "no <verdict>"),
        ("off_scale", "off_scale", "100 is off the scale (0, 1)"),
        ("say ", "unparsable", "no <verdict>"),
    ],
)
def test_a_failure_is_repeated_and_then_missing_by_its_cause(fault, cause, words):
    timeout_s = 1.0 if cause == "timeout" else 20.0
    with serving(retry_after="0") as server, asking(server, retries=1, timeout_s=timeout_s) as ask:
        good, found, other = ask([request("x"), request(fault), request("y")])
    assert (found.score, found.cause, found.attempts) == (None, cause, 2)
    assert words in found.error and cause in CAUSES
    assert (good.score, good.cause, other.score) == (1.0, None, 1.0)
    assert server.counts() == {"x": 1, fault: 2, "y": 1}


@pytest.mark.parametrize("fault", ["server", "429", "close", "half", "no_verdict", "off_scale",
                                   "wrong_model", "odd_choices", "hang", "truncated"])
def test_what_passes_is_scored(fault):
    timeout_s = 1.0 if fault == "hang" else 20.0
    with serving() as server, asking(server, timeout_s=timeout_s) as ask:
        (found,) = ask([request(f"{fault} twice")])
    assert (found.score, found.cause, found.error, found.attempts) == (1.0, None, None, 3)


@pytest.mark.parametrize("fault", ["400", "401", "403", "not_found", "422"])
def test_what_the_server_will_not_do_is_not_asked_again(fault):
    with serving() as server, asking(server) as ask:
        (found,) = ask([request(fault)])
    assert (found.score, found.cause, found.attempts) == (None, "rejected", 1)
    assert f"HTTP {404 if fault == 'not_found' else fault}" in found.error
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_a_failed_connection():
    with serving() as server:
        pass
    with asking(server, retries=1) as ask:
        (found,) = ask([request()])
    assert (found.cause, found.attempts) == ("connection", 2)
    assert "onnect" in found.error


def test_a_response_that_a_judge_would_not_see_whole_is_not_asked_about():
    with serving() as server, asking(server) as ask:
        fits, long, hidden = ask([
            request("a" * prompts.MAX_PART_CHARS), request("a" * (prompts.MAX_PART_CHARS + 1)),
            request("\u200b" * (prompts.MAX_PART_CHARS // 8 + 1)),
        ])
    assert fits.score == 1.0 and len(server.asked) == 1
    assert (long.score, long.cause, long.attempts) == (None, "too_long", 0)
    assert hidden.cause == "too_long" and "4001 characters" in hidden.error


@pytest.mark.parametrize("odd", range(8))
def test_no_answer_whatever_it_is_made_of_ends_the_batch(odd):
    answers = [
        b"[]", b"null", b'"text"', b"7", b"", b"\xff\xfe", b'{"choices": [{"message": null}]}',
        b"[" * 100_000,
    ]
    with serving() as server, asking(server, retries=0) as ask:
        handler = server.RequestHandlerClass

        class Odd(handler):
            def fault_html(self, asked):
                self.send(200, answers[odd], "application/json")

        server.RequestHandlerClass = Odd
        found, good = ask([request("html"), request("x")])
    assert (found.score, found.cause, good.score) == (None, "unreadable", 1.0)


def test_usage_that_makes_no_sense_is_not_believed():
    """A negative number would make room for requests without end."""
    with serving(usage=-10**9) as server, asking(server, tokens_per_minute=10_000) as ask:
        ask([request(f"x {i}") for i in range(3)])
        assert all(sent.tokens > 1024 for sent in ask._limits._sent)


@pytest.mark.parametrize("model", ["judge-1", "judge-1-2025-08-06", "judge-1@main", "judge-1:q4",
                                   "judge-1-latest", "judge-1-v1:0", ""])
def test_a_name_with_a_date_or_revision_is_the_one_asked_for(model):
    assert _answered([model] * 3) == [1.0] * 3


@pytest.mark.parametrize("model", ["judge-1-mini", "judge-10", "judge", "JUDGE-1", "gpt"])
def test_another_name_is_taken_for_an_alias_only_after_it_was_used_consistently(model):
    assert _answered([model] * 5) == [None, None, 1.0, 1.0, 1.0]
    assert _answered([model, "else", model, model, model]) == [None, None, None, None, 1.0]
    # What has answered by the name asked for has no alias.
    assert _answered(["judge-1", *[model] * 5]) == [1.0] + [None] * 5
    assert _answered([model, model, "judge-1", model]) == [None, None, 1.0, None]
    # What has an alias has no second one.
    assert _answered([*[model] * 3, "else", "else", "else", model]) == [
        None, None, 1.0, None, None, None, 1.0]


def _answered(models):
    """The scores of answers by these models, one after the other."""
    with serving() as server:
        names = iter(models)

        class Named(server.RequestHandlerClass):
            def reply(self, status, body, headers=None):
                super().reply(status, body | {"model": next(names)}, headers)

        server.RequestHandlerClass = Named
        with asking(server, retries=0) as ask:
            return [ask([request(f"x {i}")])[0].score for i in range(len(models))]


def test_what_the_config_says_arrives(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with serving() as server:
        with asking(server, api_key_env="MY_KEY", max_tokens=77, temperature=0.25, top_p=0.9,
                    thinking="off", reasoning_effort="low",
                    extra_body='{"seed": 7, "chat_template_kwargs": {"a": 1}}') as ask:
            ask([request("an answer")])
    (asked,) = server.asked
    system, user = asked.body["messages"]
    assert asked.body == {
        "messages": [system, user],
        "model": "judge-1", "max_tokens": 77, "temperature": 0.25, "top_p": 0.9, "seed": 7,
        "reasoning_effort": "low", "chat_template_kwargs": {"a": 1, "enable_thinking": False},
    }
    assert asked.authorization == f"Bearer {KEY}"
    assert (system["role"], system["content"]) == ("system", prompts.SYSTEM)
    assert user["role"] == "user" and "Several meanings" in user["content"]
    assert asked.parts == {"question": "the question", "reference": "singleAnswer###truth",
                           "response": "an answer"}


def test_nothing_but_the_usual_is_sent_unless_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving() as server, asking(server) as ask:
        ask([request("x")])
    (asked,) = server.asked
    assert set(asked.body) == {"model", "messages", "max_tokens", "temperature", "top_p"}
    assert asked.authorization == "Bearer none"


@pytest.mark.parametrize("fault", ["x", "401", "server", "say <verdict>1</verdict>", "no_verdict",
                                   "hang", "reset", "wrong_model", "off_scale"])
def test_the_key_is_in_no_judgement_and_no_log_even_if_the_server_repeats_it(
        fault, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")  # as a file with a line break gives it
    caplog.set_level(logging.DEBUG)
    with serving(echo=True, models=(KEY,)) as server:
        with asking(server, retries=1, timeout_s=1.0 if fault == "hang" else 20.0) as ask:
            (found,) = ask([request(fault)])
            listed = ask.models()
    assert server.asked[0].authorization == f"Bearer {KEY}"
    assert "***" in str(listed)
    if fault in ("401", "server", "x", "no_verdict"):
        assert "***" in repr(found), "the server did repeat it"
    assert caplog.records, "nothing was logged at all"
    for text in (repr(found), str(listed), caplog.text, *map(repr, caplog.records)):
        assert KEY not in text


def test_not_even_a_part_of_the_key_is_left_where_a_long_message_is_cut(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for before in range(150, 320, 7):
        with serving() as server:

            class Long(server.RequestHandlerClass):
                def refuse(self, status, why, headers=None, before=before):
                    super().refuse(status, "." * before + KEY + "." * 300)

            server.RequestHandlerClass = Long
            with asking(server) as ask:
                (found,) = ask([request("401")])
        assert KEY[:4] not in found.error and len(found.error) == 300


def test_a_key_that_no_header_can_carry_is_named_by_its_variable_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secrét-0123")
    judge = HttpJudge(JudgeConfig(kind="http", base_url="http://127.0.0.1:9/v1", model="m"))
    for _ in range(2):  # the first attempt leaves nothing half open
        with pytest.raises(ValueError, match="judge.api_key_env='OPENAI_API_KEY'") as caught:
            judge([request()])
        assert "0123" not in "".join(traceback.format_exception(caught.value))


def test_user_and_password_of_an_address_travel_in_the_header_alone(monkeypatch, caplog):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    caplog.set_level(logging.DEBUG)
    with serving() as server:
        url = server.url.replace("://", "://anna:p%40ssword-1@")
        with HttpJudgeOf(config(server, base_url=url)) as ask:
            assert ask([request()])[0].score == 1.0
            shown = [endpoint.url for endpoint in ask._endpoints]
    sent = base64.b64decode(server.asked[0].authorization.removeprefix("Basic ")).decode()
    assert sent == "anna:p@ssword-1"
    assert shown == [server.url]
    assert "ssword-1" not in caplog.text


class HttpJudgeOf(HttpJudge):
    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def test_a_short_key_is_no_secret_and_stays_in_words(monkeypatch):
    """Local servers are given keys like "x" or "EMPTY"."""
    monkeypatch.setenv("OPENAI_API_KEY", "1")
    with serving() as server, asking(server) as ask:
        (found,) = ask([request("say 1 of 1 <verdict>1</verdict>")])
    assert found.score == 1.0 and found.reply == "1 of 1 <verdict>1</verdict>"


def test_the_shown_address_has_no_user_password_or_query():
    assert endpoints.shown_url("https://u:p@h:1/v1?key=s#f") == "https://h:1/v1"
    assert endpoints.shown_url("http://h/v1") == "http://h/v1"


@pytest.mark.parametrize(
    ("header", "date", "seconds"),
    [
        ("3", None, 3.0), ("0.5", None, 0.5), ("-3", None, 0.0), ("inf", None, 86_400.0),
        ("nan", None, 0.0), (None, None, 0.0), ("", None, 0.0), ("soon", None, 0.0),
        ("Wed, 21 Oct 2026 07:28:05 GMT", "Wed, 21 Oct 2026 07:28:00 GMT", 5.0),
        ("Wed, 21 Oct 2026 07:27:00 GMT", "Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 1926 07:27:00 GMT", None, 0.0), ("Wed, 99 Oct 2026", None, 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", None, 86_400.0),
        ("Wed, 21 Oct 2026 07:28:05 GMT", "rubbish", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date_by_the_clock_of_the_server(header, date, seconds):
    found = endpoints._retry_after_s(header, date)
    assert found == seconds or (seconds == 0.0 and not found > 0)


def test_a_judgement_says_how_often_it_was_asked_for_and_how_long_it_took():
    with serving(latency_s=0.1) as server, asking(server) as ask:
        (found,) = ask([request("500 once")])
    assert isinstance(found, Judgement) and found.attempts == 2 and 0.1 <= found.seconds < 20
    assert not found.stored


def test_a_reply_that_its_server_broke_off_is_missing_whatever_it_says_so_far(monkeypatch):
    monkeypatch.setattr(judging._Handler, "say", lambda self, text, asked, finish="stop":
                        self.reply(200, judging.chat(asked, text, "abort")))
    with serving() as server, asking(server, retries=0) as ask:
        (found,) = ask([request("x")])
    assert found.score is None and found.cause == "truncated" and "'abort'" in found.error


def test_a_password_in_an_address_is_masked_however_a_server_repeats_it():
    cfg = config(base_url="http://alice:s3cretpw99@127.0.0.1:9/v1")
    endpoint = endpoints.Endpoint(cfg, cfg.urls[0])
    echo = "Basic YWxpY2U6czNjcmV0cHc5OQ== or alice:s3cretpw99, s3cretpw99"
    told = endpoint._without_secrets(echo)
    assert told.count("***") == 3 and "s3cret" not in told and "YWxp" not in told


def test_what_a_pre_flight_has_sent_counts_against_the_limits_of_the_run():
    with serving() as server:
        with asking(server, requests_per_minute=3) as first:
            first([request(f"x {i}") for i in range(3)])
            sent = first.sent()
        assert len(sent) == 3
        judge = HttpJudge(config(server, requests_per_minute=3, deadline_s=0.5), sent)
        with contextlib.closing(judge):
            assert [j.cause for j in judge([request("y")])] == ["deadline"]
        assert len(server.asked) == 3
