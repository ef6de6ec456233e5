"""The command `wakefront`: its words, options and help. What each command does is in the module it imports when run.

Modules are imported inside the commands, so that none pays at its start for what another needs. Expected failures
arrive here as CliError: one sentence on stderr and exit code 1 (what was asked for failed) or 2 (usage, configuration).
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Literal, NamedTuple, ParamSpec

import typer

from proxy.cli.failure import FAILED, USAGE, CliError

if TYPE_CHECKING:
    from proxy.cli.node import Api

app = typer.Typer(
    help="Fly's edge on your own machines: TLS, routing, waking and scale to zero.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
machine_app = typer.Typer(help="List, start, stop, cordon and lease machines.", no_args_is_help=True)
lease_app = typer.Typer(help="The right to change a machine alone for a while.", no_args_is_help=True)
metadata_app = typer.Typer(help="Names and values kept with a machine.", no_args_is_help=True)
certs_app = typer.Typer(help="Domains of apps and their certificates.", no_args_is_help=True)
node_app = typer.Typer(help="Have nodes join a fleet.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure your own apps.", no_args_is_help=True)
app.add_typer(machine_app, name="machine")
app.add_typer(certs_app, name="certs")
app.add_typer(node_app, name="node")
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


def _complete_hostname(incomplete: str) -> list[str]:
    from proxy.cli.node import Api, find_node

    try:
        page = Api(find_node(None, None)).get("/v1/certificates", {"filter": incomplete, "limit": 500})
        return [name for one in page["certificates"] if (name := str(one["hostname"])).startswith(incomplete)]
    except CliError:
        return []


def _whole_word(word: str | None) -> str | None:
    """Refuse what an unset variable of the user's shell leaves, which would mean any machine, and what is no text."""
    if word is not None and (not word or not word.isprintable()):
        raise typer.BadParameter("it is empty." if not word else f"{word!r} is no name or id.")
    return word


Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="WAKEFRONT_CONFIG", help="The node's config.toml (default ./config.toml)."),
]
Admin = Annotated[str | None, typer.Option("--admin", metavar="HOST:PORT", help="The node's admin API.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
AppArgument = Annotated[str, typer.Argument(metavar="APP", callback=_whole_word, autocompletion=_complete_app)]
AppFilter = Annotated[
    str | None, typer.Option("--app", "-a", metavar="APP", callback=_whole_word, autocompletion=_complete_app)
]
MachineArgument = Annotated[
    str,
    typer.Argument(
        metavar="MACHINE",
        help="An id, the beginning of one, or the name of an app with one machine.",
        callback=_whole_word,
        autocompletion=_complete_machine,
    ),
]
HostnameArgument = Annotated[
    str,
    typer.Argument(
        metavar="HOSTNAME",
        help="As in shop.example.com; *.example.com is a wildcard, best put in quotes.",
        callback=_whole_word,
        autocompletion=_complete_hostname,
    ),
]
_NONCE_VARIABLE = "WAKEFRONT_LEASE_NONCE"
Nonce = Annotated[
    str | None, typer.Option("--nonce", envvar=_NONCE_VARIABLE, help="Of the lease you hold, if the machine is leased.")
]
NeededNonce = Annotated[str, typer.Option("--nonce", envvar=_NONCE_VARIABLE, help="Of the lease you hold.")]
Ttl = Annotated[float, typer.Option("--ttl", metavar="SECONDS", min=1, max=86_400, help="When it expires by itself.")]
Wait = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", min=0, max=86_400, help="Wait for the new state; 0 = do not.")
]

Challenge = Literal["tls-alpn-01", "http-01", "dns-01"]


class Ask(NamedTuple):
    """What --config, --admin and --json of a command come to."""

    node: Api
    json: bool


P = ParamSpec("P")
_ASK_OPTIONS = tuple(
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, annotation, default in (("config", Config, None), ("admin", Admin, None), ("json", Json, False))
)


def asking(command: Callable[Concatenate[Ask, P], None]) -> Callable[..., None]:
    """Make a command of one that asks a node: its users give --config, --admin and --json, and it gets them as `ask`.

    typer makes options of the parameters in a function's signature, so the three stand there in the place of `ask`.
    """

    @functools.wraps(command)
    def run(*, config: Path | None, admin: str | None, json: bool, **words: Any) -> None:  # Any: by the signature
        from proxy.cli.client import connect

        command(Ask(connect(config, admin), json), **words)  # type: ignore[call-arg]  # typer gives all by name

    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    run.__signature__ = inspect.Signature([*own, *_ASK_OPTIONS])  # type: ignore[attr-defined]  # as PEP 362 has it
    return run


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
    from proxy.cli.node import DEFAULT_CONFIG, config_path

    files = fly_toml or []
    if node_files := [one for one in files if one.name == DEFAULT_CONFIG]:
        raise CliError(f"{node_files[0]} is a node's file: `wakefront check --config {node_files[0]}`.", USAGE)
    raise typer.Exit(run_check(config_path(config) if config is not None or not files else None, files, json))


@app.command()
def compile(json: Json = False) -> None:
    """Make C of the modules that every request passes through: a request costs a quarter less. Needed once."""
    from proxy.cli.compile import compile_modules

    compile_modules(json)


@app.command()
@asking
def reload(ask: Ask) -> None:
    """Have the node read its configuration again; a faulty one changes nothing and says why."""
    from proxy.cli.client import reload

    reload(ask.node, ask.json)


@app.command()
def upgrade(config: Config = None, json: Json = False) -> None:
    """Have a running node go on as this version, with no connect refused; one that fails is put back."""
    from proxy.cli.upgrade import upgrade

    upgrade(config, json)


@app.command()
@asking
def status(ask: Ask) -> None:
    """How the node, its processes and its apps are."""
    from proxy.cli.client import status

    status(ask.node, ask.json)


@app.command()
@asking
def apps(ask: Ask) -> None:
    """The node's apps and how many of their machines run."""
    from proxy.cli.client import apps

    apps(ask.node, ask.json)


@app.command()
@asking
def explain(
    ask: Ask,
    url: Annotated[str, typer.Argument(metavar="URL", help="As a client would ask; https:// may be left out.")],
    method: Annotated[str, typer.Option("--method", "-X", help="Its method.")] = "GET",
    header: Annotated[list[str] | None, typer.Option("--header", "-H", help="'name: value', may be repeated.")] = None,
    source: Annotated[str, typer.Option("--from", metavar="ADDRESS", help="The client's address.")] = "127.0.0.1",
) -> None:
    """Which machine a request would get now, and why. Nothing is sent or started."""
    from proxy.cli.explain import explain

    explain(ask.node, url, method, header or [], source, ask.json)


@app.command()
@asking
def logs(
    ask: Ask,
    app_name: AppArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines to begin with.")] = 100,
) -> None:
    """What an app's machines printed."""
    from proxy.cli.client import logs

    logs(ask.node, app_name, follow, lines, ask.json)


@machine_app.command("list")
@asking
def machine_list(
    ask: Ask,
    app_name: Annotated[
        str | None, typer.Argument(metavar="[APP]", callback=_whole_word, autocompletion=_complete_app)
    ] = None,
) -> None:
    """Machines of one app, or of all."""
    from proxy.cli.client import machine_list

    machine_list(ask.node, app_name, ask.json)


@machine_app.command("status")
@asking
def machine_status(ask: Ask, machine: MachineArgument, app_name: AppFilter = None) -> None:
    """One machine: its state, how it was last woken, what happened to it."""
    from proxy.cli.client import machine_status

    machine_status(ask.node, machine, app_name, ask.json)


@machine_app.command("start")
@asking
def machine_start(
    ask: Ask, machine: MachineArgument, app_name: AppFilter = None, wait: Wait = 60.0, nonce: Nonce = None
) -> None:
    """Start or resume a machine."""
    _act(ask, "start", machine, app_name, wait, nonce)


@machine_app.command("stop")
@asking
def machine_stop(
    ask: Ask, machine: MachineArgument, app_name: AppFilter = None, wait: Wait = 60.0, nonce: Nonce = None
) -> None:
    """Stop a machine; the next request starts it cold."""
    _act(ask, "stop", machine, app_name, wait, nonce)


@machine_app.command("suspend")
@asking
def machine_suspend(
    ask: Ask, machine: MachineArgument, app_name: AppFilter = None, wait: Wait = 60.0, nonce: Nonce = None
) -> None:
    """Freeze a machine; the next request resumes it where it was."""
    _act(ask, "suspend", machine, app_name, wait, nonce)


@machine_app.command("restart")
@asking
def machine_restart(
    ask: Ask, machine: MachineArgument, app_name: AppFilter = None, wait: Wait = 60.0, nonce: Nonce = None
) -> None:
    """Stop a machine and start it again."""
    _act(ask, "restart", machine, app_name, wait, nonce)


def _act(ask: Ask, verb: str, machine: str, app_name: str | None, wait_s: float, nonce: str | None) -> None:
    from proxy.cli.client import machine_act

    machine_act(ask.node, verb, machine, app_name, wait_s, ask.json, nonce)


@machine_app.command("cordon")
@asking
def machine_cordon(ask: Ask, machine: MachineArgument, app_name: AppFilter = None, nonce: Nonce = None) -> None:
    """Send a machine nothing new; what it has goes on."""
    from proxy.cli.machine import cordon

    cordon(ask.node, machine, app_name, nonce, ask.json)


@machine_app.command("uncordon")
@asking
def machine_uncordon(ask: Ask, machine: MachineArgument, app_name: AppFilter = None, nonce: Nonce = None) -> None:
    """Let a cordoned machine have requests again."""
    from proxy.cli.machine import uncordon

    uncordon(ask.node, machine, app_name, nonce, ask.json)


@machine_app.command("wait")
@asking
def machine_wait(
    ask: Ask,
    machine: MachineArgument,
    state: Annotated[
        list[str] | None,
        typer.Option("--state", "-s", help="A state, or several with commas; `settled` is any that lasts."),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0, max=86_400)] = 60.0,
    version: Annotated[
        str | None, typer.Option("--version", help="Fail at once if its instance_id is another.")
    ] = None,
    from_event: Annotated[
        str | None, typer.Option("--from-event", metavar="ID", help="Only what came after this event counts.")
    ] = None,
    app_name: AppFilter = None,
) -> None:
    """Wait until a machine is in a state (default: started)."""
    from proxy.cli.machine import wait

    wait(ask.node, machine, app_name, state or ["started"], timeout, version, from_event, ask.json)


