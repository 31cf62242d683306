"""What a person outside sees of the process: log lines, and its word to systemd.

Logs are structlog events named `noun.verb_past`, one JSON object a line on stderr (or coloured text). Ids of
tenant, campaign, batch, attempt and request are bound where they are known. Texts, numbers and secrets have
keys that are never printed.
"""

import logging
import os
import socket
import sys
import traceback
from typing import Any

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_HIDDEN = frozenset(
    {
        "api_key",
        "authorization",
        "database_url",
        "key",
        "password",
        "secret",
        "token",
        "webhook_secret",
    }
)
_PRIVATE = frozenset({"email", "phone", "phones", "text", "texts", "to", "values"})


def stack_of(error: BaseException) -> str:
    """Where an error came from, without its words: those of Postgres quote rows, that is numbers and texts."""
    return "".join(traceback.format_tb(error.__traceback__))


_minimum = logging.DEBUG


def says_debug() -> bool:
    """Whether anybody would see a line at debug: structlog makes a logger for each, only to drop it."""
    return _minimum <= logging.DEBUG


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Structlog processor: hides what must not stand in a log, by key."""
    for key in event:
        if key in _HIDDEN or key in _PRIVATE:
            event[key] = "(hidden)"
    return event


def configure_logging(level: str, style: str) -> None:
    """Sets up structlog for the process. style: json | console."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        redact,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    global _minimum  # noqa: PLW0603 - logging is the process's
    minimum = _minimum = getattr(logging, level.upper())
    if style == "console":
        structlog.configure(
            processors=[*shared, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())],
            wrapper_class=structlog.make_filtering_bound_logger(minimum),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            cache_logger_on_first_use=False,
        )
    else:
        structlog.configure(
            processors=[
                *shared,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(serializer=_dumps),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(minimum),
            logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
            cache_logger_on_first_use=False,
        )
    # aiohttp and asyncio speak through the standard library; their warnings must not be lost.
    logging.basicConfig(level=max(minimum, logging.WARNING), stream=sys.stderr, force=True)


def _dumps(event: Any, **_options: Any) -> bytes:
    return orjson.dumps(event, default=str)


def notify_systemd(message: str) -> None:
    """Tells systemd `READY=1`, `STOPPING=1`, `WATCHDOG=1`…; does nothing where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(address)
            sock.sendall(message.encode())
        except OSError:
            structlog.get_logger().warning("systemd.notify_failed", message=message)


def watchdog_seconds() -> float | None:
    """How often systemd wants to hear from us (half of its patience), or None."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(
        os.getpid()
    ):
        return None
    return int(microseconds) / 2_000_000
