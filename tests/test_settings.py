from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from relay.errors import ConfigurationError
from relay.settings import Settings, UpstreamSettings, load_settings, misspelt, variables

# Read before a fixture turns it off.
ENV_FILE = Settings.model_config.get("env_file")

AZURE = {
    "AZURE_OPENAI_ENDPOINT": "https://name.openai.azure.com",
    "AZURE_OPENAI_KEY": "azure-secret",
    "AZURE_OPENAI_CHATGPT_DEPLOYMENT": "gpt",
}
OPENAI = {"OPENAI_API_KEY": "openai-secret", "OPENAI_MODEL": "gpt"}
SCOPE = "https://cognitiveservices.azure.com/.default"


def load(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Settings:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    return load_settings()


def without(environment: dict[str, str], variable: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != variable}


def upstream(**parts: Any) -> UpstreamSettings:
    return UpstreamSettings(**({"kind": "azure", "model": "gpt"} | parts))


def azure(**parts: Any) -> UpstreamSettings:
    classic = {
        "base_url": AZURE["AZURE_OPENAI_ENDPOINT"],
        "api_key": SecretStr("azure-secret"),
        "api_version": "2024-10-21",
    }
    return upstream(**(classic | parts))


def v1(path: str) -> str:
    return AZURE["AZURE_OPENAI_ENDPOINT"] + path


def test_everything_has_a_default_but_the_upstream() -> None:
    settings = load_settings()
    assert settings.upstream is None
    assert settings.redis_url == "redis://127.0.0.1:6379/0"


def test_units_are_converted_once() -> None:
    settings = Settings(live_seconds=2, retention_seconds=3, lease_seconds=0.5)
    assert (settings.open_ms, settings.retention_ms, settings.lease_ms) == (5000, 3000, 500)


CONFIGURED: list[tuple[dict[str, str], UpstreamSettings]] = [
    (AZURE, azure()),
    (AZURE | {"OPENAI_API_VERSION": "2025-01-01"}, azure(api_version="2025-01-01")),
    (AZURE | {"OPENAI_API_KEY": "of something else"}, azure()),
    (
        without(AZURE, "AZURE_OPENAI_KEY") | {"AZURE_OPENAI_API_KEY": "other"},
        azure(api_key=SecretStr("other")),
    ),
    (
        without(AZURE, "AZURE_OPENAI_CHATGPT_DEPLOYMENT") | {"AZURE_OPENAI_DEPLOYMENT": "other"},
        azure(model="other"),
    ),
    (
        without(AZURE, "AZURE_OPENAI_KEY") | {"AZURE_OPENAI_ENTRA": "1"},
        azure(api_key=None, entra_scope=SCOPE),
    ),
    (AZURE | {"AZURE_OPENAI_ENTRA": "true"}, azure(api_key=None, entra_scope=SCOPE)),
    (AZURE | {"AZURE_OPENAI_ENTRA": "0"}, azure()),
    (
        AZURE | {"AZURE_OPENAI_ENTRA": "1", "AZURE_OPENAI_SCOPE": "https://x/.default"},
        azure(api_key=None, entra_scope="https://x/.default"),
    ),
    *(
        (
            AZURE | {"AZURE_OPENAI_ENDPOINT": v1(path)},
            azure(kind="openai", base_url=v1(path), api_version=None),
        )
        for path in ("/openai/v1", "/openai/v1/")
    ),
    (
        AZURE | {"AZURE_OPENAI_ENDPOINT": v1("/openai/v1"), "AZURE_OPENAI_ENTRA": "1"},
        upstream(kind="openai", base_url=v1("/openai/v1"), entra_scope=SCOPE),
    ),
    (
        OPENAI,
        upstream(
            kind="openai", base_url="https://api.openai.com/v1", api_key=SecretStr("openai-secret")
        ),
    ),
    (
        OPENAI | {"OPENAI_BASE_URL": "http://localhost:11434/v1"},
        upstream(
            kind="openai",
            base_url="http://localhost:11434/v1",
            api_key=SecretStr("openai-secret"),
        ),
    ),
]


def test_a_key_alone_which_many_have_in_their_shell_configures_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert load(monkeypatch, {"OPENAI_API_KEY": "of something else"}).upstream is None


@pytest.mark.parametrize(("environment", "expected"), CONFIGURED)
def test_a_whole_configuration_is_an_upstream(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: UpstreamSettings
) -> None:
    assert load(monkeypatch, environment).upstream == expected


@pytest.mark.parametrize("around", ["%s\n", "%s\r", " %s ", "\t%s\r\n"])
@pytest.mark.parametrize(
    "environment", [AZURE, OPENAI | {"OPENAI_BASE_URL": "http://localhost/v1"}]
)
def test_what_a_store_of_secrets_puts_around_a_value_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], around: str
) -> None:
    padded = {variable: around % value for variable, value in environment.items()}
    assert load(monkeypatch, padded).upstream == load(monkeypatch, environment).upstream


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        (without(AZURE, "AZURE_OPENAI_ENDPOINT"), "AZURE_OPENAI_ENDPOINT"),
        (AZURE | {"AZURE_OPENAI_KEY": " "}, "AZURE_OPENAI_KEY"),
        (without(AZURE, "AZURE_OPENAI_KEY"), "AZURE_OPENAI_KEY"),
        (without(AZURE, "AZURE_OPENAI_KEY"), "AZURE_OPENAI_ENTRA"),
        (without(AZURE, "AZURE_OPENAI_CHATGPT_DEPLOYMENT"), "AZURE_OPENAI_CHATGPT_DEPLOYMENT"),
        ({"AZURE_OPENAI_ENTRA": "1"}, "AZURE_OPENAI_ENDPOINT"),
        (without(OPENAI, "OPENAI_API_KEY"), "OPENAI_API_KEY"),
        ({"OPENAI_BASE_URL": "http://localhost/v1"}, "OPENAI_MODEL"),
        ({"OPENAI_BASE_URL": "http://localhost/v1", "OPENAI_API_KEY": "k"}, "OPENAI_MODEL"),
    ],
)
def test_half_a_configuration_names_the_variable_to_set(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], variable: str
) -> None:
    settings = load(monkeypatch, environment)
    with pytest.raises(ConfigurationError, match=rf"Set .*\b{variable}\b"):
        _ = settings.upstream