@lease_app.command("show")
@asking
def lease_show(ask: Ask, machine: MachineArgument, app_name: AppFilter = None) -> None:
    """Who holds a machine, and until when."""
    from proxy.cli.machine import lease_show

    lease_show(ask.node, machine, app_name, ask.json)


@lease_app.command("take")
@asking
def lease_take(
    ask: Ask,
    machine: MachineArgument,
    ttl: Ttl = 60.0,
    description: Annotated[str, typer.Option("--description", "-d", help="What others are told.")] = "",
    app_name: AppFilter = None,
) -> None:
    """Take a machine to yourself for a while; changes then need the nonce that this prints."""
    from proxy.cli.machine import lease_take

    lease_take(ask.node, machine, app_name, ttl, description, None, ask.json)


@lease_app.command("extend")
@asking
def lease_extend(
    ask: Ask, machine: MachineArgument, nonce: NeededNonce, ttl: Ttl = 60.0, app_name: AppFilter = None
) -> None:
    """Keep a lease that you hold for longer, from now on."""
    from proxy.cli.machine import lease_take

    lease_take(ask.node, machine, app_name, ttl, "", nonce, ask.json)


@lease_app.command("release")
@asking
def lease_release(ask: Ask, machine: MachineArgument, nonce: NeededNonce, app_name: AppFilter = None) -> None:
    """Give a lease back."""
    from proxy.cli.machine import lease_release

    lease_release(ask.node, machine, app_name, nonce, ask.json)


