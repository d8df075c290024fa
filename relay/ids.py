"""Stream ids: 128 random bits and a 32-bit check, as 32 characters of [a-z2-7].

The check tells an id that was once handed out from a typing error without keeping a record: a
well-formed id with nothing in Redis is gone (410), anything else was never known (404). It holds
when Redis lost everything, and an erased stream leaves no trace. It is no secret and no proof; what
protects a stream is that its 128 bits cannot be guessed.
"""

import base64
import hashlib
import secrets


def new_stream_id() -> str:
    random = secrets.token_bytes(16)
    return base64.b32encode(random + _check(random)).decode().lower()


def is_stream_id(text: str) -> bool:
    if len(text) != 32 or not text.isascii() or text != text.lower():
        return False
    try:
        raw = base64.b32decode(text.upper())
    except ValueError:
        return False
    return raw[16:] == _check(raw[:16])


def alias_of(stream_id: str) -> str:
    """24 hexadecimal digits for where others keep an id and send it about: the same each time, and
    no way back. Whoever has the id itself may read the stream, cancel and erase it."""
    return hashlib.sha256(stream_id.encode()).hexdigest()[:24]


def _check(random: bytes) -> bytes:
    return hashlib.blake2s(random, digest_size=4, person=b"relay-id").digest()
