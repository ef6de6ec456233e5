"""Every key a fly.toml may have, and what this version does with it: the one table to edit when that changes.

A key found in a file is `used`, `kept` (read, checked and remembered, but without effect here yet; the reason is told)
or `unknown`. Keys are written without list indices, since most sections may be one table or an array of tables; `*`
stands for any name. `classify_keys` walks a parsed file along the table; what values mean is left to fly_toml.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from proxy.wire.toml_table import KeyPath, render_path, suggest


class KeyClass(enum.StrEnum):
    USED = "used"
    KEPT = "kept"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What becomes of one key of a file."""

    path: KeyPath
    use: KeyClass
    reason: str = ""  # why it has no effect, for kept keys
    did_you_mean: str | None = None  # for unknown keys

    @property
    def key(self) -> str:
        return render_path(self.path)


USED: Final = ""  # anything else in the table below is the reason why a key is only kept

_DEPLOY = "there are no deploys yet"
_HTTP2 = "HTTP/2 is not spoken yet"
_IMAGE = "machines are commands of this host, not images"
_LEGACY = "an old key that Fly ignores too"
_METRICS = "metrics of apps are not scraped yet"
_STATICS = "the app answers for its static files itself"
_TESTS = "machine checks belong to deploys, which there are none of yet"
_VM = "machines are processes: their size is not limited yet"
_VOLUME = "volumes are plain folders without size limits or snapshots"

_SERVICE: Final = {
    "internal_port": USED,
    "processes": USED,
    "auto_stop_machines": USED,
    "auto_start_machines": USED,
    "min_machines_running": USED,
    "concurrency": USED,  # the old form "soft,hard"
    "concurrency.type": USED,
    "concurrency.soft_limit": USED,
    "concurrency.hard_limit": USED,
}
_TLS_OPTIONS: Final = {
    "tls_options.alpn": _HTTP2,
    "tls_options.versions": USED,
    "tls_options.default_self_signed": USED,
}
_HTTP_OPTIONS: Final = {
    "http_options.idle_timeout": USED,
    "http_options.headers_read_timeout": "[limits] head_timeout holds for every port",
    "http_options.h2_backend": _HTTP2,
    "http_options.compress": "answers are passed on as the app encodes them",
    "http_options.response.pristine": USED,
    "http_options.response.headers.*": USED,
    "http_options.replay_cache.path_prefix": USED,
    "http_options.replay_cache.ttl_seconds": USED,
    "http_options.replay_cache.type": USED,
    "http_options.replay_cache.name": USED,
    "http_options.replay_cache.allow_bypass": USED,
}
_TCP_CHECK: Final = {
    "interval": USED,
    "timeout": USED,
    "grace_period": USED,
    "restart_limit": _LEGACY,
    "type": "the section says which kind of check it is",
    "port": "a service is checked at its internal port",
    "processes": "every group that has the service is checked",
}
_HTTP_CHECK: Final = _TCP_CHECK | {
    "method": USED,
    "path": USED,
    "protocol": USED,
    "tls_skip_verify": USED,
    "tls_server_name": USED,
    "headers.*": USED,
}
_NAMED_CHECK: Final = _HTTP_CHECK | {"type": USED, "port": USED, "processes": USED}
_MACHINE_CHECK: Final = {
    "command": _TESTS,
    "entrypoint": _TESTS,
    "image": _TESTS,
    "kill_signal": _TESTS,
    "kill_timeout": _TESTS,
}
_VM_KEYS: Final = (
    "size", "memory", "memory_mb", "cpus", "cpu_kind", "gpu_kind", "gpus", "kernel_args", "host_dedication_id",
    "persist_rootfs", "processes",
)  # fmt: skip


def _under(prefix: str, keys: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}.{key}": reason for key, reason in keys.items()}


