"""The command `wakefront`: its words, options and help. What each command does is in the module it imports when run.

Modules are imported inside the commands, so that none pays at its start for what another needs. Expected failures
arrive here as CliError: one sentence on stderr and exit code 1 (what was asked for failed) or 2 (usage, configuration).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from proxy.cli.failure import CliError

app = typer.Typer(
    help="Fly's edge on your own machines: TLS, routing, waking and scale to zero.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
machine_app = typer.Typer(help="List, start, stop, cordon and lease machines.", no_args_is_help=True)
lease_app = typer.Typer(help="The right to change a machine alone for a while.", no_args_is_help=True)
metadata_app = typer.Typer(help="Names and values kept with a machine.", no_args_is_help=True)
certs_app = typer.Typer(help="Certificates.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure your own apps.", no_args_is_help=True)
app.add_typer(machine_app, name="machine")
app.add_typer(certs_app, name="certs")
machine_app.add_typer(lease_app, name="lease")
machine_app.add_typer(metadata_app, name="metadata")
app.add_typer(bench_app, name="bench")


def _complete_app(incomplete: str) -> list[str]:
    """App names for the shell's completion; silence when there is no node, since a prompt is no place for errors."""
    from proxy.cli.node import Api, find_node, list_apps

    try:
        return [name for one in list_apps(Api(find_node(None, None))) if (name := one["name"]).startswith(incomplete)]
    except CliError:
        return []


