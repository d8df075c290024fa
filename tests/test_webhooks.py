import base64
import json
import time
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from relay.errors import ConfigurationError
from relay.events import CANCELLED, COMPLETED, FAILED, to_json
from relay.ids import new_stream_id
from relay.webhooks import LONGEST_URL, Target, Webhooks, payload

HOSTS = "hooks.test, *.Wild.test, B\u00fccher.test,*.stra\u00dfe.test,10.0.0.1"


def secret(key: bytes) -> str:
    return f"whsec_{base64.b64encode(key).decode()}"


ONE, TWO, OTHER = (secret(bytes([n]) * 32) for n in range(3))


def webhooks(hosts: str = HOSTS, secrets: str = ONE, *, private: bool = False) -> Webhooks:
    return Webhooks(hosts, secrets, private=private)


# Where to


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://hooks.test", Target("https", "hooks.test", 443, "/", "hooks.test")),
        (
            "https://hooks.test/a%20b?c=@:/",
            Target("https", "hooks.test", 443, "/a%20b?c=@:/", "hooks.test"),
        ),
        ("HTTPS://Hooks.TEST:8443/A", Target("https", "hooks.test", 8443, "/A", "hooks.test")),
        ("https://hooks.test?q", Target("https", "hooks.test", 443, "/?q", "hooks.test")),
        ("https://a.wild.test/", Target("https", "a.wild.test", 443, "/", "*.wild.test")),
        ("https://a.b-c.wild.test/", Target("https", "a.b-c.wild.test", 443, "/", "*.wild.test")),
        (
            "https://XN--bcher-kva.test/",
            Target("https", "xn--bcher-kva.test", 443, "/", "xn--bcher-kva.test"),
        ),
        (
            "https://a.xn--strae-oqa.test/",
            Target("https", "a.xn--strae-oqa.test", 443, "/", "*.xn--strae-oqa.test"),
        ),
        ("https://10.0.0.1/", Target("https", "10.0.0.1", 443, "/", "10.0.0.1")),
    ],
)
def test_a_url_of_an_allowed_host_is_taken_apart(url: str, target: Target) -> None:
    assert webhooks().target(url) == target


@pytest.mark.parametrize(
    "url",
    [
        "https://other.test/",
        "https://hooks.test.other.test/",
        "https://xhooks.test/",
        "https://a.hooks.test/",
        "https://wild.test/",
        "https://xwild.test/",
        "https://wild.test.other.test/",
        "https://10.0.0.11/",
        "https://167772161/",
        "https://a.strasse.test/",
    ],
)
def test_no_other_host_is_allowed(url: str) -> None:
    with pytest.raises(ValueError, match="RELAY_WEBHOOK_HOSTS"):
        webhooks().target(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.test",
        "//hooks.test/",
        "/hook",
        "ftp://hooks.test/",
        "https:hooks.test",
        "https:///hooks.test",
        "https://user@hooks.test/",
        "https://user:word@hooks.test/",
        "https://hooks.test@other.test/",
        "https://hooks.test\\@other.test/",
        "https://other.test#@hooks.test/",
        "https://hooks.test/#there",
        "https://hooks.test#",
        "https://hooks.test./",
        "https://.wild.test/",
        "https://a..wild.test/",
        "https://%77.wild.test/",
        f"https://{'a' * 64}.wild.test/",
        "https://[::1]/",
        "https://hooks.test:/",
        "https://hooks.test:port/",
        "https://hooks.test:0/",
        "https://hooks.test:65536/",
        "https://hooks.test/a b",
        "https://hooks.test/\r\nhost: x",
        "https://hooks.test/\n",
        " https://hooks.test/",
        "https://b\u00fccher.test/",
        "https://hoo\u212as.test/",  # Its small letter is the k of ASCII.
        "https://hooks.test/\u00fc",
        "https://hooks.test/" + "a" * LONGEST_URL,
    ],
)
def test_what_is_no_plain_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(must be a URL|has a port)"):
        webhooks().target(url)


def test_the_longest_url_is_allowed() -> None:
    url = "https://hooks.test/".ljust(LONGEST_URL, "a")
    assert len(webhooks().target(url).target) == LONGEST_URL - len("https://hooks.test")


BEGINNINGS = ["https://", "http://hooks.test", "https://hooks.test"]
PIECES = ["hooks.test", "evil.test", "443", "x", "\t", "\u3002", *'@:/?#\\.[]% "']


@given(st.sampled_from(BEGINNINGS), st.lists(st.sampled_from(PIECES), max_size=5).map("".join))
def test_no_parser_finds_another_host_than_was_allowed(beginning: str, rest: str) -> None:
    url = beginning + rest
    try:
        target = webhooks("hooks.test", private=True).target(url)
    except ValueError:
        return
    assert target.host == urlsplit(url).hostname == httpx2.URL(url).host == "hooks.test"