@pytest.mark.parametrize(
    "environment", [without(AZURE, "AZURE_OPENAI_KEY"), without(OPENAI, "OPENAI_API_KEY")]
)
def test_who_asks_the_model_for_nothing_needs_no_key(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    upstream = load(monkeypatch, environment).keyless_upstream
    assert upstream is not None
    assert upstream.model == "gpt"


@pytest.mark.parametrize(
    ("variable", "rest"), [("AZURE_OPENAI_ENDPOINT", AZURE), ("OPENAI_BASE_URL", OPENAI)]
)
@pytest.mark.parametrize(
    "url",
    [
        "name.openai.azure.com",
        "ftp://x",
        "https://",
        "//x",
        "https://[x",
        "https://x]/",
        "http://127.0.0.1:abc",
        "http://127.0.0.1:99999",
        "https://my resource.openai.azure.com",
        "https://https://x",
        "https://name..openai.azure.com",
        "https://x/openai/deployments/gpt/chat/completions?api-version=2024-10-21",
        "https://x/openai/v1/chat/completions",
        "https://x/?api-version=2024-10-21",
        "https://x/#y",
    ],
)
def test_an_upstream_url_that_is_none_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, rest: dict[str, str], url: str
) -> None:
    settings = load(monkeypatch, rest | {variable: url})
    with pytest.raises(ConfigurationError, match=variable):
        _ = settings.upstream


def test_the_paths_of_the_sdk_are_no_part_of_an_azure_endpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = load(monkeypatch, AZURE | {"AZURE_OPENAI_ENDPOINT": v1("/openai/")})
    with pytest.raises(ConfigurationError, match="AZURE_OPENAI_ENDPOINT must end before /openai"):
        _ = settings.upstream


@pytest.mark.parametrize(
    "url", ["https://u:p@h_1:8443/v1", "https://x/v1beta/openai/", "http://[::1]:1/v1"]
)
def test_an_upstream_url_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    upstream = load(monkeypatch, OPENAI | {"OPENAI_BASE_URL": url}).upstream
    assert upstream is not None
    assert upstream.base_url == url


