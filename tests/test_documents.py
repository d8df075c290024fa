"""What stands in files that nothing runs: they must say what is."""

import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis.asyncio import Redis
from redis.exceptions import RedisError

from api import hub
from api.problems import _STATUS, TITLES
from cli.processes import free_port, spawn
from cli.redis_server import RedisServer, find_redis_server
from relay import connection, errors, listener, outbox
from relay.connection import connect
from relay.log import ALIVE_SECONDS
from relay.settings import MIB, Settings, variables
from tests.conftest import (
    ROOT,
    ask,
    asking,
    changed,
    redis_user,
    running_api,
    running_worker,
    until,
    watch,
)
from worker import appender, claiming, deliveries, generation, post, sse, upstream
from worker.health import is_healthy


def read(name: str) -> str:
    return (ROOT / name).read_text()


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text()):
        page = document.parent / target if target else document
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in titles
            }


def test_every_setting_is_documented_and_every_variable_there_is_a_setting() -> None:
    named = re.findall(r"`((?:RELAY|AZURE|OPENAI|REDIS)_[A-Z_]+)`", read("docs/configuration.md"))
    assert set(named) - {"RELAY_URL", "RELAY_AUTHORIZATION"} == set(variables())


def test_every_setting_that_the_other_documents_name_is_one() -> None:
    names = re.findall(
        r"`((?:RELAY|AZURE|OPENAI)_[A-Z_]+)", "".join(map(Path.read_text, DOCUMENTS))
    )
    of_the_command_line_and_compose = {"RELAY_URL", "RELAY_AUTHORIZATION", "RELAY_REDIS_MEMORY"}
    assert set(names) - of_the_command_line_and_compose <= set(variables())


def test_the_defaults_that_are_documented_are_those_of_the_code() -> None:
    table = read("docs/configuration.md")
    rows = dict(re.findall(r"^\| `([A-Z_]+)`[^|]*\| `([^`]+)` \|", table, re.MULTILINE))
    fields = {str(f.validation_alias): f.default for f in Settings.model_fields.values()}
    assert len(rows) > 15
    for variable, default in rows.items():
        if variable in fields:
            assert default == str(fields[variable]).removesuffix(".0"), variable


