"""`relay up`: Redis, upstream, API and workers on one machine, under one supervisor."""

import asyncio
import contextlib
import os
import signal
import sys

from redis.asyncio.connection import parse_url
from redis.exceptions import RedisError
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from cli.processes import base_url, free_port, module, module_env
from cli.redis_server import RedisServer, find_redis_server
from cli.supervisor import STORE, UPSTREAM, Child, Supervisor, answers_at, says
from relay.connection import connect
from relay.settings import Settings, misspelt

REAL_SERVICE = (
    "For the real service set AZURE_OPENAI_ENDPOINT, AZURE_OPENAI_KEY and "
    "AZURE_OPENAI_CHATGPT_DEPLOYMENT; or OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL."
)
KEY_ALONE = " Of these OPENAI_API_KEY is set, and does nothing without OPENAI_MODEL."

PATIENCE_SECONDS = 3.0  # without a word while all is started
API_CLOSES_SECONDS = 2.0  # what an API may need after its drain


def plan(settings: Settings, port: int, redis: RedisServer | None) -> list[Child]:
    """The children of `relay up`, in the order of their start. `redis` is open, or None."""
    env = module_env() | {"RELAY_HOST": settings.host, "RELAY_PORT": str(port)}
    env["REDIS_URL"] = redis.url if redis else settings.redis_url
    env |= dict.fromkeys(misspelt(), "")  # Told of once, and not by each child.
    grace, drain = settings.grace_seconds, settings.drain_seconds
    if "grace_seconds" not in settings.model_fields_set:
        # Ctrl-C is to end everything within 5 s.
        grace, env["RELAY_GRACE_SECONDS"] = 2.0, "2"
    if "drain_seconds" not in settings.model_fields_set:
        # There is no other process to spread the viewers over.
        drain, env["RELAY_DRAIN_SECONDS"] = 0.0, "0"
    children = []
    if redis:
        children.append(
            Child(
                "redis",
                redis.argv,
                os.environ,
                redis.ready,
                STORE,
                redis.pass_fds,
                bounded=False,
                log=redis.log,
            )
        )
    if settings.upstream is None:
        # A port chosen here and not by the child: started again it must stand where workers look.
        demo = free_port("127.0.0.1", 0)
        argv = [*module("emulator"), "--host", "127.0.0.1", "--port", str(demo)]
        ready = says("emulator ready on ")
        children.append(Child("demo upstream", argv, dict(env), ready, UPSTREAM, piped=True))
        env |= {
            "AZURE_OPENAI_ENDPOINT": f"http://127.0.0.1:{demo}",
            "AZURE_OPENAI_KEY": "demo",
            "AZURE_OPENAI_CHATGPT_DEPLOYMENT": "demo",
        }
    workers = range(1, settings.workers + 1)
    children += [Child(f"worker {n}", module("worker"), env, grace=grace) for n in workers]
    readyz = answers_at(f"{base_url(settings.host, port)}/readyz")
    return [*children, Child("api", module("api"), env, readyz, grace=drain + API_CLOSES_SECONDS)]


def describe(console: Console, settings: Settings, port: int, redis: RedisServer | None) -> None:
    """Print what to know once everything is ready. Holds no key and no password."""
    url = base_url(settings.host, port)
    upstream = "This is the demo upstream: it answers with canned text."
    if settings.upstream:
        upstream = f"Upstream: {settings.upstream.model} ({settings.upstream.kind})"
    facts = [
        f"{url}   docs: {url}/docs",
        upstream,
        f"Data: {redis.data if redis else 'in the Redis that REDIS_URL names'}",
        "Ctrl-C stops everything.",
    ]
    if settings.upstream is None:
        facts.insert(2, REAL_SERVICE + (KEY_ALONE if settings.openai_key else ""))
    console.print(Panel(Text("\n".join(facts)), title="chat-relay", title_align="left"))
    headers = "-H 'accept: text/plain' -H 'content-type: application/json'"
    question = '{"messages":[{"role":"user","content":"Hello"}]}'
    lines = [f"curl -N {url}/chat {headers} -d '{question}'"]
    if redis:
        lines.append(f"{redis.look}   # to look into it")
    for line in lines:  # Outside of the panel and not wrapped: they are there to be copied.
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def report(sentence: str) -> None:
    """One line on stderr, as everything that `relay` itself says."""
    with contextlib.suppress(OSError):  # A terminal that was closed must not keep us from ending.
        print(f"relay: {sentence}", file=sys.stderr, flush=True)  # noqa: T201


async def tell_if_away(redis_url: str) -> None:
    """Say in one sentence, without the password, that this Redis does not answer, and why."""
    await asyncio.sleep(PATIENCE_SECONDS)
    try:
        async with connect(redis_url, connections=1) as redis:
            await redis.ping()
    except RedisError as error:
        place = parse_url(redis_url)
        at = place.get("path") or f"{place.get('host', 'localhost')}:{place.get('port', 6379)}"
        report(f"Redis at {at} does not answer, waiting for it: {error}")


async def up(settings: Settings, console: Console) -> int:
    """Run it all until SIGINT, SIGTERM or SIGHUP (but for nohup): 0. Or until a child cannot be
    kept alive: 1.

    Raises ConfigurationError before any child is started.
    """
    for name, nearest in misspelt().items():
        report(f"{name} is no setting" + (f"; is {nearest} meant?" if nearest else "."))
    # Configured by half, they raise here, before anything is started.
    _ = settings.upstream, settings.webhooks
    with contextlib.ExitStack() as stack:
        redis = None
        if "redis_url" not in settings.model_fields_set:
            redis = RedisServer(find_redis_server(settings.redis_server), settings.data, report)
            redis.open()
            stack.callback(redis.close)
        else:
            stack.callback(asyncio.create_task(tell_if_away(settings.redis_url)).cancel)
        # After the folder: where both are taken it is by another `relay up`, and that is told.
        port = free_port(settings.host, settings.port)
        supervisor = Supervisor(plan(settings, port, redis), report)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                asyncio.get_running_loop().add_signal_handler(number, supervisor.stop)

        def announce() -> None:
            with contextlib.suppress(OSError):  # All is ready, though nobody can be told.
                describe(console, settings, port, redis)

        failure = await supervisor.run(announce)
    if failure:
        report(failure)
    return 1 if failure else 0
