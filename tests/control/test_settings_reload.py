"""What config.toml says of an app is in the record that workers are sent, and in a new one after a reload."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy import ipc
from proxy.config import Host, load
from proxy.control.plan import NodePlan, plan_of
from proxy.model import AccessRules, App, AppLimits, AppName, Balance, StickyCookie, WakeRules
from tests.control.rig import Rig

SHOP = AppName("shop")
APP = '[[apps]]\nname = "shop"\ndriver = "static"\nmachines = [{ id = "m1", address = "127.0.0.1:9" }]\n'
SETTINGS = """\
balance = "app-load"
sticky = true
queue_timeout = "1s"
max_queued = 3
organization = "acme"
replay_sources = ["other"]
keep_bodies = true
replay_memory = 1
replay_spool = 2
access = { deny = ["192.0.2.0/24"], max_body = 5 }
wake_rules = { ignore_methods = ["HEAD"], waiting_page = true }
"""


def plan_from(folder: Path, text: str) -> NodePlan:
    (folder / "config.toml").write_text(text)
    result = load(folder / "config.toml", Host("host", 0, 1))
    assert result.config is not None, [str(fault) for fault in result.errors]
    return plan_of(result.config)


def settings_of(app: App) -> tuple[object, ...]:
    return (
        app.balance, app.sticky, app.access, app.wake_rules, app.organization, app.replay_sources, app.keeps_bodies,
        app.limits,
    )  # fmt: skip


async def test_after_a_reload_workers_are_sent_the_new_settings_and_after_another_the_defaults(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[bytes] = []
    monkeypatch.setattr(rig.hub, "set_app", frames.append)

    def last_sent() -> App:
        (body,) = ipc.FrameReader().feed(frames[-1])
        message = ipc.decode_to_worker(body)
        assert isinstance(message, ipc.AppSet)
        return message.app

    await rig.apps.load(plan_from(tmp_path, APP), True)
    assert (await rig.apps.apply(plan_from(tmp_path, APP + SETTINGS))).changed == (SHOP,)
    changed = settings_of(last_sent())
    assert (await rig.apps.apply(plan_from(tmp_path, APP))).changed == (SHOP,)
    back = settings_of(last_sent())
    assert len(frames) == 2
    assert changed == (
        Balance.APP_LOAD,
        StickyCookie(),
        AccessRules(deny=("192.0.2.0/24",), max_body_bytes=5),
        WakeRules(ignore_methods=("HEAD",), waiting_page=True),
        "acme",
        ("other",),
        True,
        AppLimits(queue_timeout_s=1.0, max_queued=3, replay_memory_bytes=1, replay_spool_bytes=2),
    )
    assert back == (Balance.FLY, None, AccessRules(), WakeRules(), "personal", (), False, AppLimits())
