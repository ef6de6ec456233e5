"""The one record each request ends in, and the line it becomes."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec


class Record(msgspec.Struct, omit_defaults=True):
    """One request. Times are milliseconds from the head's arrival; bytes are bodies without framing."""

    time: float  # unix seconds when the head had arrived
    app: str
    client: str
    method: str
    host: str
    target: str
    status: int
    duration_ms: float
    bytes_in: int
    bytes_out: int
    request_id: str
    port: int
    tls: bool = False
    machine: str = ""
    first_byte_ms: float = 0.0
    wake_ms: float = 0.0
    attempts: int = 0
    code: str = ""
    detail: str = ""
    upgrade: bool = False


_encode = msgspec.json.Encoder().encode


def json_line(record: Record) -> bytes:
    return _encode(record) + b"\n"


def _printable(text: str) -> str:
    """As it can stand within quotes on one line; `-` for nothing."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return text or "-"
    return text.encode("unicode_escape").decode("ascii").replace('"', '\\"')


def text_line(record: Record) -> bytes:
    """Combined-log-like: client, time, request line, status, bytes, duration, app and machine, request id, code."""
    when = datetime.fromtimestamp(record.time, UTC).strftime("%d/%b/%Y:%H:%M:%S +0000")
    return (
        f'{record.client or "-"} [{when}] "{record.method or "-"} {_printable(record.target)}" {record.host or "-"}'
        f" {record.status} {record.bytes_out} {record.duration_ms:.3f}ms {record.app or '-'}/{record.machine or '-'}"
        f" {record.request_id or '-'} {record.code or '-'}\n"
    ).encode()
