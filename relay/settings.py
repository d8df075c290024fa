"""All settings, read once from the environment (and `.env`) at the entry of each process."""

import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from dotenv.parser import parse_stream
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, DotEnvSettingsSource, SettingsConfigDict

from relay.connection import check
from relay.errors import ConfigurationError
from relay.logs import get_logger
from relay.webhooks import Webhooks

MIB = 1024 * 1024
MOST = 10**9
"""Redis counts in 64 bits, milliseconds since 1970 too, and would refuse later what is beyond."""

PREFIXES = ("RELAY_", "AZURE_OPENAI_", "OPENAI_", "REDIS")
OTHERS = {"RELAY_PORTS", "RELAY_PUBLISH", "RELAY_URL", "RELAY_AUTHORIZATION", "RELAY_REDIS_MEMORY"}
"""Names of ours that are no settings: the command line and compose have them."""
CLOSE = 0.85
"""So alike that the one is meant by the other; RELAY_SERVICE_HOST, which an orchestrator may put
there, is 0.71 like RELAY_HOST."""

# As browsers send it, in small letters, for it is compared as it stands.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[0-9]+)?")

_NAME = re.compile(r"[a-zA-Z0-9_-]+(\.[a-zA-Z0-9_-]+)*")

# What is shown beside a deployment to be copied is the address of one kind of request.
_TOO_MUCH = re.compile(r"^//|/deployments/|/completions/?$|/responses/?$")

