"""Finds the node a command is about, and speaks with its admin API.

The standard library's http.client is enough here and loads in a few milliseconds; a command must not be slower to
start than what it asks for. What the answers mean is left to the commands.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from proxy.cli.failure import USAGE, CliError

CONFIG_VARIABLE = "WAKEFRONT_CONFIG"
TOKEN_VARIABLE = "WAKEFRONT_TOKEN"
DEFAULT_CONFIG = "config.toml"
# Those of proxy.config, whose import would double the time of a command; a test holds them equal.
DEFAULT_ADMIN = "127.0.0.1:8081"
DEFAULT_DATA_DIR = "./wakefront-data"
_ADDRESS = re.compile(r"([A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]|[0-9A-Fa-f:.]+):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Node:
    """Where a node's admin API is, and the token that opens it."""

    host: str
    port: int
    token: str
    token_from: str  # for messages
    data_dir: Path | None = None  # where the node keeps its files, if its config.toml is here

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def config_path(config: Path | None) -> Path:
    """The config.toml meant: --config (or WAKEFRONT_CONFIG, which typer reads into it), else ./config.toml."""
    return config if config is not None else Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG)


def find_node(config: Path | None, admin: str | None) -> Node:
    """The node named by --admin, else the one whose config.toml is meant.

    Only two keys of config.toml are read, and the fly.toml files not at all: a running node must answer even while
    its files are being edited.
    """
    path = config_path(config)
    token = _checked_token(os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE)
    if admin is not None and token:
        return Node(*_split_address(admin, "--admin"), token, TOKEN_VARIABLE)
    if not is_file(path):
        if admin is not None:
            raise CliError(
                f"--admin {admin} needs the node's token: name its config.toml with --config, or put the token into "
                f"{TOKEN_VARIABLE}.",
                USAGE,
            )
        raise CliError(
            f"No config file at {path}: name one with --config FILE or {CONFIG_VARIABLE}, or go to its folder.", USAGE
        )
    configured, data_dir = _read_config(path)
    token_path = data_dir / "admin.token"
    host, port = _split_address(admin, "--admin") if admin is not None else _split_address(configured, str(path))
    if token:
        return Node(host, port, token, TOKEN_VARIABLE, data_dir)
    return Node(host, port, _read_token(token_path, path), str(token_path), data_dir)


def is_file(path: Path) -> bool:
    """Whether there is a file to read. Raises CliError where that is not to be known: no permission, a broken name."""
    try:
        return path.is_file()
    except OSError as error:
        raise CliError(f"Cannot read {path}: {error.strerror}.", USAGE) from error


def _read_config(path: Path) -> tuple[str, Path]:
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except OSError as error:
        raise CliError(f"Cannot read {path}: {error.strerror}.", USAGE) from error
    except (ValueError, RecursionError) as error:  # no TOML, or not even text
        raise CliError(f"{path} is not valid ({error}): see `wakefront check --config {path}`.", USAGE) from error
    listen, node = raw.get("listen", {}), raw.get("node", {})
    admin = listen.get("admin", DEFAULT_ADMIN) if isinstance(listen, dict) else DEFAULT_ADMIN
    data_dir = node.get("data_dir", DEFAULT_DATA_DIR) if isinstance(node, dict) else DEFAULT_DATA_DIR
    if not isinstance(admin, str) or not isinstance(data_dir, str):
        raise CliError(f"{path} is not valid: see `wakefront check --config {path}`.", USAGE)
    return admin, path.resolve().parent / Path(data_dir).expanduser()


