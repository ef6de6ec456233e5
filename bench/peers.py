"""The proxies that Wakefront is measured beside: how each is configured, started and named.

One worker or thread each, upstream keep-alive, X-Forwarded-For and -Proto, Via and a request id towards the origin,
an access log in the cheapest form that its documentation offers, one ECDSA P-256 certificate, TLS 1.3 alone.
nginx and HAProxy are Debian's and may not be missing; the others come in wheels (extra `bench`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.certificate import CertificateFiles
from bench.processes import BenchError, spawn, stop, wait_for_port

HOST = "bench.apps.localhost"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a proxy is to run: its folder, its two ports, the origin's port, the certificate, its core."""

    folder: Path
    plain_port: int
    tls_port: int
    origin_port: int
    certificate: CertificateFiles
    core: int


@dataclass(slots=True)
class Recipe:
    """What starts a proxy, and what a reader of the results should know of it."""

    name: str
    version: str
    command: list[str]
    configuration: list[Path]
    access_log: Path
    access_log_form: str
    env: dict[str, str] = field(default_factory=dict)
    remarks: str = ""


class Running:
    """A started proxy."""

    def __init__(self, recipe: Recipe, place: Place) -> None:
        self.recipe, self.place = recipe, place
        self._log = place.folder / "output.log"
        with self._log.open("wb") as log:
            self.process: subprocess.Popen[bytes] = spawn(recipe.command, place.core, log, recipe.env)
        try:
            for port in (place.plain_port, place.tls_port):
                wait_for_port(port, self.process, self._log)
        except BaseException:
            stop(self.process)
            raise

    def output(self) -> str:
        """The last of what the proxy said."""
        return self._log.read_text(errors="replace")[-2000:]


def _binary(name: str) -> str | None:
    """A program beside this interpreter (wheels put them there), else on PATH or among the system's."""
    beside = Path(sys.executable).parent / name
    if beside.exists():
        return str(beside)
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[0].strip() if lines else "unknown"


def _debian(name: str) -> str:
    binary = _binary(name)
    if binary is None:
        package = "nginx-light" if name == "nginx" else name
        raise BenchError(f"{name} is not installed and may not be skipped: apt-get install {package}")
    return binary


def nginx(place: Place) -> Recipe:
    binary, folder = _debian("nginx"), place.folder
    path = folder / "nginx.conf"
    temporary = "".join(
        f"  {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path.write_text(
        f"""daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 16384; }}
http {{
  log_format line '$remote_addr [$time_iso8601] $host "$request" $status $body_bytes_sent '
                  '$request_time $upstream_addr $request_id';
  access_log {folder}/access.log line buffer=64k flush=1s;
  keepalive_requests 1000000000;
  client_max_body_size 0;
{temporary}  upstream origin {{
    server 127.0.0.1:{place.origin_port};
    keepalive 128;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{place.plain_port} backlog=4096;
    listen 127.0.0.1:{place.tls_port} ssl backlog=4096;
    server_name {HOST};
    ssl_certificate {place.certificate.certificate};
    ssl_certificate_key {place.certificate.key};
    ssl_protocols TLSv1.3;
    location / {{
      proxy_pass http://origin;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Proto $scheme;
      proxy_set_header Via "1.1 nginx";
      proxy_set_header X-Request-Id $request_id;
      proxy_request_buffering off;
      proxy_max_temp_file_size 0;
    }}
  }}
}}
"""
    )
    return Recipe(
        "nginx",
        _first_line(binary, "-v"),
        [binary, "-p", str(folder), "-c", str(path)],
        [path],
        folder / "access.log",
        "access_log with buffer=64k flush=1s, a text format",
    )


def haproxy(place: Place) -> Recipe:
    binary, folder = _debian("haproxy"), place.folder
    path = folder / "haproxy.cfg"
    path.write_text(
        f"""global
  nbthread 1
  maxconn 8000
  log stdout format raw local0 info
  ssl-default-bind-options ssl-min-ver TLSv1.3

defaults
  mode http
  log global
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  log-format "%ci [%tr] %HV %HM %HP %ST %B %Ta %b/%s %ID"
  unique-id-format %[uuid()]
  unique-id-header X-Request-Id
  option forwardfor

frontend in
  bind 127.0.0.1:{place.plain_port} backlog 4096
  bind 127.0.0.1:{place.tls_port} ssl crt {place.certificate.both} backlog 4096
  http-request set-header X-Forwarded-Proto http if !{{ ssl_fc }}
  http-request set-header X-Forwarded-Proto https if {{ ssl_fc }}
  http-request set-header Via "1.1 haproxy"
  use_backend origin if {{ hdr(host),field(1,:) -i {HOST} }}

backend origin
  http-reuse always
  server origin 127.0.0.1:{place.origin_port} pool-max-conn 128
"""
    )
    return Recipe(
        "haproxy",
        _first_line(binary, "-v"),
        [binary, "-db", "-f", str(path)],
        [path],
        folder / "output.log",
        "log stdout format raw, standard output being a file (one write a line)",
    )


def envoy(place: Place) -> Recipe | None:
    binary, folder = _binary("envoy"), place.folder
    if binary is None:
        return None
    path = folder / "envoy.json"
    path.write_text(json.dumps(_envoy_bootstrap(place), indent=1))
    return Recipe(
        "envoy",
        _first_line(binary, "--version").rpartition("version: ")[2],
        [binary, "--concurrency", "1", "-c", str(path), "--log-level", "error", "--disable-hot-restart"],
        [path],
        folder / "access.log",
        "envoy.access_loggers.file, text_format (buffered, flushed by a thread)",
    )


