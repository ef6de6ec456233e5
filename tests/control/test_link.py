"""Links over real Unix sockets, with the worker's side written out by hand."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from proxy import ipc
from proxy.clock import SystemClock, monotonic_ns
from proxy.control import link as link_module
from proxy.control.link import Hub, Link, app_frame
from proxy.model import App, AppName, Machine, MachineId, MachineState, RegionCode
from proxy.process import unix_address
from proxy.state import SharedMemory
from tests.control.rig import Rig, a_plan, an_app

WEB = AppName("web")


class Worker:
    """What a worker would be: frames out, messages in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._frames = ipc.FrameReader()
        self._messages: list[ipc.ToWorker] = []

    @classmethod
    async def connect(cls, path: str) -> Worker:
        return cls(*await asyncio.open_unix_connection(path))

    def send(self, message: ipc.Message) -> None:
        self._writer.write(ipc.encode(message))

    async def hello(self, slot: int = 0, protocol: int = ipc.PROTOCOL, handed_at: str = "") -> list[ipc.ToWorker]:
        self.send(ipc.WorkerHello(protocol, slot, os.getpid(), handed_at))
        return await self.until(ipc.TableEnd)

    async def next(self) -> ipc.ToWorker | None:
        """The next message; None once the link is cut."""
        async with asyncio.timeout(5):
            while not self._messages:
                try:
                    data = await self._reader.read(65536)
                except ConnectionError:
                    return None
                if not data:
                    return None
                self._messages += [ipc.decode_to_worker(body) for body in self._frames.feed(data)]
        return self._messages.pop(0)

    async def until(self, kind: type[ipc.Message]) -> list[ipc.ToWorker]:
        seen: list[ipc.ToWorker] = []
        while not seen or not isinstance(seen[-1], kind):
            message = await self.next()
            assert message is not None, f"cut after {seen}"
            seen.append(message)
        return seen

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            pass


class Records:
    """A table and whoever answers."""

    def __init__(self) -> None:
        self.apps = {WEB: App(WEB, ("web.apps.localhost",), ())}
        self.heard: list[object] = []

    def table_names(self) -> list[AppName]:
        return list(self.apps)

    def elsewhere(self) -> list[bytes]:
        return []

    def frame(self, name: AppName) -> bytes | None:
        return app_frame(self.apps[name]) if name in self.apps else None

    def wake(self, link: Link, message: ipc.Wake) -> None:
        self.heard.append(message)
        link.awaited.add(message.machine)
        link.send(ipc.WakeDone(message.app, message.machine, 1))

    def need_certificate(self, link: Link, name: str) -> None:
        link.send(ipc.CertificateReady(name))

    def passive_failure(self, message: ipc.PassiveFailure) -> None:
        self.heard.append(message)


class Setting:
    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "control.sock")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(self.path)
        listener.listen(16)
        fd, self.memory = SharedMemory.create(2)
        os.close(fd)
        for index in (1, 2):
            self.memory.beat(index, monotonic_ns())
        self.hub = Hub(listener, self.memory, SystemClock(), a_plan().settings)
        self.records = Records()
        self.workers: list[Worker] = []

    async def worker(self, slot: int | None = None) -> Worker:
        worker = await Worker.connect(self.path)
        self.workers.append(worker)
        if slot is not None:
            await worker.hello(slot)
        return worker


@pytest_asyncio.fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    one = Setting(tmp_path)
    await one.hub.start(one.records, one.records)
    yield one
    for worker in one.workers:
        await worker.close()
    await one.hub.close()


async def test_a_worker_gets_settings_and_the_whole_table(setting: Setting) -> None:
    worker = await setting.worker()
    settings, start, app, end = await worker.hello()
    assert isinstance(settings, ipc.Settings) and settings.node == "node"
    assert start == ipc.TableStart(1)
    assert app == ipc.AppSet(setting.records.apps[WEB])
    assert end == ipc.TableEnd()


async def test_a_change_reaches_every_worker(setting: Setting) -> None:
    workers = [await setting.worker(0), await setting.worker(1)]
    machine = Machine(MachineId("0a"), RegionCode("ams"), "app", MachineState.STARTED, 7, 1)
    setting.hub.set_machine(WEB, machine)
    setting.hub.remove_app(WEB)
    for worker in workers:
        assert await worker.next() == ipc.MachineSet(WEB, machine)
        assert await worker.next() == ipc.AppGone(WEB)