@metadata_app.command("show")
@asking
def metadata_show(ask: Ask, machine: MachineArgument, app_name: AppFilter = None) -> None:
    """A machine's metadata."""
    from proxy.cli.machine import metadata_show

    metadata_show(ask.node, machine, app_name, ask.json)


@metadata_app.command("set")
@asking
def metadata_set(
    ask: Ask,
    machine: MachineArgument,
    pairs: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...")],
    app_name: AppFilter = None,
    nonce: Nonce = None,
) -> None:
    """Set keys of a machine's metadata; others stay."""
    from proxy.cli.machine import metadata_set

    metadata_set(ask.node, machine, app_name, pairs, nonce, ask.json)


@metadata_app.command("remove")
@asking
def metadata_remove(
    ask: Ask,
    machine: MachineArgument,
    keys: Annotated[list[str], typer.Argument(metavar="KEY...")],
    app_name: AppFilter = None,
    nonce: Nonce = None,
) -> None:
    """Remove keys from a machine's metadata."""
    from proxy.cli.machine import metadata_remove

    metadata_remove(ask.node, machine, app_name, keys, nonce, ask.json)


@certs_app.command("add")
@certs_app.command("create", hidden=True)  # as flyctl has it, like the other hidden ones
@asking
def certs_add(
    ask: Ask,
    hostname: HostnameArgument,
    app_name: AppFilter = None,
    challenge: Annotated[
        Challenge | None, typer.Option("--challenge", help="How to prove the name; else what fits is tried.")
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            "--wait", metavar="SECONDS", min=0, max=86_400, help="Wait for the certificate and say each step."
        ),
    ] = 0.0,
) -> None:
    """Give an app a domain, with a certificate as soon as DNS leads here."""
    from proxy.cli.certs import add

    add(ask.node, hostname, app_name, challenge, wait, ask.json)


