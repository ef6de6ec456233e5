"""From what is configured to what a driver is given: command, environment, endpoints, volumes of one machine."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pwd
import re
from collections.abc import Mapping

import msgspec

from proxy.control.plan import AppPlan, GroupPlan, NodePlan
from proxy.machines.driver import MachineSpec, Mount
from proxy.machines.logs import log_path
from proxy.model import AppName, Endpoint, MachineId

_HOST = "127.0.0.1"
_INHERITED = ("PATH", "LANG", "LC_ALL", "TZ")
_PORT = re.compile(r"\{port(?::([0-9]+))?\}")
_VERSION_VARIABLE = "FLY_MACHINE_VERSION"


def machine_id(identity: str, app: AppName, group: str, index: int) -> MachineId:
    """14 hex digits, as Fly's. Derived, so that machines and volumes are found again without the database."""
    return MachineId(hashlib.sha256(f"{identity}\0{app}\0{group}\0{index}".encode()).hexdigest()[:14])


def make_spec(
    node: NodePlan, app: AppPlan, group: GroupPlan, machine: MachineId, ports: Mapping[int, int],
    inherited: Mapping[str, str] = os.environ,
) -> MachineSpec:  # fmt: skip
    """All that is needed to start a machine. `ports`: the port of its own for each internal port."""
    if app.driver == "static":
        found = next((one.endpoints for one in app.statics if one.id == machine), ())
        return MachineSpec(machine, app.name, group.name, (), "/", (), found, 0, 0.0)
    internal = app.internal_ports(group.name)
    own = {port: port if app.own_network else ports[port] for port in internal}
    first = own[internal[0]] if internal else None

    def fill(match: re.Match[str]) -> str:
        port = own.get(int(match[1])) if match[1] else first
        return match[0] if port is None else str(port)

    mounts = tuple(
        Mount(os.path.join(node.data_dir, "volumes", app.name, one.name, machine), one.destination, one.name)
        for one in group.mounts
    )
    return MachineSpec(
        id=machine,
        app=app.name,
        group=group.name,
        command=tuple(_PORT.sub(fill, word) for word in group.command),
        cwd=app.cwd,
        env=_environment(node, app, group, machine, own, inherited),
        endpoints=tuple(Endpoint(port, _HOST, own[port]) for port in internal),
        kill_signal=app.kill_signal,
        kill_timeout_s=app.kill_timeout_s,
        user=app.user,
        own_network=app.own_network,
        mounts=mounts,
        log_path=log_path(node.data_dir, app.name, machine),
    )


def _environment(
    node: NodePlan, app: AppPlan, group: GroupPlan, machine: MachineId, own: Mapping[int, int],
    inherited: Mapping[str, str],
) -> tuple[tuple[str, str], ...]:  # fmt: skip
    """The complete environment (spec machines §1). Of ours only a few variables are passed on: the rest may be secret.

    A port of its own beats PORT in [env], since the program must listen there; a network of its own does not.
    """
    env = {name: inherited[name] for name in _INHERITED if name in inherited}
    env["HOME"] = _home(app.user, inherited)
    env |= dict(app.env)
    env |= {
        "FLY_APP_NAME": app.name,
        "FLY_MACHINE_ID": machine,
        "FLY_ALLOC_ID": machine,
        "FLY_REGION": node.region,
        "FLY_PUBLIC_IP": _HOST,
        "FLY_PRIVATE_IP": _HOST,
        "FLY_IMAGE_REF": f"local/{app.name}",
        "FLY_PROCESS_GROUP": group.name,
        "FLY_VM_MEMORY_MB": str(group.memory_mb),
        "WAKEFRONT_NODE_DIR": node.data_dir,
    }
    if app.primary_region is not None:
        env["PRIMARY_REGION"] = app.primary_region
    env |= {f"PORT_{internal}": str(port) for internal, port in own.items()}
    if own:
        port = str(next(iter(own.values())))
        env["PORT"] = env.get("PORT", port) if app.own_network else port
    return tuple(env.items())


def _home(user: str | None, inherited: Mapping[str, str]) -> str:
    name = (user or "").partition(":")[0]
    if not name:
        return inherited.get("HOME", "/")
    try:
        return (pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)).pw_dir
    except KeyError:  # a uid without an account; a name without one is refused by the driver
        return "/"


def with_version(spec: MachineSpec, instance_id: str) -> MachineSpec:
    """The spec as a start gets it: which version of the machine this is, in its environment."""
    return dataclasses.replace(spec, env=(*spec.env, (_VERSION_VARIABLE, instance_id)))


def digest_of(spec: MachineSpec) -> str:
    """Tells whether two specs start the same thing."""
    return hashlib.sha256(msgspec.msgpack.encode(spec)).hexdigest()[:32]