async def test_changes_during_a_load_come_between_its_slices(setting: Setting) -> None:
    for number in range(link_module._SLICE * 3):
        name = AppName(f"app{number}")
        setting.records.apps[name] = App(name, (), ())
    worker = await setting.worker()
    worker.send(ipc.WorkerHello(ipc.PROTOCOL, 0, 1))
    await worker.until(ipc.AppSet)
    last = AppName(f"app{link_module._SLICE * 3 - 1}")
    known = isinstance(setting.records.apps.pop(last, None), App)
    setting.hub.remove_app(last)
    rest = await worker.until(ipc.TableEnd)
    told = [message.app.name for message in rest if isinstance(message, ipc.AppSet)]
    gone = [message.name for message in rest if isinstance(message, ipc.AppGone)]
    assert known and (gone == [last] or last not in told)


async def test_questions_reach_whoever_answers(setting: Setting) -> None:
    worker = await setting.worker(0)
    wake = ipc.Wake(WEB, MachineId("0a"), hint=True)
    failure = ipc.PassiveFailure(WEB, MachineId("0a"), 3, "PC01")
    for message in (wake, failure, ipc.NeedCertificate("web.apps.localhost")):
        worker.send(message)
    assert await worker.next() == ipc.WakeDone(WEB, MachineId("0a"), 1)
    assert await worker.next() == ipc.CertificateReady("web.apps.localhost")
    assert setting.records.heard == [wake, failure]


async def test_a_peer_of_a_far_protocol_is_refused_and_a_near_one_served(setting: Setting) -> None:
    far = await setting.worker()
    far.send(ipc.WorkerHello(ipc.PROTOCOL + 2, 0, 1))
    assert await far.next() is None
    near = await setting.worker()
    assert (await near.hello(0, ipc.PROTOCOL + 1))[-1] == ipc.TableEnd()


async def test_what_is_no_message_cuts_the_link(setting: Setting) -> None:
    for junk in (b"\x05\x00\x00\x00hello", b"\xff\xff\xff\xff", ipc.encode(ipc.Wake(WEB, MachineId("0a")))):
        worker = await setting.worker()
        worker._writer.write(junk)
        assert await worker.next() is None
    unknown = await setting.worker()
    unknown.send(ipc.WorkerHello(ipc.PROTOCOL, 5, 1))  # there is no slot 5
    assert await unknown.next() is None


async def test_a_worker_that_connects_afresh_takes_the_place_of_its_old_link(setting: Setting) -> None:
    old = await setting.worker(0)
    await setting.worker(0)
    assert await old.next() is None
    assert list(setting.hub.linked) == [0]


async def test_a_worker_that_does_not_read_is_cut(setting: Setting) -> None:
    await setting.worker(0)
    text = "x" * 1_000_000
    for _ in range(40):
        setting.hub.tell_all(ipc.CertificateReady(text))
    assert setting.hub.linked == {}


