"""Settings: what each takes, which combinations cannot work, secrets from files."""

from pathlib import Path

import pytest

from smsd import config
from smsd.config import ConfigError


def test_nothing_set_is_a_daemon_on_loopback_with_the_documented_defaults() -> None:
    settings = config.load({})
    assert (settings.host, settings.port) == ("127.0.0.1", 8080)
    assert settings.mitto_base_url == "https://messaging.mittoapi.com"
    assert (settings.mitto_timeout, settings.shutdown_seconds) == (20, 30)
    assert (settings.batch_size, settings.worker_concurrency) == (500, 5)
    assert (settings.max_attempts, settings.backoff_seconds) == (6, 3)
    assert (settings.lease_seconds, settings.unknown_after) == (30, 900)
    assert settings.requests_per_second is None
    assert settings.database_url is None
    assert settings.admin_token is None
    assert settings.log_format == "json"


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("SMSD_PORT", "http", "integer"),
        ("SMSD_PORT", "65536", "65535"),
        ("SMSD_BATCH_SIZE", "501", "500"),
        ("SMSD_BATCH_SIZE", "0", "1"),
        ("SMSD_WORKER_CONCURRENCY", "0", "1"),
        ("SMSD_REQUESTS_PER_SECOND", "0", "1"),
        ("SMSD_MAX_ATTEMPTS", "0", "1"),
        ("SMSD_BACKOFF_SECONDS", "-1", "0"),
        ("SMSD_LEASE_SECONDS", "soon", "number"),
        ("SMSD_UNKNOWN_AFTER", "nan", "0"),
        ("SMSD_POOL_SIZE", "3", "4"),
        ("SMSD_LOG_LEVEL", "loud", "'debug'"),
        ("SMSD_LOG_FORMAT", "xml", "'console'"),
        ("SMSD_AUTO_MIGRATE", "perhaps", "boolean"),
        ("SMSD_PUBLIC_URL", "sms.example", "http(s)://host"),
        ("SMSD_PUBLIC_URL", "https://sms.example/?a=1", "http(s)://host"),
        ("SMSD_MITTO_BASE_URL", "ftp://mitto", "http(s)://host"),
    ],
)
def test_a_wrong_value_names_the_variable_what_it_got_and_what_it_takes(
    name: str, value: str, takes: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load({name: value})
    line = str(caught.value)
    assert line.startswith(f"{name}: got {value!r}; ")
    assert takes in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SMSD_DATABASE_URL", "mysql://user:pa55word@host/db"),
        ("SMSD_SIGNING_KEY", "pa55word,,pa55word"),
    ],
)
def test_a_wrong_secret_is_named_but_not_shown(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load({name: value})
    assert str(caught.value).startswith(f"{name}: got (hidden); ")
    assert "pa55" not in str(caught.value)


def test_secrets_that_can_be_guessed_are_taken_and_named() -> None:
    settings = config.load({"SMSD_ADMIN_TOKEN": "pa55word", "SMSD_WEBHOOK_SECRET": "x" * 16})
    assert settings.weak_secrets == ["SMSD_ADMIN_TOKEN"]


def test_every_wrong_value_gets_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        config.load({"SMSD_PORT": "x", "SMSD_POOL_SIZE": "y"})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "SMSD_PORT",
        "SMSD_POOL_SIZE",
    ]


def test_a_stop_shorter_than_a_request_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"SMSD_SHUTDOWN_SECONDS=24 takes at least .* = 25"):
        config.load({"SMSD_SHUTDOWN_SECONDS": "24"})
    assert config.load({"SMSD_SHUTDOWN_SECONDS": "25"}).shutdown_seconds == 25


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "sms.example"])
def test_beyond_loopback_a_webhook_secret_is_needed(host: str) -> None:
    with pytest.raises(ConfigError, match="SMSD_WEBHOOK_SECRET is not set"):
        config.load({"SMSD_HOST": host})
    assert not config.load({"SMSD_HOST": host, "SMSD_WEBHOOK_SECRET": "long-enough"}).on_loopback


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_on_loopback_no_webhook_secret_is_needed(host: str) -> None:
    assert config.load({"SMSD_HOST": host}).on_loopback


def test_a_secret_is_read_from_a_file_without_its_line_end(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("token-of-the-operator\n")
    token = config.load({"SMSD_ADMIN_TOKEN_FILE": str(file)}).admin_token
    assert token is not None
    assert token.get_secret_value() == "token-of-the-operator"


def test_a_file_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"SMSD_ADMIN_TOKEN_FILE=/nowhere/token cannot be read"):
        config.load({"SMSD_ADMIN_TOKEN_FILE": "/nowhere/token"})


def test_a_variable_and_its_file_at_once_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("token-of-the-operator")
    with pytest.raises(ConfigError, match="SMSD_ADMIN_TOKEN and SMSD_ADMIN_TOKEN_FILE"):
        config.load(
            {"SMSD_ADMIN_TOKEN": "token-of-the-operator", "SMSD_ADMIN_TOKEN_FILE": str(file)}
        )


def test_an_empty_variable_counts_as_not_set() -> None:
    assert config.load({"SMSD_PORT": "", "SMSD_ADMIN_TOKEN": ""}).port == 8080


def test_signing_keys_are_split_newest_first() -> None:
    settings = config.load({"SMSD_SIGNING_KEY": "key-number-two-0002, key-number-one-0001"})
    assert settings.signing_keys == [b"key-number-two-0002", b"key-number-one-0001"]


def test_secrets_are_not_in_the_repr_of_settings() -> None:
    settings = config.load(
        {"SMSD_ADMIN_TOKEN": "pa55word-pa55word", "SMSD_DATABASE_URL": "postgresql://u:pa55@h/d"}
    )
    assert "pa55" not in repr(settings)


def test_links_start_with_the_public_url_without_its_slash() -> None:
    assert config.load({"SMSD_PUBLIC_URL": "https://sms.example/s/"}).link_base == (
        "https://sms.example/s"
    )
    assert config.load({"SMSD_PORT": "8081"}).link_base == "http://127.0.0.1:8081"