def _complete_machine(incomplete: str) -> list[str]:
    from proxy.cli.node import Api, find_node, list_apps, list_machines

    try:
        api = Api(find_node(None, None))
        ids = [str(machine["id"]) for one in list_apps(api) for machine in list_machines(api, one["name"])]
        return [one for one in ids if one.startswith(incomplete)]
    except CliError:
        return []


Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="WAKEFRONT_CONFIG", help="The node's config.toml (default ./config.toml)."),
]
Admin = Annotated[str | None, typer.Option("--admin", metavar="HOST:PORT", help="The node's admin API.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
AppArgument = Annotated[str, typer.Argument(metavar="APP", autocompletion=_complete_app)]
AppFilter = Annotated[str | None, typer.Option("--app", "-a", metavar="APP", autocompletion=_complete_app)]
MachineArgument = Annotated[
    str,
    typer.Argument(
        metavar="MACHINE",
        help="An id, the beginning of one, or the name of an app with one machine.",
        autocompletion=_complete_machine,
    ),
]
_NONCE_VARIABLE = "WAKEFRONT_LEASE_NONCE"
Nonce = Annotated[
    str | None, typer.Option("--nonce", envvar=_NONCE_VARIABLE, help="Of the lease you hold, if the machine is leased.")
]
NeededNonce = Annotated[str, typer.Option("--nonce", envvar=_NONCE_VARIABLE, help="Of the lease you hold.")]
Ttl = Annotated[float, typer.Option("--ttl", metavar="SECONDS", min=1, max=86_400, help="When it expires by itself.")]
Wait = Annotated[float, typer.Option("--wait", metavar="SECONDS", min=0, help="Wait for the new state; 0 = do not.")]


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        typer.echo(f"wakefront {version('wakefront')}")
    except PackageNotFoundError:
        raise CliError("The version is known only where wakefront is installed: `pip install --editable .`") from None
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fly's edge on your own machines: TLS, routing, waking and scale to zero."""


@app.command()
def serve(config: Config = None, json: Json = False) -> None:
    """Run a node: check config.toml, say where things are, and serve until SIGTERM or Ctrl-C."""
    from proxy.cli.serve import serve

    serve(config, json)


@app.command()
def check(
    fly_toml: Annotated[
        list[Path] | None, typer.Argument(metavar="[FLY_TOML]...", help="fly.toml files to check instead of a config.")
    ] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Say what config.toml and its fly.toml files come to, and list every fault."""
    from proxy.cli.check import run_check
    from proxy.cli.node import config_path

    files = fly_toml or []
    raise typer.Exit(run_check(config_path(config) if config is not None or not files else None, files, json))


@app.command()
def reload(config: Config = None, admin: Admin = None, json: Json = False) -> None:
    """Have the node read its configuration again; a faulty one changes nothing and says why."""
    from proxy.cli.client import connect, reload

    reload(connect(config, admin), json)


@app.command()
def status(config: Config = None, admin: Admin = None, json: Json = False) -> None:
    """How the node, its processes and its apps are."""
    from proxy.cli.client import connect, status

    status(connect(config, admin), json)


@app.command()
def apps(config: Config = None, admin: Admin = None, json: Json = False) -> None:
    """The node's apps and how many of their machines run."""
    from proxy.cli.client import apps, connect

    apps(connect(config, admin), json)


@app.command()
def explain(
    url: Annotated[str, typer.Argument(metavar="URL", help="As a client would ask; https:// may be left out.")],
    method: Annotated[str, typer.Option("--method", "-X", help="Its method.")] = "GET",
    header: Annotated[list[str] | None, typer.Option("--header", "-H", help="'name: value', may be repeated.")] = None,
    source: Annotated[str, typer.Option("--from", metavar="ADDRESS", help="The client's address.")] = "127.0.0.1",
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Which machine a request would get now, and why. Nothing is sent or started."""
    from proxy.cli.client import connect
    from proxy.cli.explain import explain

    explain(connect(config, admin), url, method, header or [], source, json)


@app.command()
def logs(
    app_name: AppArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines to begin with.")] = 100,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """What an app's machines printed."""
    from proxy.cli.client import connect, logs

    logs(connect(config, admin), app_name, follow, lines, json)


@machine_app.command("list")
def machine_list(
    app_name: Annotated[str | None, typer.Argument(metavar="[APP]", autocompletion=_complete_app)] = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Machines of one app, or of all."""
    from proxy.cli.client import connect, machine_list

    machine_list(connect(config, admin), app_name, json)


@machine_app.command("status")
def machine_status(
    machine: MachineArgument,
    app_name: AppFilter = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """One machine: its state, how it was last woken, what happened to it."""
    from proxy.cli.client import connect, machine_status

    machine_status(connect(config, admin), machine, app_name, json)


@machine_app.command("start")
def machine_start(
    machine: MachineArgument,
    app_name: AppFilter = None,
    wait: Wait = 60.0,
    nonce: Nonce = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Start or resume a machine."""
    _act("start", machine, app_name, wait, nonce, config, admin, json)


@machine_app.command("stop")
def machine_stop(
    machine: MachineArgument,
    app_name: AppFilter = None,
    wait: Wait = 60.0,
    nonce: Nonce = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Stop a machine; the next request starts it cold."""
    _act("stop", machine, app_name, wait, nonce, config, admin, json)


@machine_app.command("suspend")
def machine_suspend(
    machine: MachineArgument,
    app_name: AppFilter = None,
    wait: Wait = 60.0,
    nonce: Nonce = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Freeze a machine; the next request resumes it where it was."""
    _act("suspend", machine, app_name, wait, nonce, config, admin, json)


@machine_app.command("restart")
def machine_restart(
    machine: MachineArgument,
    app_name: AppFilter = None,
    wait: Wait = 60.0,
    nonce: Nonce = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Stop a machine and start it again."""
    _act("restart", machine, app_name, wait, nonce, config, admin, json)


def _act(
    verb: str, machine: str, app_name: str | None, wait_s: float, nonce: str | None, config: Path | None,
    admin: str | None, as_json: bool,
) -> None:  # fmt: skip
    from proxy.cli.client import connect, machine_act

    machine_act(connect(config, admin), verb, machine, app_name, wait_s, as_json, nonce)


@machine_app.command("cordon")
def machine_cordon(
    machine: MachineArgument,
    app_name: AppFilter = None,
    nonce: Nonce = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Send a machine nothing new; what it has goes on."""
    from proxy.cli.client import connect
    from proxy.cli.machine import cordon

    cordon(connect(config, admin), machine, app_name, nonce, json)


@machine_app.command("uncordon")
def machine_uncordon(
    machine: MachineArgument,
    app_name: AppFilter = None,
    nonce: Nonce = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Let a cordoned machine have requests again."""
    from proxy.cli.client import connect
    from proxy.cli.machine import uncordon

    uncordon(connect(config, admin), machine, app_name, nonce, json)


@machine_app.command("wait")
def machine_wait(
    machine: MachineArgument,
    state: Annotated[
        list[str] | None,
        typer.Option("--state", "-s", help="A state, or several with commas; `settled` is any that lasts."),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0)] = 60.0,
    version: Annotated[
        str | None, typer.Option("--version", help="Fail at once if its instance_id is another.")
    ] = None,
    from_event: Annotated[
        str | None, typer.Option("--from-event", metavar="ID", help="Only what came after this event counts.")
    ] = None,
    app_name: AppFilter = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Wait until a machine is in a state (default: started)."""
    from proxy.cli.client import connect
    from proxy.cli.machine import wait

    wait(connect(config, admin), machine, app_name, state or ["started"], timeout, version, from_event, json)


@lease_app.command("show")
def lease_show(
    machine: MachineArgument, app_name: AppFilter = None, config: Config = None, admin: Admin = None, json: Json = False
) -> None:
    """Who holds a machine, and until when."""
    from proxy.cli.client import connect
    from proxy.cli.machine import lease_show

    lease_show(connect(config, admin), machine, app_name, json)


@lease_app.command("take")
def lease_take(
    machine: MachineArgument,
    ttl: Ttl = 60.0,
    description: Annotated[str, typer.Option("--description", "-d", help="What others are told.")] = "",
    app_name: AppFilter = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Take a machine to yourself for a while; changes then need the nonce that this prints."""
    from proxy.cli.client import connect
    from proxy.cli.machine import lease_take

    lease_take(connect(config, admin), machine, app_name, ttl, description, None, json)


@lease_app.command("extend")
def lease_extend(
    machine: MachineArgument,
    nonce: NeededNonce,
    ttl: Ttl = 60.0,
    app_name: AppFilter = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Keep a lease that you hold for longer, from now on."""
    from proxy.cli.client import connect
    from proxy.cli.machine import lease_take

    lease_take(connect(config, admin), machine, app_name, ttl, "", nonce, json)


@lease_app.command("release")
def lease_release(
    machine: MachineArgument,
    nonce: NeededNonce,
    app_name: AppFilter = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Give a lease back."""
    from proxy.cli.client import connect
    from proxy.cli.machine import lease_release

    lease_release(connect(config, admin), machine, app_name, nonce, json)


@metadata_app.command("show")
def metadata_show(
    machine: MachineArgument, app_name: AppFilter = None, config: Config = None, admin: Admin = None, json: Json = False
) -> None:
    """A machine's metadata."""
    from proxy.cli.client import connect
    from proxy.cli.machine import metadata_show

    metadata_show(connect(config, admin), machine, app_name, json)


@metadata_app.command("set")
def metadata_set(
    machine: MachineArgument,
    pairs: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...")],
    app_name: AppFilter = None,
    nonce: Nonce = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Set keys of a machine's metadata; others stay."""
    from proxy.cli.client import connect
    from proxy.cli.machine import metadata_set

    metadata_set(connect(config, admin), machine, app_name, pairs, nonce, json)


@metadata_app.command("remove")
def metadata_remove(
    machine: MachineArgument,
    keys: Annotated[list[str], typer.Argument(metavar="KEY...")],
    app_name: AppFilter = None,
    nonce: Nonce = None,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Remove keys from a machine's metadata."""
    from proxy.cli.client import connect
    from proxy.cli.machine import metadata_remove

    metadata_remove(connect(config, admin), machine, app_name, keys, nonce, json)


@certs_app.command("ca")
def certs_ca(config: Config = None, admin: Admin = None, json: Json = False) -> None:
    """Print the root certificate that the node's own certificates are signed with, as PEM."""
    from proxy.cli.client import certs_ca, connect

    certs_ca(connect(config, admin), json)


@bench_app.command("coldstart")
def bench_coldstart(
    app_name: Annotated[str, typer.Option("--app", "-a", metavar="APP", autocompletion=_complete_app)],
    runs: Annotated[int, typer.Option("--runs", "-n", min=1, max=10_000)] = 20,
    suspend: Annotated[bool, typer.Option("--suspend", help="Suspend between runs instead of stopping.")] = False,
    path: Annotated[str, typer.Option("--path", help="The path to ask for.")] = "/",
    plain: Annotated[bool, typer.Option("--http", help="Plain HTTP on port 80 instead of HTTPS on 443.")] = False,
    config: Config = None,
    admin: Admin = None,
    json: Json = False,
) -> None:
    """Stop an app's machine and make the request that wakes it, again and again; print how long each phase took."""
    from proxy.cli.client import connect
    from proxy.cli.coldstart import coldstart

    coldstart(connect(config, admin), app_name, runs, suspend=suspend, path=path, plain=plain, as_json=json)


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="End after the steps; the exit code says if all held.")] = False,
    keep: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Make the demo's files here and leave them.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a node with little apps on loopback and show what it does, step by step."""
    from proxy.cli.demo import demo

    raise typer.Exit(demo(once=once, keep=keep, as_json=json))


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. Never returns: ends in SystemExit."""
    from proxy.cli.output import print_error

    try:
        app(arguments, prog_name="wakefront")
    except CliError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