async def test_a_cordon_is_complete_once_every_worker_has_acknowledged(setting: Setting, rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    workers = [await setting.worker(0), await setting.worker(1)]
    asking = asyncio.get_running_loop().create_task(setting.hub.cordon(machine), name="cordon")
    for worker in workers:
        assert not asking.done()
        ask = await worker.next()
        assert isinstance(ask, ipc.CordonAsk) and ask.machine == machine.id
        worker.send(ipc.CordonAck(machine.id, ask.sequence - 1))  # of an earlier one: does not count
        worker.send(ipc.CordonAck(machine.id, ask.sequence))
    assert await asking
    setting.hub.lift(machine)
    for worker in workers:
        assert await worker.next() == ipc.CordonLift(WEB, machine.id)


async def test_a_cordon_that_is_lifted_waits_for_no_acknowledgement(setting: Setting, rig: Rig) -> None:
    await rig.load(an_app())
    worker = await setting.worker(0)
    asking = asyncio.get_running_loop().create_task(setting.hub.cordon(rig.machine()), name="cordon")
    assert isinstance(await worker.next(), ipc.CordonAsk)
    setting.hub.lift(rig.machine())
    await asking


async def test_a_worker_that_is_replaced_during_a_cordon_is_asked_again(setting: Setting, rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    steady, dying = await setting.worker(0), await setting.worker(1)
    asking = asyncio.get_running_loop().create_task(setting.hub.cordon(machine), name="cordon")
    ask = await steady.next()
    assert isinstance(ask, ipc.CordonAsk)
    steady.send(ipc.CordonAck(machine.id, ask.sequence))
    await dying.next()
    await dying.close()
    successor = await setting.worker()
    seen = await successor.hello(1)
    again = await successor.next()
    assert isinstance(again, ipc.CordonAsk) and again.sequence == ask.sequence and len(seen) == 4
    assert not asking.done()
    successor.send(ipc.CordonAck(machine.id, ask.sequence))
    assert await asking


async def test_a_worker_is_asked_for_a_cordon_only_once_it_has_the_table(setting: Setting, rig: Rig) -> None:
    """What the table says of the machine would lift the cordon that it had acknowledged."""
    await rig.load(an_app())
    for number in range(link_module._SLICE * 3):
        name = AppName(f"app{number}")
        setting.records.apps[name] = App(name, (), ())
    worker = await setting.worker()
    worker.send(ipc.WorkerHello(ipc.PROTOCOL, 0, 1))
    while not (links := setting.hub._links):
        await asyncio.sleep(0)
    links[0].pause_writing()
    asking = asyncio.get_running_loop().create_task(setting.hub.cordon(rig.machine()), name="cordon")
    await asyncio.sleep(0)
    links[0].resume_writing()
    seen = await worker.until(ipc.TableEnd)
    assert not any(isinstance(message, ipc.CordonAsk) for message in seen)
    assert isinstance(await worker.next(), ipc.CordonAsk)
    setting.hub.lift(rig.machine())
    await asking


async def test_a_cordon_that_a_living_worker_does_not_acknowledge_fails(setting: Setting, rig: Rig) -> None:
    link_module.CORDON_TIMEOUT_S, before = 0.05, link_module.CORDON_TIMEOUT_S
    try:
        await rig.load(an_app())
        await setting.worker(0)
        assert not await setting.hub.cordon(rig.machine())
    finally:
        link_module.CORDON_TIMEOUT_S = before


async def test_a_slot_without_any_process_does_not_hold_up_a_cordon(setting: Setting, rig: Rig) -> None:
    await rig.load(an_app())
    for index in (1, 2):
        setting.memory.beat(index, monotonic_ns() - 60 * 10**9)
    assert await setting.hub.cordon(rig.machine())


class Mailbox:
    """A worker's socket for connections, under a path longer than an address takes."""

    def __init__(self, folder: Path, name: str) -> None:
        place = folder / ("d" * 100)
        place.mkdir(exist_ok=True)
        self.path = str(place / name)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(unix_address(str(place), name))

    def receive(self) -> tuple[ipc.Handed, socket.socket]:
        data, (descriptor,), _, _ = socket.recv_fds(self.socket, 1024, 4)
        return ipc.decode_handed(data), socket.socket(fileno=descriptor)

    def is_empty(self) -> bool:
        try:
            self.socket.recv(1024, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False


async def test_a_connection_is_handed_to_one_worker_that_waits_and_before_the_record(
    setting: Setting, rig: Rig, tmp_path: Path
) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    boxes = [Mailbox(tmp_path, f"handed-{slot}.sock") for slot in (0, 1)]
    workers = [await setting.worker(), await setting.worker()]
    for slot, (worker, box) in enumerate(zip(workers, boxes, strict=True)):
        await worker.hello(slot, handed_at=box.path)
        worker.send(ipc.Wake(WEB, machine.id, hint=slot == 0))  # nobody waits at the first one yet
        assert isinstance(await worker.next(), ipc.WakeDone)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as made:
        setting.hub.hand_on(machine, 8080, made)
        setting.hub.set_machine(WEB, machine.record())
        assert isinstance(await workers[1].next(), ipc.MachineSet)
        handed, sock = boxes[1].receive()
        assert (handed.machine, handed.version, handed.internal_port) == (machine.id, machine.row.version, 8080)
        with sock:
            assert sock.getpeername() == server.getsockname()
        assert boxes[0].is_empty()
        machine.row.state = "started"
        setting.hub.set_machine(WEB, machine.record())
        setting.hub.hand_on(machine, 8080, made)
        assert boxes[1].is_empty(), "nobody waits any more"
    for box in boxes:
        box.socket.close()


async def test_a_worker_that_stands_still_holds_up_nobody_who_hands_connections_on(
    setting: Setting, rig: Rig, tmp_path: Path
) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    box = Mailbox(tmp_path, "handed-0.sock")
    worker = await setting.worker()
    await worker.hello(0, handed_at=box.path)
    worker.send(ipc.Wake(WEB, machine.id))
    await worker.next()
    before = len(os.listdir("/proc/self/fd"))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as made:
        for _ in range(2000):
            setting.hub.hand_on(machine, 8080, made)
        box.receive()[1].close()
    assert len(os.listdir("/proc/self/fd")) == before
    box.socket.close()
    setting.hub.hand_on(machine, 8080, worker._writer.get_extra_info("socket"))  # its end is no fault either


async def test_a_worker_whose_mailbox_is_not_there_is_served_without(setting: Setting, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in (str(tmp_path / "nothing.sock"), str(tmp_path / "none" / "x.sock"), "\0", "x" * 5000):
        worker = await setting.worker()
        assert (await worker.hello(0, handed_at=path))[-1] == ipc.TableEnd()
        await worker.close()
        setting.workers.remove(worker)
    while setting.hub.linked:
        await asyncio.sleep(0.001)
    assert len(os.listdir("/proc/self/fd")) == before
