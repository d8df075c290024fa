"""The `relay` command: one function per word that can follow it."""

import asyncio
import os
import re
import sys
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from cli import up as everything
from cli.processes import module, module_env
from relay.client import Client
from relay.errors import ConfigurationError, RelayError, StreamUnknown
from relay.events import CUT_SHORT, STARTED, TERMINAL
from relay.ids import is_stream_id
from relay.logs import open_closed_streams
from relay.settings import load_settings

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tab and line feed."""


class Commands(TyperGroup):
    """Any command may raise an error of ours: it becomes one sentence and an exit code, 2 for a
    wrong configuration and 1 for the rest."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            everything.report(error.message)
            raise typer.Exit(2) from None
        except RelayError as error:
            everything.report(error.message)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    help="A chat answer that outlives the connection that asked for it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, which hold prompts and keys
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(version("chat-relay"))
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print it.")
]


@app.callback()
def relay(_: Version = False) -> None:
    """What stands before any command."""
    open_closed_streams()
    if isinstance(sys.stdout, TextIOWrapper):  # Not every terminal has a sign for all of an answer.
        sys.stdout.reconfigure(errors="replace")


Host = Annotated[str | None, typer.Option(help="Address to listen on [RELAY_HOST; 127.0.0.1].")]
Port = Annotated[int | None, typer.Option(help="0 picks a free one [RELAY_PORT; 8000].")]
Workers = Annotated[int | None, typer.Option(help="How many workers [RELAY_WORKERS; 1].")]
Data = Annotated[
    Path | None, typer.Option(help="Folder of the private Redis [RELAY_DATA; .relay].")
]


@app.command()
def up(host: Host = None, port: Port = None, workers: Workers = None, data: Data = None) -> None:
    """Run everything here: Redis (unless REDIS_URL is set), API, workers, and a demo upstream
    unless a real one is configured."""
    _set(RELAY_HOST=host, RELAY_PORT=port, RELAY_WORKERS=workers, RELAY_DATA=data)
    raise typer.Exit(asyncio.run(everything.up(load_settings(), Console())))


@app.command()
def api(host: Host = None, port: Port = None) -> None:
    """Run one API process; REDIS_URL names the Redis that it shares with the workers."""
    _set(RELAY_HOST=host, RELAY_PORT=port)
    _become("api")


@app.command()
def worker() -> None:
    """Run one worker process; REDIS_URL names the Redis that it shares with the API."""
    _become("worker")


def _checked(word: str) -> str:
    """As bytes that are no text come to us, nothing can be done with it."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is not UTF-8") from None
    return word


def _of_stream(word: str) -> str:
    """The id, also out of a link to the stream, as the page has one. Raises StreamUnknown."""
    for part in re.split(r"[^a-z2-7]", word):
        if is_stream_id(part):
            return part
    raise StreamUnknown("There is no stream with this id: check it.")


Word = Annotated[str, typer.Argument(callback=_checked)]
StreamId = Annotated[str, typer.Argument(callback=_of_stream, help="Or a link to the stream.")]
Url = Annotated[str, typer.Option(envvar="RELAY_URL", help="Where the API is.", show_default=True)]
SignIn = Annotated[
    str | None,
    typer.Option(
        "--authorization",
        envvar="RELAY_AUTHORIZATION",
        help="The header for what stands before the API, as in 'Bearer TOKEN'.",
    ),
]
HERE = "http://127.0.0.1:8000"


@app.command()
def chat(text: Word, url: Url = HERE, sign_in: SignIn = None) -> None:
    """Ask, and print the answer as it comes, across every loss of the connection."""
    with _client(url, sign_in) as client:
        stream_id = client.ask([{"role": "user", "content": text}])
        everything.report(f"stream {stream_id}")
        try:
            _print(client, stream_id)
        except KeyboardInterrupt:
            words = f"`relay watch {stream_id}` shows it, `relay cancel {stream_id}` ends it"
            everything.report(f"the answer goes on: {words}")
            raise


@app.command()
def watch(stream_id: StreamId, url: Url = HERE, sign_in: SignIn = None) -> None:
    """Print a stream from its beginning, then as it comes."""
    with _client(url, sign_in) as client:
        _print(client, stream_id)


@app.command()
def cancel(stream_id: StreamId, url: Url = HERE, sign_in: SignIn = None) -> None:
    """End a stream here; what it has stays readable."""
    with _client(url, sign_in) as client:
        typer.echo(client.cancel(stream_id))


def _client(url: str, sign_in: str | None) -> Client:
    headers = {"authorization": sign_in.strip()} if sign_in else None
    return Client(url, headers=headers, report=everything.report)


def _print(client: Client, stream_id: str) -> None:
    printed = False
    for update in client.watch(stream_id):
        if update.kind == STARTED and printed:
            _forget(stream_id)
        printed = printed or bool(update.text)
        typer.echo(_harmless(update.text), nl=False, color=True)  # As it is.
        if update.kind in TERMINAL:
            typer.echo()
        if update.kind in CUT_SHORT:
            everything.report(str(update.data.get("message", update.kind)))
            raise typer.Exit(1)


def _harmless(text: str) -> str:
    """What a model writes must not command the terminal; a file or a pipe is given all of it."""
    return _CONTROLS.sub("", text) if sys.stdout.isatty() else text


def _forget(stream_id: str) -> None:
    """Text cannot be taken back. Whoever reads a terminal is told that what stands above is void; a
    file or a program would take both attempts for one answer."""
    if not sys.stdout.isatty():
        everything.report(f"the answer began anew: `relay watch {stream_id}` has it whole")
        raise typer.Exit(1)
    typer.echo("\n--- a new attempt: forget the text above ---")


def _set(**variables: object) -> None:
    """An option is its environment variable: one check for both, and children inherit it."""
    os.environ.update({name: str(value) for name, value in variables.items() if value is not None})


def _become(name: str) -> None:
    # Not a child: signals and the exit code are then those of the process itself.
    os.execve(sys.executable, module(name), module_env())  # noqa: S606