AZURE_KEYS = "AZURE_OPENAI_KEY or AZURE_OPENAI_API_KEY"


@pytest.mark.parametrize(
    ("variable", "told", "rest"),
    [
        ("AZURE_OPENAI_KEY", AZURE_KEYS, AZURE),
        ("AZURE_OPENAI_API_KEY", AZURE_KEYS, without(AZURE, "AZURE_OPENAI_KEY")),
        ("OPENAI_API_KEY", "OPENAI_API_KEY", OPENAI),
    ],
)
@pytest.mark.parametrize("key", ["“demo”", "dé", "de\nmo"])
def test_a_key_that_no_header_can_carry_is_told_at_the_start_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, variable: str, told: str, rest: dict[str, str], key: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{told}: must be the key alone") as raised:
        load(monkeypatch, rest | {variable: key})
    assert key not in str(raised.value)


def test_the_data_may_be_kept_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, {"RELAY_DATA": "~/x"}).data == Path.home() / "x"


@pytest.mark.parametrize(
    "openai", [OPENAI, {"OPENAI_MODEL": "m"}, {"OPENAI_BASE_URL": "http://localhost/v1"}]
)
@pytest.mark.parametrize("other", [AZURE, {"AZURE_OPENAI_ENTRA": "1"}])
def test_two_upstreams_are_refused(
    monkeypatch: pytest.MonkeyPatch, other: dict[str, str], openai: dict[str, str]
) -> None:
    settings = load(monkeypatch, other | openai)
    with pytest.raises(ConfigurationError, match="Two upstreams"):
        _ = settings.upstream


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("REDIS_URL", "http://localhost:6379"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "redis://[x"),
        ("REDIS_URL", "redis://host/production"),
        ("REDIS_URL", "rediss://host/0/1"),
        ("RELAY_HEARTBEAT_SECONDS", "45"),
        ("REDIS_URL", "redis://host?nonsense=20"),
        ("REDIS_URL", "redis://host?socket_timeout=soon"),
        ("REDIS_URL", "redis://host?retry_on_error=all&retry_on_timeout=true"),
        ("REDIS_URL", "rediss://host?ssl_cert_reqs=perhaps"),
        ("RELAY_PORT", "http"),
        ("RELAY_PORT", "65536"),
        ("RELAY_PORT", "-1"),
        ("RELAY_WORKERS", "0"),
        ("RELAY_DATA", "~nobody-of-that-name/x"),
        ("RELAY_QUEUE_LIMIT", "0"),
        ("RELAY_QUEUE_LIMIT", "9999999999999999"),
        ("RELAY_LIVE_SECONDS", "9999999999999999"),
        ("RELAY_RETENTION_SECONDS", "9999999999999999"),
        ("RELAY_CONCURRENCY", "0"),
        ("RELAY_LEASE_SECONDS", "0"),
        ("RELAY_LEASE_SECONDS", "nan"),
        ("RELAY_LEASE_SECONDS", "soon"),
        ("RELAY_GRACE_SECONDS", "-1"),
        ("RELAY_TEMPERATURE", "2.1"),
        ("RELAY_MAX_TOKENS", "0"),
        ("RELAY_MAX_ATTEMPTS", "0"),
        ("RELAY_RETENTION_SECONDS", "1.5"),
        ("RELAY_LOG_FORMAT", "xml"),
        ("RELAY_CORS_ORIGINS", "https://app.example/"),
        ("RELAY_CORS_ORIGINS", "https://app.example, https://other.example/chat"),
        ("RELAY_CORS_ORIGINS", "https://App.example"),
        ("RELAY_CORS_ORIGINS", "app.example"),
        ("RELAY_CORS_ORIGINS", "https://*.app.example"),
        *(
            ("RELAY_ALLOWED_HOSTS", hosts)
            for hosts in ("a.example:8000", "https://a.example", "*.example", "a.example.", "ü.de")
        ),
        ("AZURE_OPENAI_ENTRA", "perhaps"),
    ],
)
def test_a_bad_value_names_its_variable_and_is_not_repeated_to_the_user(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{variable}: ") as refusal:
        load(monkeypatch, {variable: value})
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize("seconds", ["0.0001", "inf"])
def test_a_lease_that_redis_cannot_keep_is_refused(
    monkeypatch: pytest.MonkeyPatch, seconds: str
) -> None:
    with pytest.raises(ConfigurationError, match="RELAY_LEASE_SECONDS"):
        load(monkeypatch, {"RELAY_LEASE_SECONDS": seconds})


@pytest.mark.parametrize(
    "environment",
    [{"RELAY_LIVE_SECONDS": "14"}, {"RELAY_LIVE_SECONDS": "20", "RELAY_LEASE_SECONDS": "7"}],
)
def test_a_stream_may_not_expire_before_its_lease_is_swept(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    with pytest.raises(ConfigurationError, match=r"^RELAY_LEASE_SECONDS .* RELAY_LIVE_SECONDS"):
        load(monkeypatch, environment)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:pw@host:1/12",
        "rediss://host",
        "rediss://host?ssl_cert_reqs=none&health_check_interval=30",
        "redis://host?socket_timeout=5&max_connections=20",
        "unix:///tmp/x?db=1",
    ],
)
def test_every_way_to_a_redis_is_allowed(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    assert load(monkeypatch, {"REDIS_URL": url}).redis_url == url


@pytest.mark.parametrize(
    "origins",
    [
        "*",
        "https://app.example",
        "http://localhost:5173, http://[::1]:5173,http://127.0.0.1",
        "capacitor://localhost",
    ],
)
def test_every_origin_that_a_browser_sends_is_allowed(
    monkeypatch: pytest.MonkeyPatch, origins: str
) -> None:
    assert load(monkeypatch, {"RELAY_CORS_ORIGINS": origins}).cors_origins == origins


WEBHOOKS = {"RELAY_WEBHOOK_HOSTS": "hooks.test", "RELAY_WEBHOOK_SECRET": f"whsec_{'a' * 32}"}


def test_webhooks_go_to_the_hosts_that_are_named_and_to_nobody_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not load_settings().webhooks.allowed
    assert load(monkeypatch, WEBHOOKS).webhooks.target("https://hooks.test").host == "hooks.test"
    private = load(monkeypatch, {"RELAY_WEBHOOK_PRIVATE": "1"}).webhooks
    assert private.target("http://hooks.test").scheme == "http"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RELAY_WEBHOOK_HOSTS", "https://hooks.test"),
        ("RELAY_WEBHOOK_SECRET", ""),
        ("RELAY_WEBHOOK_SECRET", "short"),
    ],
)
def test_half_of_what_webhooks_need_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    settings = load(monkeypatch, WEBHOOKS | {variable: value})
    with pytest.raises(ConfigurationError, match=variable):
        _ = settings.webhooks


