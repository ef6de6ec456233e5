"""What attacks are run against and measured with: see tests/attacks/__init__.py for how a test uses it.

`AttackedNode` is a real `wakefront serve`; `Attack` takes samples of its workers while a test does its worst, and
holds what is true of every attack. Rows end up in an attack_table.Ledger.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tests.support.attack_table import Figures, Ledger
from tests.support.bystander import Bystander, Tally
from tests.support.peer import Answer, Closed, Peer
from tests.support.plane import HTTP_80, TLS_443, Plane, static_app
from tests.support.processes import cpu_s, runs
from tests.support.recording import RecordingOrigin, Seen

# Services of type `requests` keep connections to machines: what is left on one would meet the next request.
KEPT = f'[services.concurrency]\ntype = "requests"\nsoft_limit = 1000\n{HTTP_80}{TLS_443}'
SAMPLE_S = 0.05
WAIT_WINDOW_S = 0.5
BASELINE_S = 1.0
BASELINE_LASTS_S = 20.0
_MIB = 1 << 20


# --- what is attacked


class AttackedNode(Plane):
    """A node with one worker, whose app `web` is a RecordingOrigin and whose app `quiet` is the bystander's.

    One worker, so that attacker and bystander share it: the worst case, and all cost is in one process. `web` are more
    lines of that app's section, `apps` more apps, `sections` more of config.toml, such as [limits].
    """

    def __init__(
        self,
        folder: Path,
        *,
        apps: str = "",
        sections: str = "",
        web: str = "",
        workers: int = 1,
        node: str = "",
        env: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.origin = RecordingOrigin()
        self.bystander = Bystander()
        self.baseline: Tally | None = None  # what it meets without an attack
        self._baseline_at = 0.0
        own = static_app(folder, "web", f"127.0.0.1:{self.origin.port}", KEPT, more=web)
        own += static_app(folder, "quiet", f"127.0.0.1:{self.bystander.port}")
        super().__init__(folder, f"{own}\n{apps}", sections, workers=workers, node=node, env=env)

    def __enter__(self) -> AttackedNode:
        super().__enter__()
        assert self.ask("/").status == 200
        self.origin.forget()
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            self.bystander.close()
            super().__exit__(*failure)
        finally:
            self.origin.close()

    def attempt(
        self,
        data: bytes,
        *,
        app: str = "web",
        tls: bool = False,
        half_close: bool = True,
        methods: Iterable[str] = (),
        source: str | None = None,
        timeout: float = 10.0,
        take_its_word: bool = False,
    ) -> Attempt:
        """Send bytes on a connection of their own and read all that comes, to the end or the timeout.

        `methods` of the requests in `data`, where one is a HEAD: the answers' framing depends on it. `take_its_word`:
        an answer with `Connection: close` is the end. Over TLS the edge may wait two seconds for the client's instead.
        """
        with self.peer(app, tls, timeout, source) as peer:
            with contextlib.suppress(ConnectionError):  # an edge may close before it has read all
                peer.send(data)
                if half_close and not tls:
                    peer.half_close()
            return Attempt.read(peer, list(methods), take_its_word)

    def take_baseline(self) -> Tally:
        """What the bystander meets while nothing else goes on; measured anew after a while, as the host changes."""
        if self.baseline is None or time.monotonic() - self._baseline_at > BASELINE_LASTS_S:
            self.bystander.aim(self.http_port, self.host("quiet"))
            time.sleep(BASELINE_S)  # a measurement takes its time
            self.baseline = self.bystander.take()
            self._baseline_at = time.monotonic()
            self.bystander.rest()
        return self.baseline


@dataclass
class Attempt:
    """What a client got for its bytes."""

    answers: list[Answer] = field(default_factory=list)
    rest: bytes = b""  # what came that is no whole answer
    closed: bool = False  # the edge ended the connection; else the timeout did

    @classmethod
    def read(cls, peer: Peer, methods: list[str], take_its_word: bool = False) -> Attempt:
        attempt = cls()
        try:
            while not attempt.closed:
                method = methods[len(attempt.answers)] if len(attempt.answers) < len(methods) else "GET"
                attempt.answers.append(answer := peer.read_answer(method))
                attempt.closed = take_its_word and answer.all("connection") == ["close"]
        except Closed as closed:
            attempt.rest, attempt.closed = closed.had, True
        except ConnectionError:
            attempt.closed = True
        except TimeoutError:
            pass
        return attempt

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers]

    def assert_refused(self, *statuses: int) -> None:
        """One answer with such a status, then the end; or the end at once, if 0 is among them."""
        assert self.closed, f"still open after {self.statuses} {self.rest!r}"
        assert not self.rest, self.rest
        if self.answers or 0 not in statuses:
            assert len(self.answers) == 1 and self.answers[0].status in statuses, self.answers


def rewritten_once(seen: list[Seen], target: str) -> bool:
    """Whether the origin got exactly one request, for this target. Its framing has been judged by the origin."""
    return [one.target for one in seen] == [target]


# --- what is measured


class Attack:
    """Samples and pass marks of one attack, as a context manager.

    Whatever the attack: no worker may die, no traceback be logged, no request of the bystander fail, and the origin
    be sent nothing that our edge may not write. Marks beyond that are arguments.
    """

    def __init__(
        self,
        ledger: Ledger,
        row: str,
        name: str,
        node: AttackedNode | None = None,
        *,
        growth_mib: float | None = None,
        p99_ms: float | None = None,
        traceback_allowed: bool = False,
        workers_may_end: bool = False,
        bystander: bool = True,
        of_control: bool = False,
    ) -> None:
        """`of_control`: control is attacked and measured, not the workers."""
        self._ledger = ledger
        self._node = node
        self._growth_mib = growth_mib
        self._p99_ms = p99_ms
        self._traceback_allowed = traceback_allowed
        self._workers_may_end = workers_may_end
        self._bystander = bystander and node is not None
        self._of_control = of_control
        self.figures = Figures(row, name)
        self._label = ""

    def case(self, label: object = "") -> None:
        """Another case begins; its label is told if it fails."""
        self.figures.cases += 1
        self._label = str(label)

    def note(self, text: str) -> None:
        """A few words for the table."""
        self.figures.notes.append(text)

    def __enter__(self) -> Attack:
        node = self._node
        if node is not None:
            if self._bystander:
                self.figures.quiet_p99_ms = node.take_baseline().p99_ms
                node.bystander.aim(node.http_port, node.host("quiet"))
            self._pids = [node.pid_of("control")] if self._of_control else node.worker_pids
            self._logged = len(node.log())
            self._sampler = Sampler(self._pids)
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.figures.seconds = time.monotonic() - self._began
        try:
            tally = self._measure()
            if error is None:
                self._judge(tally)
            else:
                self.figures.outcome = f"NOT HELD: {type(error).__name__} {self._label[:60]}".strip()
                error.add_note(f"attack {self.figures.row}, case {self.figures.cases}: {self._label}")
        except AssertionError as broken:
            self.figures.outcome = f"NOT HELD: {str(broken).splitlines()[0][:100]}"
            raise
        finally:
            self._ledger.add(self.figures)

    def _measure(self) -> Tally:
        node, tally = self._node, Tally()
        if node is None:
            return tally
        self.figures.growth_mib, self.figures.cpu_s = self._sampler.stop()
        self.figures.waited_ms = self._sampler.longest_wait_ms
        if self._bystander:
            tally = node.bystander.take()
            node.bystander.rest()
            self.figures.bystander_p99_ms, self.figures.fresh_p99_ms = tally.p99_ms, tally.fresh_p99_ms
            self.figures.bystander_answers = tally.answers
            self.figures.direct_p99_ms = tally.direct_p99_ms
        return tally

    def _judge(self, tally: Tally) -> None:
        node = self._node
        if node is None:
            return
        assert tally.failures == [], f"requests of the bystander failed: {tally.failures[:5]}"
        assert node.origin.faults == [], f"the origin was sent what it may not be: {node.origin.faults[:3]}"
        if not self._workers_may_end:
            ended = [pid for pid in self._pids if not runs(pid)]
            assert ended == [], f"processes ended: {ended}\n{node.log()[self._logged :]}"
        if not self._traceback_allowed:
            log = node.log()[self._logged :]
            assert "Traceback (most recent call last)" not in log, f"a traceback was logged\n{log[-8000:]}"
        growth, p99 = self.figures.growth_mib, self.figures.bystander_p99_ms
        if self._growth_mib is not None:
            assert growth is not None and growth <= self._growth_mib, f"grew by {growth} MiB"
        if self._p99_ms is not None:
            # where the machine itself makes the bystander wait, the mark is thrice that
            mark = max(self._p99_ms, 3 * (self.figures.quiet_p99_ms or 0.0))
            # meanwhile: what it met past the node, and what the host kept the worker from running
            host = max(self.figures.direct_p99_ms or 0.0, self.figures.waited_ms or 0.0)
            assert p99 is not None and p99 - host <= mark, f"p99 of the bystander was {p99} ms, {host} by the host"
            if p99 > mark:
                self.note(f"p99 not judged: the host kept the worker from running for {host:.0f} ms")


class Sampler:
    """Memory of some processes, looked at every few milliseconds, and their time, from creation to `stop`.

    `longest_wait_ms`: for how long one of them was ready to run and the host did not let it, within half a second.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._before = self.peak = self._rss()
        self._cpu_before = sum(map(cpu_s, self._pids))
        self.longest_wait_ms = 0.0
        self._waits: deque[list[float]] = deque(maxlen=round(WAIT_WINDOW_S / SAMPLE_S))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def stop(self) -> tuple[float, float]:
        """Growth of resident memory at its peak in MiB, and CPU seconds used."""
        self._over.set()
        self._thread.join(10)
        self._look()
        return max(0, self.peak - self._before) / _MIB, sum(map(cpu_s, self._pids)) - self._cpu_before

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self._rss())
        waits = [waited_ms(pid) for pid in self._pids]
        self._waits.append(waits)
        grown = (now - before for now, before in zip(waits, self._waits[0], strict=True))
        self.longest_wait_ms = max(self.longest_wait_ms, *grown, 0.0)

    def _rss(self) -> int:
        return sum(map(rss_bytes, self._pids))


def waited_ms(pid: int) -> float:
    """How long its main thread has been ready and not running, ever (sched_schedstats); 0 once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e6
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def rss_bytes(pid: int) -> int:
    """Resident memory; 0 once the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def open_descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
