"""`wakefront compile`: the hot modules made into C by mypyc, for this Python and beside the sources.

mypyc and the C compiler run in a process of their own (`python -m proxy.cli.compile FOLDER`), whose words are shown
only if it fails. A new set appears under its name whole or not at all.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from proxy import compiled
from proxy.cli.failure import CliError
from proxy.cli.output import print_json, say, waiting
from proxy.clock import monotonic

_TIMEOUT_S = 900.0
_TAIL = 30  # lines of a compiler's words that are shown


def compile_modules(as_json: bool) -> None:
    """Make the set of the present sources, unless it is there."""
    place = compiled.folder()
    began = monotonic()
    is_new = not place.is_dir()
    if is_new:
        _check_tools()
        with waiting(f"compiling {len(compiled.MODULES)} modules; this takes about a minute", quiet=as_json):
            _make(place)
    facts = {
        "folder": str(place), "modules": list(compiled.MODULES), "new": is_new, "seconds": round(monotonic() - began, 1)
    }  # fmt: skip
    if as_json:
        print_json(facts)
    elif is_new:
        say(f"compiled in {facts['seconds']} s; `wakefront serve` uses it from its next start on")
    else:
        say("compiled before, from the present sources: nothing to do")


def _check_tools() -> None:
    """Raises CliError that names all that is missing."""
    missing = []
    compiler = shlex.split(os.environ.get("CC") or str(sysconfig.get_config_var("CC") or "cc"))[0]
    if shutil.which(compiler) is None:
        missing.append(f"a C compiler ({compiler}; on Debian: apt install gcc)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        missing.append(f"the headers of {sys.executable} (on Debian: apt install python{version}-dev)")
    packages = [name for name in ("mypyc", "setuptools") if find_spec(name) is None]
    if packages:
        missing.append(f"{' and '.join(packages)} (pip install 'wakefront[compile]')")
    if missing:
        raise CliError("To compile, this is missing: " + "; ".join(missing))


def _make(place: Path) -> None:
    try:
        compiled.SETS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="new-", dir=compiled.SETS) as temporary:
            new = Path(temporary) / "set"
            new.mkdir()
            _run(new, Path(temporary))
            try:
                new.rename(place)
            except OSError:
                if not place.is_dir():  # else another has made it meanwhile
                    raise
    except OSError as error:
        raise CliError(f"The compiled modules cannot be written: {error}") from None
    for other in compiled.SETS.iterdir():
        if other != place and not other.name.startswith("new-"):
            shutil.rmtree(other, ignore_errors=True)  # of other sources, or another Python


def _run(new: Path, work: Path) -> None:
    log = work / "log"
    with log.open("wb") as output:
        try:
            status = subprocess.run(
                [sys.executable, "-m", "proxy.cli.compile", str(new)],
                env={**os.environ, compiled.PURE: "1", "PYTHONPATH": str(compiled.SETS.parent.parent)},
                cwd=work, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=_TIMEOUT_S, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            raise CliError(f"Compiling has not ended within {_TIMEOUT_S:.0f} s.") from None
    if status:
        words = log.read_text(errors="replace").splitlines()
        raise CliError(
            "\n".join(["Compiling failed; plain Python goes on being used. Its last words:", *words[-_TAIL:]])
        )


def _apart(sources: list[Path]) -> list[Path]:
    """The same files in a folder that holds nothing else.

    mypy takes all that lies beside a package for the program's own, and will not have its own libraries among that, as
    they are where packages are installed.
    """
    package = compiled.SETS.parent
    if not any(package.parent.glob("*.dist-info")):
        return sources  # a clone: a traceback can then show the line
    folder = Path("source")
    folder.mkdir()
    (folder / package.name).symlink_to(package)
    return [folder.resolve() / source.relative_to(package.parent) for source in sources]


def _build(target: Path) -> None:
    """The work itself, in the child: C beside the current folder, the libraries into `target`."""
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.errors import BaseError, CCompilerError

    sources = [str(path) for path in _apart([compiled.source(module) for module in compiled.MODULES])]
    options = ["--config-file=", "--cache-dir=/dev/null", "--ignore-missing-imports"]
    extensions = mypycify([*options, *sources], opt_level="3", debug_level="0", target_dir="c")
    distribution = Distribution({"name": "wakefront-compiled", "ext_modules": extensions})
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = "lib", "objects"
    command.ensure_finalized()
    try:
        command.run()
    except (BaseError, CCompilerError) as error:
        sys.exit(str(error))
    for extension in extensions:
        shutil.copyfile(command.get_ext_fullpath(extension.name), target / f"{extension.name}{compiled.SUFFIX}")


if __name__ == "__main__":
    _build(Path(sys.argv[1]))