def test_an_empty_variable_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(
        monkeypatch,
        without(AZURE, "AZURE_OPENAI_KEY")
        | {"AZURE_OPENAI_KEY": "", "AZURE_OPENAI_API_KEY": "second", "OPENAI_BASE_URL": ""}
        | {"RELAY_PORT": "", "REDIS_URL": ""},
    )
    assert settings.upstream == azure(api_key=SecretStr("second"))
    assert (settings.port, settings.redis_url) == (8000, "redis://127.0.0.1:6379/0")


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        azure().model = "other"  # type: ignore[misc]


def test_a_changed_copy_has_its_own_upstream() -> None:
    settings = Settings(openai_key=SecretStr("k"), openai_model="one")
    assert settings.upstream is not None
    changed = settings.model_copy(update={"openai_model": "two"}).upstream
    assert changed is not None
    assert changed.model == "two"


def test_no_key_is_ever_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"OPENAI_API_KEY": "openai-secret", "RELAY_WEBHOOK_SECRET": "webhook-secret"}
    settings = load(monkeypatch, AZURE | others)
    printed = f"{settings!r} {settings} {settings.upstream!r} {settings.upstream}"
    assert "secret" not in printed


@pytest.fixture
def env_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(Settings.model_config, "env_file", ENV_FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / ".env"


def test_the_env_file_of_the_working_directory_is_read(env_file: Path) -> None:
    env_file.write_text("RELAY_PORT=9000\nRELAY_HOST=\nUNHEARD_OF=1\nOPENAI_MODEL='m' # note\n")
    settings = load_settings()
    assert (settings.port, settings.host, settings.openai_model) == (9000, "127.0.0.1", "m")


def test_the_environment_stands_above_the_env_file(
    env_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env_file.write_text("RELAY_PORT=9000\n")
    assert load(monkeypatch, {"RELAY_PORT": "9001"}).port == 9001


def test_a_bad_value_in_the_env_file_names_its_variable(env_file: Path) -> None:
    env_file.write_text("RELAY_PORT=http\n")
    with pytest.raises(ConfigurationError, match=r"^RELAY_PORT: "):
        load_settings()


def test_an_env_file_that_is_not_utf8_is_told_as_that(env_file: Path) -> None:
    env_file.write_text("RELAY_PORT=9000\n", encoding="utf-16")
    with pytest.raises(ConfigurationError, match=r"\.env is not UTF-8"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("AZURE_OPENAI_KEY: secret\n", 1),
        ("# A note\n\nRELAY_PORT 9000\nRELAY_HOST=x", 3),
        ("RELAY_PORT=9000\nAZURE_OPENAI_KEY='secret\nRELAY_HOST=x\n", 2),
    ],
)
def test_a_line_of_the_env_file_that_is_none_is_told_by_its_number_alone(
    text: str, line: int, env_file: Path
) -> None:
    env_file.write_text(text)
    with pytest.raises(ConfigurationError, match=rf"^Line {line} of \.env ") as raised:
        load_settings()
    assert "secret" not in str(raised.value)


def test_an_env_file_that_cannot_be_read_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Settings.model_config, "env_file", 300 * "x")
    with pytest.raises(ConfigurationError, match=r"\.env cannot be read \(File name too long\)"):
        load_settings()