logger = get_logger()

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class UpstreamSettings(BaseModel):
    """Where and how to reach the model service; the outcome of reading the variables below."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["azure", "openai"]
    base_url: str
    api_key: SecretStr | None = None
    model: str
    api_version: str | None = None
    entra_scope: str | None = None


class Settings(BaseSettings):
    """One frozen object per process. Units stand in the names."""

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    redis_url: str = Field("redis://127.0.0.1:6379/0", validation_alias="REDIS_URL")

    host: str = Field("127.0.0.1", validation_alias="RELAY_HOST")
    port: int = Field(8000, ge=0, le=65535, validation_alias="RELAY_PORT")
    workers: int = Field(1, ge=1, validation_alias="RELAY_WORKERS")
    data: Path = Field(Path(".relay"), validation_alias="RELAY_DATA")
    redis_server: str | None = Field(None, validation_alias="RELAY_REDIS_SERVER")
    log_format: Literal["text", "json"] = Field("text", validation_alias="RELAY_LOG_FORMAT")
    cors_origins: str = Field("", validation_alias="RELAY_CORS_ORIGINS")
    allowed_hosts: str = Field("", validation_alias="RELAY_ALLOWED_HOSTS")

    system_prompt: str | None = Field(None, validation_alias="RELAY_SYSTEM_PROMPT")
    temperature: float | None = Field(None, ge=0, le=2, validation_alias="RELAY_TEMPERATURE")
    max_tokens: int | None = Field(None, ge=1, validation_alias="RELAY_MAX_TOKENS")

    webhook_hosts: str = Field("", validation_alias="RELAY_WEBHOOK_HOSTS")
    webhook_keys: SecretStr = Field(SecretStr(""), validation_alias="RELAY_WEBHOOK_SECRET")
    webhook_private: bool = Field(False, validation_alias="RELAY_WEBHOOK_PRIVATE")

    queue_limit: int = Field(1000, ge=1, le=MOST, validation_alias="RELAY_QUEUE_LIMIT")
    concurrency: int = Field(100, ge=1, validation_alias="RELAY_CONCURRENCY")
    live_seconds: int = Field(3600, ge=1, le=MOST, validation_alias="RELAY_LIVE_SECONDS")
    retention_seconds: int = Field(3600, ge=1, le=MOST, validation_alias="RELAY_RETENTION_SECONDS")
    lease_seconds: Seconds = Field(5.0, ge=0.1, validation_alias="RELAY_LEASE_SECONDS")
    max_attempts: int = Field(3, ge=1, validation_alias="RELAY_MAX_ATTEMPTS")
    grace_seconds: float = Field(
        60.0, ge=0, allow_inf_nan=False, validation_alias="RELAY_GRACE_SECONDS"
    )

    upstream_tries: int = Field(4, ge=1, validation_alias="RELAY_UPSTREAM_TRIES")
    first_chunk_seconds: Seconds = Field(120.0, validation_alias="RELAY_FIRST_CHUNK_SECONDS")
    stall_seconds: Seconds = Field(60.0, validation_alias="RELAY_STALL_SECONDS")
    answer_seconds: Seconds = Field(600.0, validation_alias="RELAY_ANSWER_SECONDS")

    # Our clients take a connection that is silent for 45 s for dead.
    heartbeat_seconds: Seconds = Field(15.0, lt=45, validation_alias="RELAY_HEARTBEAT_SECONDS")
    write_seconds: Seconds = Field(30.0, validation_alias="RELAY_WRITE_SECONDS")
    drain_seconds: float = Field(
        3.0, ge=0, allow_inf_nan=False, validation_alias="RELAY_DRAIN_SECONDS"
    )
    cache_bytes: int = Field(64 * MIB, ge=0, validation_alias="RELAY_CACHE_BYTES")
    body_bytes: int = Field(MIB, ge=1, validation_alias="RELAY_BODY_BYTES")

    azure_endpoint: str | None = Field(None, validation_alias="AZURE_OPENAI_ENDPOINT")
    azure_key: SecretStr | None = Field(
        None, validation_alias=AliasChoices("AZURE_OPENAI_KEY", "AZURE_OPENAI_API_KEY")
    )
    azure_deployment: str | None = Field(
        None,
        validation_alias=AliasChoices("AZURE_OPENAI_CHATGPT_DEPLOYMENT", "AZURE_OPENAI_DEPLOYMENT"),
    )
    azure_entra: bool = Field(False, validation_alias="AZURE_OPENAI_ENTRA")
    azure_scope: str = Field(
        "https://cognitiveservices.azure.com/.default", validation_alias="AZURE_OPENAI_SCOPE"
    )
    api_version: str = Field("2024-10-21", validation_alias="OPENAI_API_VERSION")
    openai_base_url: str | None = Field(None, validation_alias="OPENAI_BASE_URL")
    openai_key: SecretStr | None = Field(None, validation_alias="OPENAI_API_KEY")
    openai_model: str | None = Field(None, validation_alias="OPENAI_MODEL")

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, url: str) -> str:
        try:
            check(url)
        except ValueError:
            raise ValueError(
                "must be a URL such as redis://USER:PASSWORD@HOST:6379/0, the password "
                "percent-encoded, with no options but those of redis-py"
            ) from None
        return url

    @field_validator("data")
    @classmethod
    def _data(cls, data: Path) -> Path:
        try:
            return data.expanduser()
        except RuntimeError:
            raise ValueError("must be a folder; of the user after ~ none is known") from None

    @field_validator(
        "azure_endpoint",
        "azure_key",
        "azure_deployment",
        "openai_base_url",
        "openai_key",
        "openai_model",
        mode="before",
    )
    @classmethod
    def _alone(cls, value: Any) -> Any:
        """Without the line break or blank that a store of secrets or an editor put behind it."""
        return (value.strip() or None) if isinstance(value, str) else value

    @field_validator("azure_key", "openai_key")
    @classmethod
    def _key(cls, key: SecretStr | None) -> SecretStr | None:
        text = key.get_secret_value() if key else ""
        if not (text.isascii() and text.isprintable()):
            raise ValueError(
                "must be the key alone, without typographic quotes, accents or line breaks"
            )
        return key

    @field_validator("cors_origins")
    @classmethod
    def _cors_origins(cls, origins: str) -> str:
        if not _each_is(_ORIGIN, origins):
            raise ValueError(
                "must be *, or origins with commas between: each is scheme://host or "
                "scheme://host:port, in small letters and without a path"
            )
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _allowed_hosts(cls, hosts: str) -> str:
        if not _each_is(_NAME, hosts):
            raise ValueError(
                "must be *, or names with commas between, such as app.example.com: without scheme, "
                "port and path, and of another script as its xn-- form"
            )
        return hosts

    @model_validator(mode="after")
    def _lease_within_life(self) -> Self:
        if 3 * self.lease_seconds > self.live_seconds:
            # A stream would expire before its dead worker's lease, or that of an outage, is swept.
            raise ConfigurationError(
                "RELAY_LEASE_SECONDS must be at most a third of RELAY_LIVE_SECONDS: set either."
            )
        return self

    @property
    def open_ms(self) -> int:
        """How long Redis keeps an open stream: longer than that may wait for a worker, so that one
        which comes late can still end it."""
        return self.live_seconds * 1000 + self.retention_ms

    @property
    def retention_ms(self) -> int:
        return self.retention_seconds * 1000

    @property
    def lease_ms(self) -> int:
        return int(self.lease_seconds * 1000)

    @property
    def upstream(self) -> UpstreamSettings | None:
        """The configured model service, None if nothing at all is configured.

        Raises ConfigurationError, naming the variable, if it is configured by half or twice.
        """
        upstream = self.keyless_upstream
        if upstream and upstream.api_key is None and upstream.entra_scope is None:
            raise ConfigurationError(
                "Set AZURE_OPENAI_KEY, or AZURE_OPENAI_ENTRA=1 to sign in by Entra ID."
                if self.azure_endpoint
                else "Set OPENAI_API_KEY: the rest of this upstream is configured."
            )
        return upstream

    @property
    def keyless_upstream(self) -> UpstreamSettings | None:
        """As `upstream`, but its key may be missing: who asks it for nothing needs none, and what
        stands before the world had better not have it."""
        azure = (self.azure_endpoint, self.azure_key, self.azure_deployment)
        # OPENAI_API_KEY alone is common in a shell and not meant for us.
        openai = self.openai_base_url or self.openai_model
        if any(azure) or self.azure_entra:
            if openai:
                raise ConfigurationError(
                    "Two upstreams are configured: unset either the AZURE_OPENAI_ variables or "
                    "OPENAI_BASE_URL and OPENAI_MODEL."
                )
            return self._azure()
        if openai:
            return self._openai()
        return None

    @property
    def webhooks(self) -> Webhooks:
        """Raises ConfigurationError, naming the variable."""
        keys = self.webhook_keys.get_secret_value()
        return Webhooks(self.webhook_hosts, keys, private=self.webhook_private)

    def _azure(self) -> UpstreamSettings:
        endpoint = _url(
            "AZURE_OPENAI_ENDPOINT", self.azure_endpoint, "https://NAME.openai.azure.com"
        )
        if urlsplit(endpoint).path.rstrip("/").endswith("/openai"):
            raise ConfigurationError(
                "AZURE_OPENAI_ENDPOINT must end before /openai, or with /openai/v1/."
            )
        deployment = _required("AZURE_OPENAI_CHATGPT_DEPLOYMENT", self.azure_deployment)
        scope = self.azure_scope if self.azure_entra else None
        key = None if self.azure_entra else self.azure_key
        if urlsplit(endpoint).path.rstrip("/").endswith("/openai/v1"):
            return UpstreamSettings(
                kind="openai", base_url=endpoint, api_key=key, model=deployment, entra_scope=scope
            )
        return UpstreamSettings(
            kind="azure",
            base_url=endpoint,
            api_key=key,
            model=deployment,
            api_version=self.api_version,
            entra_scope=scope,
        )

    def _openai(self) -> UpstreamSettings:
        # Said in any case: the SDK would look into the environment itself, and take one that is
        # set to nothing for the URL.
        url = self.openai_base_url or "https://api.openai.com/v1"
        return UpstreamSettings(
            kind="openai",
            base_url=_url("OPENAI_BASE_URL", url, "https://HOST/v1"),
            api_key=self.openai_key,
            model=_required("OPENAI_MODEL", self.openai_model),
        )


def load_settings() -> Settings:
    """Read the environment and `.env`. Raises ConfigurationError, naming the first bad variable."""
    try:
        _check_env_file()
        return Settings()
    except UnicodeDecodeError:  # Some shells write UTF-16 by `>`.
        raise ConfigurationError(".env is not UTF-8: save it as that.") from None
    except OSError as error:
        raise ConfigurationError(f".env cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"{_names(first['loc'][0])}: {reason}.") from None


def _names(variable: object) -> str:
    """All names of a setting of which pydantic tells the first, whichever was used."""
    for field in Settings.model_fields.values():
        match field.validation_alias:
            case AliasChoices(choices=[first, *_] as names) if first == variable:
                return " or ".join(map(str, names))
    return str(variable)


def _check_env_file() -> None:
    """Raises ConfigurationError for a line that is none: who reads the file would pass over it, and
    with a key in it the demo upstream would answer."""
    path = Settings.model_config.get("env_file")
    if not isinstance(path, str) or not Path(path).is_file():
        return
    with Path(path).open(encoding="utf-8") as text:
        for binding in parse_stream(text):
            if binding.error:
                above = binding.original.string.partition(binding.original.string.strip())[0]
                line = binding.original.line + above.count("\n")
                raise ConfigurationError(f"Line {line} of .env cannot be read: write NAME=value.")


def listed(text: str) -> list[str]:
    """What stands between commas."""
    return [each.strip() for each in text.split(",")]


def _each_is(pattern: re.Pattern[str], text: str) -> bool:
    """Where `*` stands for any."""
    return all(each in {"", "*"} or pattern.fullmatch(each) for each in listed(text))


def variables() -> Iterator[str]:
    """The names of all that are settings."""
    for field in Settings.model_fields.values():
        alias: Any = field.validation_alias
        yield from getattr(alias, "choices", [alias])


def misspelt() -> dict[str, str | None]:
    """What is set, has a name like ours and is no setting -> the one that it looks like. In the
    environment it may be somebody else's, and has to look like one; in `.env` it was meant for us.
    """
    known = set(variables())
    written = {
        name.upper(): value for name, value in DotEnvSettingsSource(Settings).env_vars.items()
    }
    values = written | {name.upper(): value for name, value in os.environ.items()}
    unknown = {name for name, value in values.items() if value and name.startswith(PREFIXES)}
    told: dict[str, str | None] = {}
    for name in sorted(unknown - known - OTHERS):
        nearest = get_close_matches(name, known, 1, CLOSE)
        if nearest or name in written:
            told[name] = nearest[0] if nearest else None
    return told


def warn_of_misspelt() -> None:
    for name, nearest in misspelt().items():
        logger.warning("unknown_setting", name=name, nearest=nearest)


def _required(variable: str, value: str | None) -> str:
    if value:
        return value
    raise ConfigurationError(f"Set {variable}: the rest of this upstream is configured.")


def _url(variable: str, value: str | None, example: str) -> str:
    url = _required(variable, value)
    try:
        parts = HttpUrl(url)
        (parts.host or "").encode("idna")  # As it will be looked up.
    except (ValidationError, UnicodeError):
        raise ConfigurationError(f"{variable} must be a URL such as {example}.") from None
    if parts.query or parts.fragment or _TOO_MUCH.search(parts.path or ""):
        raise ConfigurationError(
            f"{variable} must end before the path of a request, as {example} does."
        )
    return url