@certs_app.command("check")
@asking
def certs_check(ask: Ask, hostname: HostnameArgument, app_name: AppFilter = None) -> None:
    """Look at a domain's DNS now: what is in the way, and the record that mends it. Ends with 1 if not verified."""
    from proxy.cli.certs import check

    raise typer.Exit(0 if check(ask.node, hostname, app_name, ask.json) else FAILED)


@certs_app.command("show")
@asking
def certs_show(ask: Ask, hostname: HostnameArgument, app_name: AppFilter = None) -> None:
    """How a domain and its certificates stand, without a look at DNS."""
    from proxy.cli.certs import show

    show(ask.node, hostname, app_name, ask.json)


@certs_app.command("list")
@asking
def certs_list(
    ask: Ask,
    app_name: AppFilter = None,
    wanted: Annotated[str, typer.Option("--filter", metavar="TEXT", help="Only names with this in them.")] = "",
    show_all: Annotated[bool, typer.Option("--all", help="All, not the first 50 only.")] = False,
) -> None:
    """Domains of one app, or of all."""
    from proxy.cli.certs import list_certificates

    list_certificates(ask.node, app_name, wanted, show_all, ask.json)


@certs_app.command("setup")
@asking
def certs_setup(ask: Ask, hostname: HostnameArgument, app_name: AppFilter = None) -> None:
    """The ways to set up a domain's DNS, as records to paste."""
    from proxy.cli.certs import setup

    setup(ask.node, hostname, app_name, ask.json)


@certs_app.command("import")
@asking
def certs_import(
    ask: Ask,
    hostname: HostnameArgument,
    fullchain: Annotated[
        str,
        typer.Option("--fullchain", metavar="FILE", help="Certificate and intermediates, PEM; - is standard input."),
    ],
    private_key: Annotated[
        str, typer.Option("--private-key", metavar="FILE", help="Its private key, PEM; - is standard input.")
    ],
    app_name: AppFilter = None,
) -> None:
    """Use a certificate of your own for a domain. A managed one, if there is one, stays behind it."""
    from proxy.cli.certs import import_certificate

    import_certificate(ask.node, hostname, app_name, fullchain, private_key, ask.json)


@certs_app.command("renew")
@asking
def certs_renew(ask: Ask, hostname: HostnameArgument, app_name: AppFilter = None, wait: Wait = 60.0) -> None:
    """Order a new managed certificate now, as when a key may have leaked; the present one is shown meanwhile."""
    from proxy.cli.certs import renew

    renew(ask.node, hostname, app_name, wait, ask.json)


