"""Webhooks: who may be told that a stream has ended, what is told, and how it is signed. Pure.

The signature is that of Standard Webhooks (standardwebhooks.com), for which receivers have a
library in every language.
"""

import base64
import hashlib
import hmac
import json
import re
from datetime import UTC, datetime
from typing import NamedTuple

import idna

from relay.errors import ConfigurationError
from relay.events import to_json
from relay.ids import alias_of

LONGEST_URL = 2048

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = rf"{_LABEL}(?:\.{_LABEL})*"
# Stricter than any parser, so that none can find another host in it than is found here.
_URL = re.compile(
    rf"(?P<scheme>https?)://(?P<host>{_NAME})(?::(?P<port>[0-9]{{1,5}}))?(?P<target>[/?][!\"$-~]*)?",
    re.IGNORECASE | re.ASCII,
)
_PORTS = {"https": 443, "http": 80}


class Target(NamedTuple):
    """Where a webhook goes: a URL that was taken apart once and is never parsed again."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query."""
    allowed_by: str
    """An entry of RELAY_WEBHOOK_HOSTS: the host itself, or a wildcard."""


class Webhooks:
    """The server's side of all webhooks: the hosts that it tells, and the secrets it signs with."""

    def __init__(self, hosts: str, secrets: str, *, private: bool) -> None:
        """`hosts` with commas between: names, or `*.` and a name for all under it. `secrets` with
        spaces between, so that they can be replaced without a gap: each signs. `private` allows
        http and addresses that are not public.

        Raises ConfigurationError, naming the variable.
        """
        self.private = private
        self._hosts = frozenset(_host(entry) for entry in hosts.split(",") if entry.strip())
        self._keys = [_key(secret) for secret in secrets.split()]
        if self._hosts and not self._keys:
            raise ConfigurationError(
                "Set RELAY_WEBHOOK_SECRET: webhooks to the hosts of RELAY_WEBHOOK_HOSTS are signed."
            )

    @property
    def allowed(self) -> bool:
        """Whether there can be any."""
        return bool(self._hosts)

    def target(self, url: str) -> Target:
        """Raises ValueError, with the reason, for a URL that nothing is sent to."""
        if not self._hosts:
            raise ValueError("this server sends no webhooks, its RELAY_WEBHOOK_HOSTS is empty")
        match = _URL.fullmatch(url) if len(url) <= LONGEST_URL else None
        if match is None:
            raise ValueError(
                "must be a URL such as https://HOST/PATH, in ASCII, of at most "
                f"{LONGEST_URL} characters, without user name or fragment"
            )
        scheme, host = match["scheme"].lower(), match["host"].lower()
        port = int(match["port"] or _PORTS[scheme])
        if not 0 < port <= 65535:
            raise ValueError("has a port outside 1 to 65535")
        entries = (host, *(f"*{end}" for end in _ends(host)))
        allowed_by = next((entry for entry in entries if entry in self._hosts), None)
        if allowed_by is None:
            raise ValueError("names a host that RELAY_WEBHOOK_HOSTS of this server does not allow")
        if scheme == "http" and not self.private:
            raise ValueError("must be https, RELAY_WEBHOOK_PRIVATE of this server is not set")
        target = match["target"] or "/"
        path = target if target[0] == "/" else f"/{target}"
        return Target(scheme, host, port, path, allowed_by)

    def headers(self, stream_id: str, body: bytes, sent_s: int) -> dict[str, str]:
        """What goes with a body that is sent at `sent_s` (Unix time): the id by which a receiver
        knows it when it comes again, and a signature per secret."""
        message_id = f"msg_{alias_of(stream_id)}"
        signed = b"%b.%d.%b" % (message_id.encode(), sent_s, body)
        digests = (hmac.digest(key, signed, hashlib.sha256) for key in self._keys)
        return {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(sent_s),
            "webhook-signature": " ".join(
                f"v1,{base64.b64encode(digest).decode()}" for digest in digests
            ),
        }


def payload(stream_id: str, kind: str, ended_ms: int, data: bytes) -> bytes:
    """The body: that the stream has ended, how, and where its answer is, without the answer. `kind`
    and `data` are those of its terminal event."""
    moment = datetime.fromtimestamp(ended_ms / 1000, UTC).isoformat(timespec="milliseconds")
    told = {"stream_id": stream_id, "url": f"/streams/{stream_id}", **json.loads(data)}
    return to_json(
        {"type": f"stream.{kind}", "timestamp": moment.replace("+00:00", "Z"), "data": told}
    )


def _ends(host: str) -> list[str]:
    """`.b.c` and `.c` of `a.b.c`."""
    return [host[at:] for at, character in enumerate(host) if character == "."]


def _host(entry: str) -> str:
    name = entry.strip().lower()
    wildcard, name = ("*.", name[2:]) if name.startswith("*.") else ("", name)
    try:
        name = name if name.isascii() else idna.encode(name).decode()
    except idna.IDNAError:
        name = ""
    if not re.fullmatch(_NAME, name):
        raise ConfigurationError(
            "RELAY_WEBHOOK_HOSTS: must be names of hosts with commas between, such as "
            "hooks.example.com or *.example.com."
        )
    return wildcard + name


def _key(secret: str) -> bytes:
    prefix, encoded = secret[:6], secret[6:]
    try:
        # Padding may be left out.
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        key = b""
    if prefix != "whsec_" or not 24 <= len(key) <= 64:
        raise ConfigurationError(
            "RELAY_WEBHOOK_SECRET: must be whsec_ and 24 to 64 bytes in base64, or several of such "
            "with spaces between."
        )
    return key