def _envoy_bootstrap(place: Place) -> dict[str, object]:
    kind = "type.googleapis.com/envoy."
    line = (
        "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% [%START_TIME%] %REQ(:AUTHORITY)% %REQ(:METHOD)% %REQ(:PATH)% "
        "%RESPONSE_CODE% %BYTES_SENT% %DURATION% %UPSTREAM_HOST% %REQ(X-REQUEST-ID)%\n"
    )
    manager = {
        "@type": f"{kind}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "codec_type": "HTTP1",
        "use_remote_address": True,
        "via": "1.1 envoy",
        "generate_request_id": True,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "bench",
                    "domains": [HOST, f"{HOST}:*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "origin", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{kind}extensions.filters.http.router.v3.Router"},
            }
        ],
        "access_log": [
            {
                "name": "envoy.access_loggers.file",
                "typed_config": {
                    "@type": f"{kind}extensions.access_loggers.file.v3.FileAccessLog",
                    "path": str(place.folder / "access.log"),
                    "log_format": {"text_format_source": {"inline_string": line}},
                },
            }
        ],
    }
    chain: dict[str, object] = {
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    }
    tls = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{kind}extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": {
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": str(place.certificate.certificate)},
                        "private_key": {"filename": str(place.certificate.key)},
                    }
                ],
            },
        },
    }

    def listener(name: str, port: int, secured: bool) -> dict[str, object]:
        return {
            "name": name,
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
            "tcp_backlog_size": 4096,
            "filter_chains": [{**chain, "transport_socket": tls} if secured else chain],
        }

    return {
        "static_resources": {
            "listeners": [listener("plain", place.plain_port, False), listener("tls", place.tls_port, True)],
            "clusters": [
                {
                    "name": "origin",
                    "type": "STATIC",
                    "load_assignment": {
                        "cluster_name": "origin",
                        "endpoints": [
                            {
                                "lb_endpoints": [
                                    {
                                        "endpoint": {
                                            "address": {
                                                "socket_address": {
                                                    "address": "127.0.0.1",
                                                    "port_value": place.origin_port,
                                                }
                                            }
                                        }
                                    }
                                ]
                            }
                        ],
                    },
                }
            ],
        }
    }


def traefik(place: Place) -> Recipe | None:
    binary, folder = _binary("traefik"), place.folder
    if binary is None:
        return None
    static, dynamic = folder / "traefik.toml", folder / "routes.toml"
    static.write_text(
        f"""[global]
checkNewVersion = false
sendAnonymousUsage = false
[log]
level = "ERROR"
[accessLog]
filePath = "{folder}/access.log"
bufferingSize = 1000
[entryPoints.plain]
address = "127.0.0.1:{place.plain_port}"
[entryPoints.tls]
address = "127.0.0.1:{place.tls_port}"
[serversTransport]
maxIdleConnsPerHost = 128
[providers.file]
filename = "{dynamic}"
watch = false
"""
    )
    dynamic.write_text(
        f"""[http.routers.plain]
rule = "Host(`{HOST}`)"
entryPoints = ["plain"]
service = "origin"
middlewares = ["via"]
[http.routers.tls]
rule = "Host(`{HOST}`)"
entryPoints = ["tls"]
service = "origin"
middlewares = ["via"]
[http.routers.tls.tls]
[http.middlewares.via.headers.customRequestHeaders]
Via = "1.1 traefik"
[[http.services.origin.loadBalancer.servers]]
url = "http://127.0.0.1:{place.origin_port}"
[[tls.certificates]]
certFile = "{place.certificate.certificate}"
keyFile = "{place.certificate.key}"
[tls.options.default]
minVersion = "VersionTLS13"
"""
    )
    version = subprocess.run([binary, "version"], capture_output=True, text=True, check=False).stdout.split()
    return Recipe(
        "traefik",
        f"traefik {version[1]}" if len(version) > 1 else "unknown",
        [binary, f"--configFile={static}"],
        [static, dynamic],
        folder / "access.log",
        "accessLog.filePath with bufferingSize = 1000, common format",
        {"GOMAXPROCS": "1"},
        "adds no request id (it has none without a plugin)",
    )


def caddy(place: Place) -> Recipe | None:
    binary, folder = _binary("caddy"), place.folder
    if binary is None:
        return None
    path = folder / "Caddyfile"
    path.write_text(
        f"""{{
	admin off
	persist_config off
	auto_https off
	default_bind 127.0.0.1
	servers {{
		protocols h1
	}}
	log default {{
		level ERROR
	}}
}}
(site) {{
	log {{
		output file {folder}/access.log {{
			roll_disabled
		}}
		format filter {{
			request>headers delete
			request>tls delete
			resp_headers delete
			wrap json
		}}
	}}
	reverse_proxy 127.0.0.1:{place.origin_port} {{
		header_up Via "1.1 caddy"
		header_up X-Request-Id {{http.request.uuid}}
		transport http {{
			keepalive_idle_conns_per_host 128
		}}
	}}
}}
http://{HOST}:{place.plain_port} {{
	import site
}}
https://{HOST}:{place.tls_port} {{
	tls {place.certificate.certificate} {place.certificate.key} {{
		protocols tls1.3
	}}
	import site
}}
"""
    )
    return Recipe(
        "caddy",
        "caddy " + _first_line(binary, "version").split()[0],
        [binary, "run", "--config", str(path), "--adapter", "caddyfile"],
        [path],
        folder / "access.log",
        "log output file, JSON without header fields",
        {"GOMAXPROCS": "1", "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)},
    )


PEERS: dict[str, Callable[[Place], Recipe | None]] = {
    "nginx": nginx,
    "haproxy": haproxy,
    "envoy": envoy,
    "traefik": traefik,
    "caddy": caddy,
}