KEYS: Final[dict[str, str]] = {
    "app": USED,
    "primary_region": USED,
    "kill_signal": USED,
    "kill_timeout": USED,
    "swap_size_mb": _VM,
    "console_command": "there is no console yet",
    "host_dedication_id": _VM,
    "machine_config": "machines are made from fly.toml and config.toml alone",
    "container": "machines are commands of this host, not containers",
    **_under("machine_checks", _MACHINE_CHECK),
    "env.*": USED,
    "processes.*": USED,
    "processes.name": USED,  # the old form [[processes]]
    "processes.command": USED,
    "build.image": _IMAGE,
    "build.dockerfile": _IMAGE,
    "build.ignorefile": _IMAGE,
    "build.build-target": _IMAGE,
    "build.build_target": _IMAGE,
    "build.builder": _IMAGE,
    "build.buildpacks": _IMAGE,
    "build.builtin": _IMAGE,
    "build.settings.*": _IMAGE,
    "build.args.*": _IMAGE,
    "build.compression": _IMAGE,
    "build.compression_level": _IMAGE,
    "build.compose.file": _IMAGE,
    "deploy.strategy": _DEPLOY,
    "deploy.max_unavailable": _DEPLOY,
    "deploy.wait_timeout": _DEPLOY,
    "deploy.release_command": _DEPLOY,
    "deploy.release_command_timeout": _DEPLOY,
    "deploy.seed_command": _DEPLOY,
    **{f"deploy.release_command_vm.{key}": _DEPLOY for key in _VM_KEYS},
    **_under("http_service", _SERVICE),
    "http_service.force_https": USED,
    **_under("http_service", _TLS_OPTIONS),
    **_under("http_service", _HTTP_OPTIONS),
    **_under("http_service.checks", _HTTP_CHECK),
    **_under("http_service.machine_checks", _MACHINE_CHECK),
    **_under("services", _SERVICE),
    "services.protocol": USED,
    **_under("services.tcp_checks", _TCP_CHECK),
    **_under("services.http_checks", _HTTP_CHECK),
    **_under("services.machine_checks", _MACHINE_CHECK),
    "services.script_checks.*": _LEGACY,
    "services.ports.port": USED,
    "services.ports.start_port": USED,
    "services.ports.end_port": USED,
    "services.ports.handlers": USED,
    "services.ports.force_https": USED,
    **_under("services.ports", _TLS_OPTIONS),
    **_under("services.ports", _HTTP_OPTIONS),
    "services.ports.proxy_proto_options.version": "the PROXY protocol is not spoken to machines yet",
    **_under("checks.*", _NAMED_CHECK),
    **{f"vm.{key}": _VM for key in _VM_KEYS},
    "mounts.source": USED,
    "mounts.destination": USED,
    "mounts.processes": USED,
    "mounts.initial_size": _VOLUME,
    "mounts.snapshot_retention": _VOLUME,
    "mounts.scheduled_snapshots": _VOLUME,
    "mounts.auto_extend_size_threshold": _VOLUME,
    "mounts.auto_extend_size_increment": _VOLUME,
    "mounts.auto_extend_size_limit": _VOLUME,
    "statics.guest_path": _STATICS,
    "statics.url_prefix": _STATICS,
    "statics.tigris_bucket": _STATICS,
    "statics.index_document": _STATICS,
    "metrics.port": _METRICS,
    "metrics.path": _METRICS,
    "metrics.https": _METRICS,
    "metrics.processes": _METRICS,
    "restart.policy": USED,
    "restart.retries": USED,
    "restart.processes": USED,
    "files.guest_path": "files are not written into the host's file system",
    "files.raw_value": "files are not written into the host's file system",
    "files.local_path": "files are not written into the host's file system",
    "files.secret_name": "files are not written into the host's file system",
    "files.processes": "files are not written into the host's file system",
    "experimental.cmd": USED,
    "experimental.entrypoint": USED,
    "experimental.exec": USED,
    "experimental.kill_timeout": USED,
    "experimental.metrics_port": _METRICS,
    "experimental.metrics_path": _METRICS,
    "experimental.auto_rollback": _DEPLOY,
    "experimental.enable_consul": "Fly's own Consul is not there",
    "experimental.enable_etcd": "Fly's own etcd is not there",
    "experimental.lazy_load_images": _IMAGE,
    "experimental.machine_config": "machines are made from fly.toml and config.toml alone",
    "experimental.allowed_public_ports": _LEGACY,
    "experimental.private_network": _LEGACY,
    "experimental.max_per_region": _LEGACY,
}

RAW_PORT: Final = "a port without the http handler: raw TCP, TLS-only and PROXY protocol are not served yet"
UDP_SERVICE: Final = "UDP is not served yet"

ALIASES: Final = {"mount": "mounts", "compute": "vm", "computes": "vm", "metric": "metrics"}


def classify_keys(document: Mapping[str, object]) -> tuple[KeyUse, ...]:
    """Say of each key in a parsed fly.toml whether it is used, kept or unknown, in the order of the file.

    A section in which nothing is set counts as its first key would. Below an unknown key nothing is looked at.
    """
    return tuple(_walk(document, (), "", _TREE, None))


class _Node(dict[str, "_Node"]):
    """A key in the tree made of the dotted keys; `reason` is None where the key itself is only a section."""

    reason: str | None = None


def _tree(keys: Mapping[str, str]) -> _Node:
    root = _Node()
    for key, reason in keys.items():
        node = root
        for part in key.split("."):
            node = node.setdefault(part, _Node())
        node.reason = reason
    return root


_TREE: Final = _tree(KEYS)


def _walk(
    table: Mapping[str, object], path: KeyPath, section: str, known: _Node, override: str | None
) -> Iterator[KeyUse]:
    override = override or _reason_for_all(section, table)
    for key, value in table.items():
        name = ALIASES.get(key, key) if not path else key
        node = known.get(name, known.get("*"))  # a leaf is empty, and so false
        here = (*path, key)
        if node is None:
            yield KeyUse(here, KeyClass.UNKNOWN, did_you_mean=suggest(key, known))
            continue
        found = list(_below(value, here, f"{section}.{name}".lstrip("."), node, override))
        yield from found or [_use(here, _first_reason(node) if override is None else override)]


def _below(value: object, path: KeyPath, section: str, node: _Node, override: str | None) -> Iterator[KeyUse]:
    """The uses of the keys in a section: one table, or each of an array of tables; none for a plain value."""
    if not node:
        return
    if isinstance(value, Mapping):
        yield from _walk(value, path, section, node, override)
    elif isinstance(value, list):
        for index, one in enumerate(value):
            if isinstance(one, Mapping):
                yield from _walk(one, (*path, index), section, node, override)


def _reason_for_all(section: str, table: Mapping[str, object]) -> str | None:
    """A reason that makes every key of a section only kept, whatever the table says of each."""
    if section == "services":
        return UDP_SERVICE if table.get("protocol") == "udp" else None
    if section == "services.ports":
        handlers = table.get("handlers")
        names = handlers if isinstance(handlers, list) else [handlers]
        return None if "http" in names or "edge_http" in names else RAW_PORT
    return None


def _first_reason(node: _Node) -> str:
    while node.reason is None:
        node = next(iter(node.values()))
    return node.reason


def _use(path: KeyPath, reason: str) -> KeyUse:
    return KeyUse(path, KeyClass.USED if reason == USED else KeyClass.KEPT, reason)
