"""Every name that stands in Redis.

| key | type | holds |
|---|---|---|
| relay:{id}:log | stream | the events of one stream, entry ids `<attempt>-<seq>` |
| relay:{id}:state | hash | what the scripts must know of it, see below |
| relay:{id}:viewers | hash | API process -> its number of viewers and when it said so |
| relay:idempotency:{key} | hash | id and body digest of the stream that the key led to |
| relay:chat:{chat id} | string | id of the newest stream that answers there |
| relay:queue | sorted set | arq's queue: ids of jobs, by the time they came (ms) |
| arq:job:{id} | string | arq's job: function and arguments, as JSON |
| relay:leases | sorted set | ids of claimed jobs, by the end of their lease (ms; see release.lua) |
| relay:webhooks | sorted set | ids of ended streams of which somebody is to be told, by when (ms) |
| relay:ended | hash | how many streams ended in which way and within what time, see below |
| relay:retries | hash | code of a failure -> how often the upstream was asked again after it |
| relay:swept | string | when a sweep was last done (ms): a long gap means that Redis was away |
| relay:workers | sorted set | names of workers, by their last sign of life (ms), for a minute |
| relay:probe | none | never there: to delete it shows whether Redis takes anything in |
| relay:wake | list | a token per job since the queue was empty: it wakes a worker at once |
| relay:health:{host} | string | arq's health report of a worker there, for half a minute |

| field of state | written by | holds |
|---|---|---|
| request, recovery | create | what the model is asked, until the end; `restart` or `fail` |
| attempt | claim | fencing number of the latest claim, 0 before the first |
| next | claim, append | seq of that attempt's next entry |
| owner | claim | the claim that may write; nobody once it is let go |
| claims | claim | how often the job was claimed |
| tries | claim, release | the same, but for those that were handed over in good order |
| cancel | cancel | 1 once a cancel is asked for |
| created_ms, started_ms, ended_ms | create, append, whoever ends it | when, by Redis' clock |
| ended | whoever ends it | the kind of its terminal event |
| idempotency, chat | create | the names of its Idempotency-Key and its chat, as above |
| webhook, webhook_tries | create, take | who is to be told of the end; how often it was tried |

| field of ended | holds |
|---|---|
| <kind>, failed <code> | how many ended by that kind of terminal event |
| first_chunk <bound>, answer <bound> | how many took so long, in buckets (ms; see durations.py) |
| first_chunk sum, answer sum | how long they took together (ms) |

| channel | carries |
|---|---|
| relay:{id}:channel | the entries of one append, with their ids |
| relay:control | `cancel <id>` to the workers, `erase <id>` to everybody |
"""

from arq.constants import job_key_prefix

QUEUE = "relay:queue"
LEASES = "relay:leases"
WEBHOOKS = "relay:webhooks"
ENDED = "relay:ended"
RETRIES = "relay:retries"
SWEPT = "relay:swept"
WORKERS = "relay:workers"
PROBE = "relay:probe"
WAKE = "relay:wake"
CONTROL = "relay:control"


def log(stream_id: str) -> str:
    return f"relay:{stream_id}:log"


def state(stream_id: str) -> str:
    return f"relay:{stream_id}:state"


def channel(stream_id: str) -> str:
    return f"relay:{stream_id}:channel"


def viewers(stream_id: str) -> str:
    return f"relay:{stream_id}:viewers"


def job(stream_id: str) -> str:
    return job_key_prefix + stream_id


OF_STREAM = tuple(name("%s") for name in (log, state, channel, job))
"""Of scripts that find the ids themselves, and take these as patterns of their names."""


def idempotency(key: str) -> str:
    return f"relay:idempotency:{key}"


def chat(chat_id: str) -> str:
    return f"relay:chat:{chat_id}"


def health(host: str) -> str:
    return f"relay:health:{host}"


def stream_of(channel: str) -> str:
    """The stream that a channel is of."""
    return channel.split(":")[1]
