"""Settings: the environment (`SMSD_…`), checked once at the start.

Every setting can also be read from a file, by `SMSD_<NAME>_FILE`: the way secrets are handed over by systemd
credentials and container secrets. A wrong value is a `ConfigError` that names the variable, what it got and what
it takes.
"""

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "SMSD_"
_SAFE_CHARACTERS = 16
_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:\d{1,5})?")


class ConfigError(Exception):
    """One line per wrong setting, each with the variable, what it got and what it takes."""


class Settings(BaseSettings):
    """All settings of the daemon. Durations are seconds unless a name says otherwise."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    database_url: SecretStr | None = Field(
        None, description="Postgres 15 to 18; without it an embedded one is started"
    )
    data_dir: Path = Field(Path("~/.smsd"), description="where the embedded Postgres is kept")
    postgres_bin: Path | None = Field(
        None, description="folder with the embedded Postgres' programs"
    )
    auto_migrate: bool = Field(False, description="serve brings the schema up to date by itself")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    admin_token: SecretStr | None = Field(
        None, min_length=1, description="opens /api/admin; take at least 16 characters"
    )
    public_url: str | None = Field(
        None, description="how recipients reach this daemon; starts unsubscribe links"
    )
    signing_key: SecretStr | None = Field(
        None,
        min_length=1,
        description="signs unsubscribe links; `new,old` while rotating; else from the database",
    )
    mitto_base_url: str = Field(
        "https://messaging.mittoapi.com", description="where Mitto's API is"
    )
    mitto_api_key: SecretStr | None = Field(
        None, description="for traffic accounts without a key of their own"
    )
    mitto_timeout: float = Field(20, gt=0, le=300, description="seconds for one request to Mitto")
    webhook_secret: SecretStr | None = Field(
        None, min_length=1, description="expected in X-Webhook-Secret where the account has none"
    )
    batch_size: int = Field(
        500, ge=1, le=500, description="largest batch; campaigns use 100 to this, by their size"
    )
    worker_concurrency: int = Field(
        5, ge=1, le=1000, description="least requests in flight per traffic account"
    )
    requests_per_second: int | None = Field(
        None, ge=1, description="limit over all traffic accounts; none"
    )
    max_attempts: int = Field(6, ge=1, le=20, description="first POST and its retries")
    backoff_seconds: float = Field(
        3, gt=0, le=600, description="first wait before a retry; doubles, with jitter"
    )
    lease_seconds: float = Field(
        30, ge=1, le=600, description="a replica is dead when its heartbeat rests this long"
    )
    unknown_after: float = Field(
        900, gt=0, description="seconds until an unknown message waits for a person"
    )
    retention_days: float = Field(
        90,
        ge=0,
        le=36_500,
        description="days that messages are kept after their campaign ended; fractions too; 0 keeps all",
    )
    pool_size: int = Field(
        10,
        ge=4,
        le=200,
        description="connections to Postgres: three tenths for new work, a fifth for answers",
    )
    shutdown_seconds: float = Field(
        30, gt=0, le=3600, description="budget of an orderly stop; at least the time-out + 5"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged"
    )
    log_format: Literal["json", "console"] = Field("json", description="how log lines look")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment only, read by `load`: no .env file is picked up from the working folder."""
        return (init_settings,)

    @field_validator("database_url")
    @classmethod
    def _postgres_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        parts = urlsplit(value.get_secret_value())
        hosts = parts.netloc.rpartition("@")[2].split(",")
        suits = all(_HOST.fullmatch(host) for host in hosts)
        if parts.scheme not in ("postgres", "postgresql") or not suits:
            raise ValueError("takes postgresql://user:password@host:port/database")
        return value

    @field_validator("public_url", "mitto_base_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError("takes http(s)://host[:port][/path]")
        return value.rstrip("/")

    @field_validator("signing_key")
    @classmethod
    def _signing_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not all(key.strip() for key in value.get_secret_value().split(",")):
            raise ValueError("takes keys separated by commas, none of them empty")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.shutdown_seconds < self.mitto_timeout + 5:
            raise ValueError(
                f"SMSD_SHUTDOWN_SECONDS={self.shutdown_seconds:g} takes at least SMSD_MITTO_TIMEOUT + 5 "
                f"= {self.mitto_timeout + 5:g}: requests in flight must be able to end"
            )
        if not self.on_loopback and self.webhook_secret is None:
            raise ValueError(
                f"SMSD_WEBHOOK_SECRET is not set, and SMSD_HOST={self.host} is not loopback: set a secret, "
                "or anybody could send receipts"
            )
        return self

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the daemon."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def signing_keys(self) -> list[bytes]:
        """The keys given by the environment, the one that signs first; empty where the database has them."""
        if self.signing_key is None:
            return []
        return [key.strip().encode() for key in self.signing_key.get_secret_value().split(",")]

    @property
    def weak_secrets(self) -> list[str]:
        """Variables whose secrets are too short to withstand guessing."""
        given = {
            "SMSD_ADMIN_TOKEN": self.admin_token,
            "SMSD_SIGNING_KEY": self.signing_key,
            "SMSD_WEBHOOK_SECRET": self.webhook_secret,
        }
        return [name for name, it in given.items() if it and len(it) < _SAFE_CHARACTERS]

    @property
    def link_base(self) -> str:
        """What public links start with."""
        return self.public_url or f"http://{self.host}:{self.port}"


def load(environment: Mapping[str, str] | None = None) -> Settings:
    """Reads the settings from an environment (this process' one by default). Raises ConfigError."""
    environment = os.environ if environment is None else environment
    given = dict(_values(environment))
    try:
        return Settings(**given)  # type: ignore[arg-type]  # words are what pydantic converts
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error, given))) from None


def _values(environment: Mapping[str, str]) -> Mapping[str, str]:
    values: dict[str, str] = {}
    for name in Settings.model_fields:
        variable = PREFIX + name.upper()
        if path := environment.get(variable + "_FILE"):
            if environment.get(variable):
                raise ConfigError(f"{variable} and {variable}_FILE are both set: keep one of them")
            try:
                values[name] = Path(path).read_text().strip()
            except OSError as error:
                raise ConfigError(
                    f"{variable}_FILE={path} cannot be read: {error.strerror}"
                ) from None
        elif value := environment.get(variable):
            values[name] = value
    return values


def _lines(error: ValidationError, given: Mapping[str, str]) -> list[str]:
    lines = []
    for problem in error.errors():
        if not problem["loc"]:
            lines.append(problem["msg"].removeprefix("Value error, "))
            continue
        name = str(problem["loc"][0])
        annotation = str(Settings.model_fields[name].annotation)
        shown = "(hidden)" if "SecretStr" in annotation else repr(given.get(name))
        takes = problem["msg"].removeprefix("Value error, ")
        about = Settings.model_fields[name].description
        lines.append(
            f"{PREFIX}{name.upper()}: got {shown}; {takes[0].lower()}{takes[1:]} ({about})"
        )
    return lines