def test_every_code_of_a_problem_is_documented_with_its_status() -> None:
    table = read("docs/api.md").split("\n## Errors\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+)\b[^|]*\| (.+) \|$", table, re.MULTILINE)
    told = {code: int(status) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    assert told.keys() == TITLES.keys()
    assert {kind.code: status for kind, status in _STATUS.items()}.items() <= told.items()


def test_every_code_of_a_failure_is_documented_and_is_one() -> None:
    named = read("docs/api.md").split("In `failed` events: ")[1].split(".")[0]
    told_to_viewers_alone = {"stream_gone"}
    assert set(re.findall(r"`([a-z_]+)`", named)) == errors.FAILURE_CODES | told_to_viewers_alone
    code = [path.read_text() for name in ("relay", "worker") for path in (ROOT / name).glob("*.py")]
    raised = set(re.findall(r'"(upstream_[a-z_]+)"', "".join(code))) - {"upstream_retry"}
    assert raised == errors.UPSTREAM_CODES


async def test_every_alert_is_on_what_is_told_and_may_be_so(settings: Settings) -> None:
    rules = yaml.safe_load(read("docs/alerts.yml"))["groups"][0]["rules"]
    expressions = " ".join(rule["expr"] for rule in rules)
    async with running_api(settings) as api:
        told = (await api.get("/metrics")).text
    names = set(re.findall(r"\b(?:relay|process)_[a-z_]+", expressions))
    assert len(names) > 10
    assert names <= set(re.findall(r"^[a-z_]+", told, re.MULTILINE))
    for codes in re.findall(r'code=~"([a-z_|]+)"', expressions):
        assert set(codes.split("|")) <= set(re.findall(r'code="([a-z_]+)"', told))


async def test_every_metric_of_ours_is_documented(settings: Settings) -> None:
    async with running_api(settings) as api:
        told = (await api.get("/metrics")).text
    ours = set(re.findall(r"^# TYPE (relay_\w+) ", told, re.MULTILINE))
    assert len(ours) > 10
    assert {name for name in ours if not name.endswith("_created")} <= set(
        re.findall(r"`(relay_\w+)`", read("docs/operate.md"))
    )


PROMISED = [
    ("docs/api.md", "any answer but 2xx, and none within 10 s", post.ANSWER_SECONDS, 10),
    ("docs/api.md", "after 2.5 to 5 s and then ever later", deliveries.FIRST_RETRY_SECONDS, 5),
    ("docs/api.md", "up to 10 min", deliveries.MOST_RETRY_SECONDS, 600),
    ("docs/operate.md", "`relay_worker_silent_seconds` above 3 |", ALIVE_SECONDS, 3),
    ("docs/limits.md", "stays away is told every 5 s", hub.NOTICE_SECONDS, 5),
    ("docs/limits.md", "takes at most 64 MiB as it is kept", generation.MOST_BYTES, 64 * MIB),
    ("docs/limits.md", "with 100 bytes for each chunk", upstream.CHUNK_BYTES, 100),
    ("docs/limits.md", "first word 64 MiB", upstream.HELD_BYTES, 64 * MIB),
    ("docs/limits.md", "a piece of it 2 MiB", sse.MOST_BYTES, 2 * MIB),
    ("ARCHITECTURE.md", "and once in five seconds anyway", hub.PATROL_SECONDS, 5),
    ("ARCHITECTURE.md", "Time limits to Redis are short** (2 s)", connection.REPLY_SECONDS, 2),
    ("ARCHITECTURE.md", "hears nothing for 2 s", 2 * listener.SILENCE_SECONDS, 2),
    ("ARCHITECTURE.md", "when its lease of 30 s ends", outbox.LEASE_SECONDS, 30),
    ("ARCHITECTURE.md", "took longer than a second", deliveries.SLOW_SECONDS, 1),
    ("ARCHITECTURE.md", "has at most 20 of", deliveries.MOST_TO_THE_SLOW, 20),
    ("ARCHITECTURE.md", "of a worker's 50 deliveries", deliveries.MOST, 50),
    ("ARCHITECTURE.md", "all of whose hosts have 40", deliveries.MOST_TO_A_WILDCARD, 40),
    ("ARCHITECTURE.md", "claims four jobs at a time", claiming.CLAIMED_AT_ONCE, 4),
    ("ARCHITECTURE.md", "at least a millisecond apart", appender.APART_SECONDS, 0.001),
]


@pytest.mark.parametrize(("file", "sentence", "value", "promised"), PROMISED)
def test_a_number_that_is_promised_is_that_of_the_code(
    file: str, sentence: str, value: float, promised: float
) -> None:
    assert value == promised
    assert sentence in " ".join(read(file).split())


def test_every_error_that_a_client_may_meet_has_a_status() -> None:
    of_no_client = {errors.ConfigurationError, errors.StreamLost, errors.UpstreamError}
    kinds = {each for each in vars(errors).values() if isinstance(each, type)}
    ours = {each for each in kinds if each.__base__ is errors.RelayError}
    assert ours - of_no_client == {each for each in _STATUS if each.__base__ is errors.RelayError}
    assert {each.code for each in _STATUS} <= TITLES.keys()


@pytest.mark.parametrize("room", ["relay", "api", "worker", "cli", "emulator", "chaos"])
def test_every_file_of_a_room_stands_in_the_architecture_and_nothing_else(room: str) -> None:
    rows = re.findall(rf"^\| `{room}/` \| (.+) \|$", read("ARCHITECTURE.md"), re.MULTILINE)
    named = set(re.findall(r"`(\w+)/?`", " ".join(rows)))
    files = {file.stem for file in (ROOT / room).iterdir() if file.is_dir() or file.suffix == ".py"}
    assert named == {file for file in files if not file.startswith("_")}


OF_THE_IMAGE = {"RELAY_HOST", "RELAY_PORT", "RELAY_LOG_FORMAT"}
KEYS = {"AZURE_OPENAI_KEY", "AZURE_OPENAI_API_KEY", "OPENAI_API_KEY"}
OF_ENTRA = {"AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET"}
OF_A_PROXY = {"HTTPS_PROXY", "NO_PROXY"}
OF_RELAY_UP = {"RELAY_WORKERS", "RELAY_DATA", "RELAY_REDIS_SERVER"}


def test_compose_passes_every_setting_on_that_its_containers_can_use() -> None:
    services = yaml.safe_load(read("docker-compose.yml"))["services"]
    of_api, of_worker = (set(services[name]["environment"]) for name in ("api", "worker"))
    assert of_worker - OF_ENTRA - OF_A_PROXY == set(variables()) - OF_THE_IMAGE - OF_RELAY_UP
    assert of_worker - of_api == KEYS | OF_ENTRA | OF_A_PROXY


def test_the_example_names_only_settings_that_exist() -> None:
    example = re.findall(r"^#? ?([A-Z_]+)=", read(".env.example"), re.MULTILINE)
    assert set(example) <= set(variables())


async def test_the_redis_of_compose_can_be_full_and_keeps_all_by_its_append_only_file(
    tmp_path: Path,
) -> None:
    service = yaml.safe_load(read("docker-compose.yml"))["services"]["redis"]
    words = [word.replace("${RELAY_REDIS_MEMORY:-2gb}", "2gb") for word in service["command"]]
    port = free_port("127.0.0.1", 0)
    argv = [find_redis_server(), *words[1:], "--port", str(port), "--dir", str(tmp_path)]
    process = await spawn(argv)
    try:
        async with connect(f"redis://127.0.0.1:{port}") as redis:
            await until(lambda: answers(redis))
            told = await redis.config_get()
    finally:
        process.kill()
        await process.wait()
    assert (told["maxmemory"], told["maxmemory-policy"]) == (str(2048 * MIB), "noeviction")
    assert (told["save"], told["appendonly"]) == ("", "yes")


async def answers(redis: Redis) -> bool:
    with suppress(RedisError):
        return bool(await redis.ping())
    return False


def test_compose_has_a_health_check_for_all_that_must_live() -> None:
    services = yaml.safe_load(read("docker-compose.yml"))["services"]
    assert {name for name, service in services.items() if "healthcheck" in service} == {
        "redis",
        "api",
        "worker",
    }
    assert "ports" not in services["worker"], "a worker that holds a port cannot be scaled"


def test_compose_opens_its_api_to_this_machine_alone_unless_it_is_told() -> None:
    api = yaml.safe_load(read("docker-compose.yml"))["services"]["api"]
    assert api["ports"] == ["${RELAY_PUBLISH:-127.0.0.1}:${RELAY_PORTS:-8000}:8000"]


def test_compose_builds_its_image_once_for_all_that_run_it() -> None:
    services = yaml.safe_load(read("docker-compose.yml"))["services"]
    users = [name for name, service in services.items() if service["image"] == "chat-relay"]
    assert users == ["api", "worker", "demo"]
    assert [name for name, service in services.items() if "build" in service] == ["api"]


def test_compose_lets_its_processes_have_a_socket_for_each_viewer_and_answer() -> None:
    services = yaml.safe_load(read("docker-compose.yml"))["services"]
    assert all(services[name]["ulimits"] == {"nofile": 65536} for name in ("api", "worker"))


def test_the_image_has_what_every_setting_needs_in_the_versions_that_are_tested() -> None:
    tested, of_the_image = pins("run"), pins("entra")
    assert tested.items() <= of_the_image.items()
    assert of_the_image.keys() >= {"azure-identity", "aiohttp"}
    assert "-r requirements/entra.txt" in read("Dockerfile")


def pins(name: str) -> dict[str, str]:
    """Package -> version of a lock file; an extra that is asked for as well is no other package."""
    pin = re.compile(r"^([\w.-]+)(?:\[\w+\])?==(\S+)", re.MULTILINE)
    return dict(pin.findall(read(f"requirements/{name}.txt")))


def test_the_image_is_pinned_and_not_run_by_root() -> None:
    dockerfile = read("Dockerfile")
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert bases
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base) for base in bases)
    assert re.search(r"^USER [1-9]", dockerfile, re.MULTILINE)
    assert "--require-hashes" in dockerfile