def test_no_env_file_is_no_error(env_file: Path) -> None:
    assert not env_file.exists()
    assert load_settings().port == 8000


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("RELAY_PROT", "RELAY_PORT"),
        ("relay_prot", "RELAY_PORT"),
        ("RELAY_GRACE_SECOND", "RELAY_GRACE_SECONDS"),
        ("AZURE_OPENAI_ENDPIONT", "AZURE_OPENAI_ENDPOINT"),
        ("AZURE_OPENAI_API_VERSION", "OPENAI_API_VERSION"),
        ("OPENAI_MODLE", "OPENAI_MODEL"),
        ("REDIS_URI", "REDIS_URL"),
        ("REDISURL", "REDIS_URL"),
    ],
)
def test_a_variable_that_looks_like_a_setting_is_told_with_the_one_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, env_file: Path, name: str, meant: str
) -> None:
    env_file.write_text(f"{name}=1\n")
    assert misspelt() == {name.upper(): meant}
    monkeypatch.setenv(name, "")
    assert misspelt() == {}
    monkeypatch.setenv(name, "1")
    env_file.unlink()
    assert misspelt() == {name.upper(): meant}


@pytest.mark.parametrize("name", ["REDIS_HOST", "RELAY_REDIS_URL", "OPENAI_KEY", "RELAY_TIMEOUT"])
def test_what_is_no_setting_is_told_if_it_was_written_for_us(
    monkeypatch: pytest.MonkeyPatch, env_file: Path, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert misspelt() == {}
    env_file.write_text(f"{name}=1\nPATH_OF_OTHERS=1\n")
    assert misspelt() == {name: None}


def test_what_others_put_into_the_environment_is_taken_for_no_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["RELAY_SERVICE_HOST", "RELAY_SERVICE_PORT", "RELAY_PORT_8000_TCP_ADDR", "RELAY_PORTS"]
    names += ["RELAY_URL", "RELAY_AUTHORIZATION", "RELAY_REDIS_MEMORY"]
    names += ["OPENAI_ORG_ID", "OPENAI_API_TYPE", "OPENAI_LOG"]
    for name in [*names, *variables()]:
        monkeypatch.setenv(name, "1")
    assert misspelt() == {}