def test_http_is_for_private_networks_alone() -> None:
    with pytest.raises(ValueError, match="RELAY_WEBHOOK_PRIVATE"):
        webhooks().target("http://hooks.test/")
    allowing = webhooks(private=True)
    assert allowing.target("http://hooks.test/") == Target(
        "http", "hooks.test", 80, "/", "hooks.test"
    )
    with pytest.raises(ValueError, match="RELAY_WEBHOOK_HOSTS"):
        allowing.target("http://other.test/")


def test_no_reason_repeats_what_may_be_a_secret() -> None:
    for url in ("https://other.test/the-marker", "http://hooks.test/the-marker", "x://the-marker"):
        with pytest.raises(ValueError) as refusal:
            webhooks().target(url)
        assert "marker" not in str(refusal.value)


@pytest.mark.parametrize("url", ["https://hooks.test/", "nonsense", ""])
def test_without_a_host_there_are_none_and_every_refusal_says_what_to_set(url: str) -> None:
    none = webhooks(hosts=" ", secrets="")
    assert not none.allowed
    assert webhooks().allowed
    with pytest.raises(ValueError, match="RELAY_WEBHOOK_HOSTS"):
        none.target(url)


@pytest.mark.parametrize(
    "hosts",
    [
        *(
            "*",
            "*.",
            "*.*.test",
            "a.*.test",
            "*hooks.test",
            "-x.test",
            "hooks.test,.",
            "hooks test",
        ),
        *("https://hooks.test", "hooks.test:443", "hooks.test/x", "[::1]", "ho\u2014oks.test"),
    ],
)
def test_a_list_of_hosts_that_is_none_names_its_variable(hosts: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^RELAY_WEBHOOK_HOSTS: .*\.$"):
        webhooks(hosts=hosts)


# The signature


@pytest.mark.parametrize("secrets", ["", " "])
def test_hosts_without_a_secret_name_the_variable_to_set(secrets: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^Set RELAY_WEBHOOK_SECRET"):
        webhooks(secrets=secrets)


@pytest.mark.parametrize(
    "bad",
    [
        "the-marker",
        "whsec_",
        "whsec_the-marker-is-not-base64-at-all!!",
        "WHSEC_" + ONE[6:],
        ONE[6:],
        secret(b"x" * 23),
        secret(b"x" * 65),
        f"{ONE} the-marker",
        f"{ONE},{TWO}",
    ],
)
def test_a_secret_that_is_none_names_its_variable_and_is_not_repeated(bad: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^RELAY_WEBHOOK_SECRET: ") as refusal:
        webhooks(secrets=bad)
    assert "marker" not in refusal.value.message


@given(key=st.binary(min_size=24, max_size=64), text=st.text(), padded=st.booleans())
def test_the_official_library_verifies_what_is_signed(key: bytes, text: str, padded: bool) -> None:
    written = secret(key) if padded else secret(key).rstrip("=")
    headers = webhooks(secrets=written).headers("id", text.encode(), int(time.time()))
    Webhook(written).verify(text, headers, json_parse=False)


def test_whatever_is_changed_the_signature_does_not_hold() -> None:
    body = b'{"type":"stream.completed"}'
    headers = webhooks().headers("id", body, int(time.time()))
    for change in (
        {"webhook-id": "msg_other"},
        {"webhook-timestamp": str(int(headers["webhook-timestamp"]) - 1)},
    ):
        with pytest.raises(WebhookVerificationError):
            Webhook(ONE).verify(body, headers | change)
    for changed, key in ((body + b" ", ONE), (body, OTHER)):
        with pytest.raises(WebhookVerificationError):
            Webhook(key).verify(changed, headers)


def test_while_secrets_are_replaced_each_of_them_signs() -> None:
    headers = webhooks(secrets=f"{ONE} {TWO}").headers("id", b"{}", int(time.time()))
    for key in (ONE, TWO):
        assert Webhook(key).verify(b"{}", headers) == {}
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(b"{}", headers)


def test_the_id_is_the_same_in_every_retry_and_not_that_of_the_stream() -> None:
    stream_id = new_stream_id()
    first, retry = (webhooks().headers(stream_id, b"{}", sent) for sent in (1, 2))
    assert first["webhook-id"] == retry["webhook-id"]
    assert (first["webhook-timestamp"], retry["webhook-timestamp"]) == ("1", "2")
    assert first["webhook-signature"] != retry["webhook-signature"]
    assert stream_id not in str(first)
    assert first["webhook-id"] != webhooks().headers(new_stream_id(), b"{}", 1)["webhook-id"]


# What is told


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (COMPLETED, {"finish_reason": "stop", "usage": {"total_tokens": 3}, "chunks": 2}),
        (FAILED, {"code": "interrupted", "message": "Ask again.", "retryable": True}),
        (CANCELLED, {}),
    ],
)
def test_it_tells_how_and_when_the_stream_ended_and_where_it_is(
    kind: str, data: dict[str, Any]
) -> None:
    told = json.loads(payload("ID", kind, 1_800_000_000_007, to_json(data)))
    assert told == {
        "type": f"stream.{kind}",
        "timestamp": "2027-01-15T08:00:00.007Z",
        "data": {"stream_id": "ID", "url": "/streams/ID"} | data,
    }