async def test_the_rights_that_are_told_are_enough_for_all_that_is_asked_of_redis(
    redis: Redis, redis_server: RedisServer, settings: Settings
) -> None:
    [rule] = re.findall(r"^user relay (.+)$", read("docs/redis.md"), re.MULTILINE)
    admin: Any = redis
    await admin.execute_command("ACL", "LOG", "RESET")
    async with redis_user(redis, redis_server, *rule.split()) as url:
        limited = changed(settings, redis_url=url, lease_seconds=0.3)
        async with running_api(limited) as http, running_worker(limited) as worker:
            retried = {"status": 429, "status_times": 1, "key": "k", "retry_after_ms": 1}
            events = await watch(http, await ask(http, chunks=3, **retried))
            runs, erased = [await ask(http, chunks=1, end="stall") for _ in range(2)]
            await until(lambda: is_healthy(limited))
            answers = [
                await http.get(f"/streams/{runs}"),
                await http.get("/metrics"),
                await http.post(f"/streams/{runs}/cancel"),
                await http.delete(f"/streams/{erased}"),
                await http.post("/v1/chat/completions", json={"model": "demo"} | asking(chunks=2)),
            ]
            await ask(http, chunks=1, end="stall")
            worker.handle_sig(signal.SIGTERM)
        refused = await admin.execute_command("ACL", "LOG")
    assert events[-1].event == "completed"
    assert [each.status_code for each in answers] == [200, 200, 200, 204, 200]
    assert not refused, str(refused)
