"""By when a request had arrived, as far as our own kernel can tell.

A limiter's slot says when a request may leave; what counts at the other side is when it arrives. Between the two lie a
process that may be stopped, buffers that may be full and packets that may be lost, and the answer comes too late to
tell: a provider may think for a second. So the kernel is asked (`TCP_INFO`, Linux): once every byte has left for the
wire, and the other side acknowledged them without one being sent again, they arrived as soon as they left, give or take
what the path always takes. What had to be sent again arrived by the time of the acknowledgement.
"""

import asyncio
import math
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
# Of struct tcp_info: where its fields stand, and how much of it is needed.
_UNACKNOWLEDGED, _SENT_AGAIN, _UNSENT, _SIZE = 24, 100, 144, 148

LOOK_SECONDS = (0.012, 0.05, 0.19, 0.4)
"""Pauses between looks; the last is repeated. From the fourth look on `on_unseen` is called."""


def clock() -> float:
    """Seconds on a clock that never steps and, where the system has one, counts suspend."""
    return time.clock_gettime(_BOOT_CLOCK)


class _Kernel(NamedTuple):
    """What the kernel says of a connection: packets under way, packets ever sent again, bytes not sent yet."""

    unacknowledged: int
    sent_again: int
    unsent: int


def tcp_info(transport: asyncio.BaseTransport, size: int) -> bytes | None:
    """The first `size` bytes of the kernel's struct tcp_info; None where it tells nothing: another system, an older
    kernel, a connection that is gone or no TCP."""
    connection = transport.get_extra_info("socket")
    if sys.platform != "linux" or connection is None:
        return None
    try:
        info: bytes = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    except OSError:
        return None
    return info if len(info) == size else None


def _ask(transport: asyncio.Transport) -> _Kernel | None:
    """None where it cannot be told, and of a connection that is being closed."""
    if transport.is_closing() or (info := tcp_info(transport, _SIZE)) is None:
        return None
    return _Kernel(
        *(struct.unpack_from("=I", info, at)[0] for at in (_UNACKNOWLEDGED, _SENT_AGAIN, _UNSENT))
    )


class Watch:
    """Watches one request from before its first byte is written until it is answered or given up."""

    def __init__(
        self, on_unseen: Callable[[], None] | None = None, late_from: float = math.inf
    ) -> None:
        """`on_unseen` is called at once where it left after `late_from` (`clock()`): this process stood still between
        its gate and the write. And a quarter of a second after the write, and again and again, while it is not known to
        have arrived; not that where the kernel cannot tell."""
        self._on_unseen, self._late_from = on_unseen, late_from
        self._transport: asyncio.Transport | None = None
        self._sent_again = 0
        self._left_at: float | None = None
        self._by: float | None = None
        self._timer: asyncio.Handle | None = None

    def begin(self, transport: asyncio.Transport | None) -> None:
        """Nothing is written yet."""
        if transport is not None and (kernel := _ask(transport)) is not None:
            self._transport, self._sent_again = transport, kernel.sent_again

    def written(self) -> None:
        """Every byte was handed to the connection."""
        if self._on_unseen is not None and clock() > self._late_from:
            self._on_unseen()
        if self._transport is not None:
            self._timer = asyncio.get_running_loop().call_soon(self._look, 0)

    def end(self, answered_at: float | None) -> float | None:
        """The `clock()` by which all had arrived at the latest; None where that is not known. An answer proves it."""
        if self._timer is not None:
            self._timer.cancel()
        if self._by is None and self._transport is not None and answered_at is not None:
            kernel = _ask(self._transport)
            untouched = kernel is not None and kernel.sent_again == self._sent_again
            return self._left_at if untouched and self._left_at is not None else answered_at
        return self._by

    def _look(self, times: int) -> None:
        transport = self._transport
        if transport is None or (kernel := _ask(transport)) is None:
            return
        now = clock()
        if kernel.unsent == 0 and transport.get_write_buffer_size() == 0:
            self._left_at = self._left_at or now
            if kernel.unacknowledged == 0:
                self._by = self._left_at if kernel.sent_again == self._sent_again else now
                return
        if times >= len(LOOK_SECONDS) - 1 and self._on_unseen is not None:
            self._on_unseen()
        pause = LOOK_SECONDS[min(times, len(LOOK_SECONDS) - 1)]
        self._timer = asyncio.get_running_loop().call_later(pause, self._look, times + 1)