@certs_app.command("remove")
@certs_app.command("delete", hidden=True)
@asking
def certs_remove(
    ask: Ask,
    hostname: HostnameArgument,
    app_name: AppFilter = None,
    custom: Annotated[bool, typer.Option("--custom", help="Only the imported certificate.")] = False,
    acme: Annotated[bool, typer.Option("--acme", help="Only the managed certificate.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Take a domain from an app, or one of its certificates."""
    from proxy.cli.certs import remove

    if custom and acme:
        raise CliError("--custom and --acme are one or the other; without both the whole domain is removed.", USAGE)
    remove(ask.node, hostname, app_name, "custom" if custom else "acme" if acme else None, yes, ask.json)


@certs_app.command("forecast")
@asking
def certs_forecast(ask: Ask) -> None:
    """When each certificate is renewed, and which will not be, and why."""
    from proxy.cli.certs import forecast

    forecast(ask.node, ask.json)


@certs_app.command("account")
@asking
def certs_account(
    ask: Ask, roll_key: Annotated[bool, typer.Option("--roll-key", help="Give it a new key now.")] = False
) -> None:
    """The node's account with the CA."""
    from proxy.cli.certs import account

    account(ask.node, roll_key, ask.json)


@certs_app.command("ca")
@asking
def certs_ca(ask: Ask) -> None:
    """Print the root certificate that the node's own certificates are signed with, as PEM."""
    from proxy.cli.client import certs_ca

    certs_ca(ask.node, ask.json)


@node_app.command("invite")
@asking
def node_invite(
    ask: Ask,
    valid: Annotated[str, typer.Option("--valid", metavar="DURATION", help="For so long it may be used.")] = "15m",
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="Where the new node reaches this one's backhaul."),
    ] = None,
    replace: Annotated[
        str | None,
        typer.Option("--replace", metavar="NODE", help="Let the new node take the name and place of this one."),
    ] = None,
) -> None:
    """Print an invite: one line, a secret, by which one new node may join this node's fleet."""
    from proxy.cli.fleet import invite

    invite(ask.node, valid, address, replace, ask.json)


@app.command("nodes")
@asking
def nodes_command(ask: Ask) -> None:
    """The nodes of the fleet, as this one sees them."""
    from proxy.cli.fleet import nodes

    nodes(ask.node, ask.json)


@app.command("regions")
@asking
def regions_command(ask: Ask) -> None:
    """Regions by distance from this node, as measured."""
    from proxy.cli.fleet import regions

    regions(ask.node, ask.json)


@node_app.command("drain")
@asking
def node_drain(ask: Ask) -> None:
    """Have new requests go to other nodes' machines; what is under way ends here."""
    from proxy.cli.fleet import drain

    drain(ask.node, True, ask.json)


@node_app.command("undrain")
@asking
def node_undrain(ask: Ask) -> None:
    """Take requests again."""
    from proxy.cli.fleet import drain

    drain(ask.node, False, ask.json)


@node_app.command("invites")
@asking
def node_invites(ask: Ask) -> None:
    """Invites of this node that are open, and those of the last day."""
    from proxy.cli.fleet import invites

    invites(ask.node, ask.json)


@node_app.command("revoke")
@asking
def node_revoke(
    ask: Ask, invite: Annotated[str, typer.Argument(metavar="INVITE", help="Its id.", callback=_whole_word)]
) -> None:
    """Take an invite back."""
    from proxy.cli.fleet import revoke

    revoke(ask.node, invite, ask.json)


@node_app.command("join")
def node_join(
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="The line of `node invite`; - reads it from standard input.")
    ],
    config: Config = None,
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST:PORT", help="Where other nodes reach this one's backhaul.")
    ] = None,
    json: Json = False,
) -> None:
    """Make this node one of the fleet that an invite is of, with what its config.toml says. Run it before `serve`."""
    from proxy.cli.fleet import join
    from proxy.cli.node import config_path

    join(config_path(config), token, address, json)


@bench_app.command("coldstart")
@asking
def bench_coldstart(
    ask: Ask,
    app_name: Annotated[
        str, typer.Option("--app", "-a", metavar="APP", callback=_whole_word, autocompletion=_complete_app)
    ],
    runs: Annotated[int, typer.Option("--runs", "-n", min=1, max=10_000)] = 20,
    suspend: Annotated[bool, typer.Option("--suspend", help="Suspend between runs instead of stopping.")] = False,
    path: Annotated[str, typer.Option("--path", help="The path to ask for.")] = "/",
    plain: Annotated[bool, typer.Option("--http", help="Plain HTTP on port 80 instead of HTTPS on 443.")] = False,
) -> None:
    """Stop an app's machine and make the request that wakes it, again and again; print how long each phase took."""
    from proxy.cli.coldstart import coldstart

    coldstart(ask.node, app_name, runs, suspend=suspend, path=path, plain=plain, as_json=ask.json)


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

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this; nobody wants to read it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the process ends
    try:
        app(arguments, prog_name="wakefront")
    except CliError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # mostly standard output: a full disk
        print_error(f"{error}.")
        sys.exit(FAILED)