def _read_token(token_path: Path, config: Path) -> str:
    try:
        token = _checked_token(token_path.read_text("utf-8").strip(), str(token_path))
    except FileNotFoundError as error:
        raise CliError(
            f"No node has run with {config} yet (no {token_path}): start it with `wakefront serve --config {config}`."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(
            f"Cannot read the admin token: {error}; run this as the user the node runs as, or set {TOKEN_VARIABLE}."
        ) from error
    if not token:
        raise CliError(f"{token_path} is empty: start the node again, it writes a new token.")
    return token


def _checked_token(token: str, where: str) -> str:
    """The token, if it can stand in a header. It is not repeated in the message: it may be a good one, cut wrongly."""
    if not all("!" <= char <= "~" for char in token):
        raise CliError(f"What {where} holds is no token: copy the line of the node's admin.token as it is.", USAGE)
    return token


def _split_address(address: str, where: str) -> tuple[str, int]:
    host, port = match.groups() if (match := _ADDRESS.fullmatch(address)) else ("", "0")
    if not 0 < int(port) < 65536:
        raise CliError(f"{where}: {address!r} is not HOST:PORT, for example 127.0.0.1:8081.", USAGE)
    return host.strip("[]") or "127.0.0.1", int(port)


def bound_ports(data_dir: Path) -> list[dict[str, Any]]:
    """Each public port with the `host` and `port` it is bound to here: what the node's supervisor has written down.

    The backhaul, which stands there as port 0, is no public one.
    """
    record = data_dir / "run" / "children.json"
    try:
        listen: list[dict[str, Any]] = [one for one in json.loads(record.read_text())["listen"] if one["public_port"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CliError(f"Cannot read where the node listens ({record}: {error}).") from error
    return listen


class ApiError(CliError):
    """The node answered, but not as hoped. `status` is the HTTP status, `body` its JSON (or text) answer."""

    def __init__(self, status: int, message: str, body: Any) -> None:  # Any: whatever JSON the node sent
        super().__init__(message)
        self.status = status
        self.body = body


class Api:
    """The admin API of one node. Each call is one connection; answers are plain JSON values."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def get(self, path: str, query: dict[str, Any] | None = None, timeout_s: float = 10.0) -> Any:
        return self._call("GET", path, query, None, timeout_s)

    def post(
        self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 60.0,
        headers: dict[str, str] | None = None,
    ) -> Any:  # fmt: skip
        return self._call("POST", path, None, body if body is not None else {}, timeout_s, headers)

    def delete(self, path: str, headers: dict[str, str] | None = None, timeout_s: float = 10.0) -> Any:
        return self._call("DELETE", path, None, None, timeout_s, headers)

    def text(self, path: str, timeout_s: float = 10.0) -> str:
        status, raw = self._answer("GET", path, None, None, timeout_s)
        self._raise_for_status(status, raw)
        return raw

    def stream(self, path: str, query: dict[str, Any], timeout_s: float | None) -> Iterator[str]:
        """Lines of a streamed answer as they come, without their line ends."""
        connection, response = self._open("GET", path, query, None, timeout_s)
        try:
            if response.status != 200:
                self._raise_for_status(response.status, response.read().decode("utf-8", "replace"))
            while line := response.readline():
                yield line.decode("utf-8", "replace").rstrip("\r\n")
        except (OSError, http.client.HTTPException) as error:
            raise CliError(f"The node at {self.node.address} ended the stream ({_reason(error)}).") from error
        finally:
            connection.close()

    def _call(
        self, method: str, path: str, query: dict[str, Any] | None, body: dict[str, Any] | None, timeout_s: float,
        more: dict[str, str] | None = None,
    ) -> Any:  # fmt: skip
        status, raw = self._answer(method, path, query, body, timeout_s, more)
        self._raise_for_status(status, raw)
        try:
            return json.loads(raw) if raw.strip() else None
        except ValueError as error:
            raise CliError(
                f"What answers at {self.node.address} is not a Wakefront node: {path} gave no JSON."
            ) from error

    def _answer(
        self, method: str, path: str, query: dict[str, Any] | None, body: dict[str, Any] | None, timeout_s: float,
        more: dict[str, str] | None = None,
    ) -> tuple[int, str]:  # fmt: skip
        connection, response = self._open(method, path, query, body, timeout_s, more)
        try:
            return response.status, response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise CliError(f"The node at {self.node.address} broke off its answer ({_reason(error)}).") from error
        finally:
            connection.close()

    def _open(
        self, method: str, path: str, query: dict[str, Any] | None, body: dict[str, Any] | None,
        timeout_s: float | None, more: dict[str, str] | None = None,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:  # fmt: skip
        target = path + ("?" + urlencode(query) if query else "")
        headers = {"Authorization": f"Bearer {self.node.token}", "Accept": "application/json", **(more or {})}
        payload = None
        if body is not None:
            payload, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        connection = http.client.HTTPConnection(self.node.host, self.node.port, timeout=timeout_s)
        try:
            connection.request(method, target, payload, headers)
            return connection, connection.getresponse()
        except ConnectionRefusedError as error:
            connection.close()
            raise CliError(
                f"No node answers at {self.node.address}: start it with `wakefront serve`, or name another with "
                "--config or --admin."
            ) from error
        except TimeoutError as error:
            connection.close()
            raise CliError(
                f"The node at {self.node.address} did not answer {method} {path} within {timeout_s:g} s."
            ) from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: a name that is none
            connection.close()
            raise CliError(f"Cannot reach the node at {self.node.address} ({_reason(error)}).") from error

    def _raise_for_status(self, status: int, raw: str) -> None:
        if 200 <= status < 300:
            return
        try:
            body: Any = json.loads(raw)
        except ValueError:
            body = raw.strip()
        said = body.get("error") or body.get("message") if isinstance(body, dict) else None
        if status == 401:
            message = (
                f"The node at {self.node.address} refused the token from {self.node.token_from}: is this the "
                "config.toml that it runs with?"
            )
        elif status == 403 and said:
            message = (
                f"The node at {self.node.address} refuses to be asked so: {said}; see [listen] in its config.toml."
            )
        elif said is None:
            message = f"What answers at {self.node.address} is not a Wakefront node: it gave {status} without a reason."
        else:
            message = f"The node answered {status}: {said}."
        raise ApiError(status, message, body)


def refused(error: ApiError, verb: str, machine: FoundMachine) -> CliError:
    """The same refusal, said of the machine."""
    if error.status in (401, 403) or not isinstance(error.body, dict) or not error.body.get("error"):
        return error
    hint = ". Name it with --nonce, or wait" if error.body.get("status") == "lease_held" else ""
    return CliError(f"Cannot {verb} {machine.app}/{machine.id}: {error.body['error']}{hint}.")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


# --- apps and machines by the names users give ------------------------------------------------------------------


def app_path(app: str) -> str:
    return f"/v1/apps/{quote(app, safe='')}"


def machine_path(app: str, machine: str) -> str:
    return f"{app_path(app)}/machines/{quote(machine, safe='')}"


def lease_header(nonce: str | None) -> dict[str, str]:
    """What a change of a leased machine needs (proxy.control.leases.HEADER)."""
    if nonce is None:
        return {}
    if not nonce.isascii() or not nonce.isalnum():
        raise CliError(f"{nonce!r} is no nonce of a lease: it has letters and digits only.", USAGE)
    return {"fly-machine-lease-nonce": nonce}


def list_apps(api: Api) -> list[dict[str, Any]]:
    answer = api.get("/v1/apps")
    apps = answer.get("apps") if isinstance(answer, dict) else answer
    if not isinstance(apps, list):
        raise CliError(f"What answers at {api.node.address} is not a Wakefront node: /v1/apps gave no list.")
    return apps


def list_machines(api: Api, app: str) -> list[dict[str, Any]]:
    try:
        machines = api.get(f"{app_path(app)}/machines")
    except ApiError as error:
        raise unknown_app(api, app) if error.status == 404 else error from None
    if not isinstance(machines, list):
        raise CliError(f"What answers at {api.node.address} is not a Wakefront node: no list of machines.")
    return machines


def unknown_app(api: Api, app: str) -> CliError:
    names = [str(one.get("name", "")) for one in list_apps(api)]
    return CliError(f"No app is called {app}{did_you_mean(app, names)}")


def did_you_mean(word: str, known: list[str]) -> str:
    """The end of a sentence that says which known word was likely meant, or which there are."""
    from difflib import get_close_matches

    if close := get_close_matches(word, known, n=1, cutoff=0.5):
        return f": did you mean {close[0]}?"
    if not known:
        return ": this node has none; see `wakefront apps`."
    shown = ", ".join(sorted(known)[:8]) + (", …" if len(known) > 8 else "")
    return f"; there are: {shown}."


@dataclass(frozen=True, slots=True)
class FoundMachine:
    app: str
    id: str
    state: str
    raw: dict[str, Any]


def find_machine(api: Api, wanted: str, app: str | None) -> FoundMachine:
    """The one machine meant by an id, the beginning of one, or the name of an app that has a single machine."""
    apps = [app] if app is not None else [str(one["name"]) for one in list_apps(api)]
    everything = [(name, machine) for name in apps for machine in list_machines(api, name)]
    matches = [(name, one) for name, one in everything if one["id"] == wanted]
    matches = matches or [(name, one) for name, one in everything if str(one["id"]).startswith(wanted)]
    matches = matches or [(name, one) for name, one in everything if name == wanted]
    if len(matches) > 1:
        ids = ", ".join(str(one["id"]) for _, one in matches[:8])
        raise CliError(f"{wanted} may mean several machines ({ids}): give the id of one.", USAGE)
    if not matches:
        known = [str(one["id"]) for _, one in everything] + apps
        raise CliError(f"No machine has the id {wanted}{did_you_mean(wanted, known)}")
    name, raw = matches[0]
    return FoundMachine(name, str(raw["id"]), str(raw.get("state", "unknown")), raw)
