"""decide/nearest.py: which node gets a request, step by step, and why not the others."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.nearest import (
    ANYWHERE,
    HERE,
    MAX_STEPS,
    Ask,
    Here,
    Nothing,
    Peer,
    Site,
    Sites,
    Step,
    Tried,
    Wait,
    Wake,
    next_step,
    why_not,
)
from proxy.decide.peer_health import PeerState
from proxy.decide.region import RegionWish
from proxy.errors import Code
from proxy.model import NodeName, RegionCode, WakeMode

AMS, FRA, IAD, SYD = ORDER = [RegionCode(one) for one in ("ams", "fra", "iad", "syd")]
RANKS = {region: at for at, region in enumerate(ORDER)}
ME = NodeName("a1")
SUSPECT, SILENT, DRAINING = PeerState.SUSPECT, PeerState.SILENT, PeerState.DRAINING


def plan(ask: Ask, own: Site, sites: Sites, rng: random.Random, refusal: Code = Code.AT_HARD_LIMIT) -> list[Step]:
    """The steps of a request that each refuses with this code, till no way is left: then the last is Nothing."""
    tried = Tried(own.node)
    steps: list[Step] = []
    while len(steps) < MAX_STEPS:
        step = next_step(ask, own, sites, rng, tried if steps else None)
        steps.append(step)
        if isinstance(step, Nothing):
            break
        tried.add(step, refusal)
    return steps


def n(name: str) -> NodeName:
    return NodeName(name)


def site(name: str, below_soft: int = 0, **more: object) -> Site:
    """`f1` is a node in fra."""
    region = {"a": AMS, "f": FRA, "i": IAD, "s": SYD}[name[0]]
    return Site(n(name), region, below_soft, **more)  # type: ignore[arg-type]  # fields by name


def sites(*others: Site, mode: WakeMode = WakeMode.FLY) -> Sites:
    made = Sites(AMS, mode)
    for one in others:
        made.put(one)
    made.rank(RANKS)
    return made


def rng() -> random.Random:
    return random.Random(5)


def first(own: Site, *others: Site, ask: Ask = ANYWHERE, mode: WakeMode = WakeMode.FLY) -> Step:
    return next_step(ask, own, sites(*others, mode=mode), rng())


some_counts = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1))
some_states = st.sampled_from(PeerState)
SOFT = {"below_hard": 2}
HARD = {"full": 2}


# --- regions, bands, nodes


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (site("a1", 1), [site("a2", 9), site("f1", 9)], HERE),
        (site("a1", 1, **HARD), [], HERE),
        (site("a1"), [site("a2", 1), site("f1", 9)], Peer(n("a2"))),
        # soft limits push nothing out of a region, but within it to another node
        (site("a1", **SOFT), [site("a2", 1), site("f1", 9)], Peer(n("a2"))),
        (site("a1", **SOFT), [site("a2", **SOFT), site("f1", 9)], HERE),
        (site("a1", **HARD), [site("a2", **SOFT), site("f1", 9)], Peer(n("a2"))),
        # every machine of the region is at its hard limit, or unwell: then the next nearest
        (site("a1", **HARD), [site("a2", failing=1), site("i1", 9), site("f1", **SOFT)], Peer(n("f1"))),
        (site("a1"), [site("a2", 3, state=SILENT), site("f1", 1)], Peer(n("f1"))),
        (site("a1"), [site("a2", 3, state=DRAINING), site("f1", 1)], Peer(n("f1"))),
        (site("a1"), [site("a2", 3, state=SILENT), site("s1", 1)], Peer(n("s1"))),
        (site("a1", 3, state=DRAINING), [site("s1", 1)], Peer(n("s1"))),  # this node drains
    ],
)
def test_the_nearest_region_with_room_serves_and_in_it_bands_then_this_node(
    own: Site, others: list[Site], expected: Step
) -> None:
    step = first(own, *others, ask=Ask(may_wake=False))
    assert step == expected
    assert first(own, *others) == expected


def test_within_a_band_the_draw_is_among_machines() -> None:
    known, chance = sites(site("f1", 1), site("f2", 3), site("f3", **SOFT)), rng()
    drawn = Counter(next_step(ANYWHERE, site("a1"), known, chance) for _ in range(8_000))
    assert drawn.keys() == {Peer(n("f1")), Peer(n("f2"))}
    assert 0.23 < drawn[Peer(n("f1"))] / 8_000 < 0.27


def test_a_node_that_comes_back_gets_its_share_and_all_where_there_is_no_other() -> None:
    known, chance = sites(site("f1", 1, share=0.2), site("i1", 1)), rng()
    drawn = Counter(next_step(ANYWHERE, site("a1"), known, chance) for _ in range(5_000))
    assert drawn.keys() == {Peer(n("f1")), Peer(n("i1"))} and 0.17 < drawn[Peer(n("f1"))] / 5_000 < 0.23
    alone = sites(site("f1", 1, share=0.1), site("i1", startable=1))
    assert {next_step(ANYWHERE, site("a1"), alone, chance) for _ in range(50)} == {Peer(n("f1"))}


def test_regions_nobody_ranked_come_last_and_the_primary_first_among_them() -> None:
    known = Sites(AMS, primary=RegionCode("lab-2"))
    for at, region in enumerate(("lab-1", "lab-2", "syd")):
        known.put(Site(n(f"n{at}"), RegionCode(region), 1))
    known.rank(RANKS)
    assert [region for region, _ in known.groups()] == ["ams", "syd", "lab-2", "lab-1"]


# --- waking


@pytest.mark.parametrize(
    ("mode", "own", "others", "expected"),
    [
        # nothing runs: the nearest that sleeps, whoever starts already before others of its region
        ("fly", site("a1", startable=1), [site("f1", startable=1)], Wake(ME)),
        ("fly", site("a1", startable=1), [site("a2", starting=1)], Wake(n("a2"))),
        ("fly", site("a1"), [site("i1", starting=1), site("f2", startable=3), site("f1", startable=1)], Wake(n("f1"))),
        ("nearest", site("a1"), [site("i1", startable=1), site("f1", startable=1)], Wake(n("f1"))),
        ("race", site("a1", startable=1), [site("f1", startable=1)], Wake(ME)),
        # a farther one runs
        ("fly", site("a1", startable=1), [site("i1", 1)], Peer(n("i1"))),
        ("nearest", site("a1", startable=1), [site("i1", 1)], Wake(ME)),
        ("nearest", site("a1"), [site("i1", 1), site("f1", startable=1)], Wake(n("f1"))),
        ("nearest", site("a1"), [site("i1", 1), site("s1", startable=1)], Peer(n("i1"))),
        ("race", site("a1", startable=1), [site("i1", 1)], Peer(n("i1"), beside=ME)),
        ("race", site("a1"), [site("i1", 1), site("f1", startable=1)], Peer(n("i1"), beside=n("f1"))),
        ("race", site("a1", starting=1), [site("i1", 1)], Peer(n("i1"))),  # it is under way
        ("race", site("a1"), [site("i1", 1), site("s1", startable=1)], Peer(n("i1"))),  # not what is farther
        # the near one is full and has more that sleep
        ("fly", site("a1", full=1, startable=1), [site("i1", 1)], Peer(n("i1"))),
        ("nearest", site("a1", full=1, startable=1), [site("i1", 1)], Wake(ME)),
        ("race", site("a1", full=1, startable=1), [site("i1", 1)], Peer(n("i1"), beside=ME)),
        ("fly", site("a1", full=1, startable=1), [site("i1", full=1)], Wake(ME)),
        # all that run are above their soft limit: another is started beside, in the nearest region that has one
        ("fly", site("a1", startable=1, **SOFT), [site("f1", startable=1)], Here(ME)),
        ("fly", site("a1", **SOFT), [site("s1", startable=1), site("f1", startable=1)], Here(n("f1"))),
        ("fly", site("a1", startable=1, **SOFT), [site("f1", 1)], HERE),  # not all
        ("fly", site("a1", startable=1, **SOFT), [site("f1", starting=1)], Here(ME)),
        ("fly", site("a1", startable=1, starting=1, **SOFT), [], HERE),
        ("nearest", site("a1", startable=1, **SOFT), [site("f1", 1)], Here(ME)),  # its own region is what counts
        ("nearest", site("a1", **SOFT), [site("f1", startable=1)], HERE),
        ("race", site("a1", **SOFT), [site("f1", startable=1)], Here(n("f1"))),
        ("fly", site("a1", 1, startable=1), [], HERE),
    ],
)
def test_what_is_woken_where(mode: str, own: Site, others: list[Site], expected: Step) -> None:
    assert first(own, *others, mode=WakeMode(mode)) == expected


@pytest.mark.parametrize("mode", WakeMode)
def test_a_request_that_may_not_wake_starts_nothing(mode: WakeMode) -> None:
    ask = Ask(may_wake=False)
    assert first(site("a1", startable=1), site("i1", 1), ask=ask, mode=mode) == Peer(n("i1"))
    assert first(site("a1", startable=1, **SOFT), ask=ask, mode=mode) == HERE
    assert first(site("a1", startable=1), site("f1", startable=1), ask=ask, mode=mode) == Nothing(Code.NO_CANDIDATE)


# --- what is asked for


def wish(*names: str, forced: bool = False) -> Ask:
    return Ask(wish=RegionWish(names, forced))


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (wish("syd"), Peer(n("s1"))), (wish("us"), Peer(n("i1"))), (wish("eu"), HERE), (wish("sa"), HERE),
        (wish("fra", "eu"), Peer(n("f1"))), (wish("sa", "us", "any"), Peer(n("i1"))), (wish("any"), HERE),
        (wish("syd", forced=True), Peer(n("s1"))), (wish("sa", forced=True), Nothing(Code.NO_CANDIDATE)),
        (wish("sa", "any", forced=True), HERE),
    ],
)  # fmt: skip
def test_regions_that_are_asked_for_come_in_their_order(ask: Ask, expected: Step) -> None:
    assert first(site("a1", 1), site("f1", 1), site("i1", 1), site("s1", 1), ask=ask) == expected


def test_a_preferred_region_is_woken_before_it_is_left_and_is_left_when_it_is_full() -> None:
    assert first(site("a1", 1), site("s1", startable=1), ask=wish("syd")) == Wake(n("s1"))
    assert first(site("a1", 1), site("s1", **HARD), ask=wish("syd")) == HERE


def test_a_forced_region_is_never_left() -> None:
    own, known = site("a1", 5), sites(site("s1", full=1, startable=1), site("f1", 5))
    steps = plan(wish("syd", forced=True), own, known, rng())
    assert steps == [Wake(n("s1")), Wait(n("s1")), Nothing(Code.NO_CANDIDATE_AFTER_RETRIES)]


def test_a_forced_machine_is_gone_to_where_it_is_whatever_the_load() -> None:
    known = sites(
        site("s1", full=1), site("f1", 3), site("i1", 1, state=SILENT, vias=(n("f1"),)), site("i2", state=SILENT)
    )
    own = site("a1", 5)
    assert plan(Ask(force=n("s1")), own, known, rng()) == [
        Peer(n("s1")), Wake(n("s1")), Wait(n("s1")), Nothing(Code.FORCED_UNREACHED),
    ]  # fmt: skip
    assert plan(Ask(force=ME, may_wake=False), own, known, rng()) == [HERE, Wait(ME), Nothing(Code.FORCED_UNREACHED)]
    assert first(own, *known, ask=Ask(force=n("s1"), force_sleeps=True)) == Wake(n("s1"))
    assert plan(Ask(force=n("i1")), own, known, rng()) == [Peer(n("i1"), n("f1")), Nothing(Code.FORCED_UNREACHED)]
    assert first(own, *known, ask=Ask(force=n("i2"))) == Nothing(Code.FORCED_UNREACHED)
    assert first(own, *known, ask=Ask(force=n("x9"))) == Nothing(Code.FORCED_UNREACHED)


def test_a_preferred_machine_is_gone_to_if_its_node_has_room_and_else_the_nearest() -> None:
    own = site("a1", 5)
    assert first(own, site("s1", **SOFT), ask=Ask(prefer=n("s1"))) == Peer(n("s1"))
    for other in (site("s1", **HARD), site("s1", startable=1), site("s1", 1, state=SILENT)):
        assert first(own, other, ask=Ask(prefer=n("s1"))) == HERE
    assert first(own, ask=Ask(prefer=n("x9"))) == HERE
    assert first(own, site("s1", 1), ask=Ask(prefer=ME)) == HERE


def test_machines_that_are_excluded_do_not_count() -> None:
    """A machine of s1 said `elsewhere`: it was the only one there."""
    elsewhere = Ask(wish=RegionWish(("syd",)), excluded={n("s1"): 1})
    assert first(site("a1", 1), site("s1", 1), ask=elsewhere) == HERE
    assert first(site("a1", 1), site("s1", 2), ask=elsewhere) == Peer(n("s1"))
    assert first(site("a1", 1), site("f1", 1), ask=Ask(excluded={ME: 1})) == Peer(n("f1"))
    assert first(site("a1", full=1), ask=Ask(excluded={ME: 1})) != Wait(ME)


# --- after a refusal


def after(own: Site, known: Sites, *codes: Code, ask: Ask = ANYWHERE) -> list[Step]:
    """The steps of a request that is refused with these codes in turn, and the one after them."""
    tried, steps = Tried(own.node), [next_step(ask, own, known, rng())]
    for code in codes:
        tried.add(steps[-1], code)
        steps.append(next_step(ask, own, known, rng(), tried))
    return steps


def test_a_node_that_is_full_after_all_is_left_for_the_next_and_waited_at_in_the_end() -> None:
    known = sites(site("a2", 1), site("f1", 1))
    full = Code.AT_HARD_LIMIT
    assert after(site("a1"), known, full, full, full) == [
        Peer(n("a2")), Peer(n("f1")), Wait(n("a2")), Wait(n("f1"))
    ]  # fmt: skip


def test_a_node_whose_machine_has_just_stopped_may_be_asked_to_start_it_after_all_that_run() -> None:
    known = sites(site("a2", 1, startable=1), site("f1", 1))
    stopped = Code.RECENTLY_STOPPED
    assert after(site("a1"), known, stopped, stopped) == [Peer(n("a2")), Peer(n("f1")), Wake(n("a2"))]


def test_a_node_that_has_started_a_machine_for_others_is_waited_at_though_nothing_was_known_to_run() -> None:
    known = sites(site("f1", startable=1))
    assert after(site("a1"), known, Code.AT_HARD_LIMIT) == [Wake(n("f1")), Wait(n("f1"))]


def test_a_node_that_cannot_be_reached_is_gone_to_by_a_third_and_no_way_twice() -> None:
    known = sites(site("f1", 1, vias=(ME, n("i1"), n("s1"))), site("f2"))
    steps = after(site("a1"), known, *[Code.PEER_UNREACHED] * 3)
    assert steps == [
        Peer(n("f1")), Peer(n("f1"), n("i1")), Peer(n("f1"), n("s1")), Nothing(Code.NO_CANDIDATE_AFTER_RETRIES)
    ]  # fmt: skip


def test_the_detour_comes_after_all_that_can_be_reached() -> None:
    known = sites(site("f1", 1, state=SILENT, vias=(n("i1"),)), site("i1", 1), site("s1", startable=1))
    steps = after(site("a1"), known, Code.OVERLOADED, Code.WAKE_HELD)
    assert steps == [Peer(n("i1")), Wake(n("s1")), Peer(n("f1"), n("i1"))]
    asleep = sites(site("f1", startable=1, state=SUSPECT, vias=(n("i1"),)))
    assert next_step(ANYWHERE, site("a1"), asleep, rng()) == Wake(n("f1"), n("i1"))


def test_a_third_node_that_cannot_be_reached_either_is_no_way() -> None:
    known = sites(site("f1", 1, vias=(n("f2"), n("i1"))), site("f2", 1, vias=(n("i1"),)))
    tried = Tried(ME)
    for name in ("f1", "f2"):
        tried.add(Peer(n(name)), Code.CONNECT_TIMEOUT)
    assert next_step(ANYWHERE, site("a1"), known, rng(), tried) == Peer(n("f1"), n("i1"))


def test_suspect_and_draining_nodes_are_better_than_nothing() -> None:
    known = sites(site("f1", 1, state=SUSPECT), site("i1", 1, state=DRAINING))
    assert after(site("a1"), known, Code.CONNECT_REFUSED, Code.AT_HARD_LIMIT) == [
        Peer(n("f1")), Peer(n("i1")), Nothing(Code.NO_CANDIDATE_AFTER_RETRIES)
    ]  # fmt: skip
    assert first(site("a1", 1, state=DRAINING), site("f1", state=SILENT)) == HERE


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (site("a1"), [], Code.NO_CANDIDATE),
        (site("a1"), [site("f1", 1, state=SILENT)], Code.PEER_UNREACHED),
        (site("a1"), [site("f1", startable=1, state=SILENT)], Code.PEER_UNREACHED),
        (site("a1", full=1), [site("f1", 1, state=SILENT)], Code.AT_HARD_LIMIT),
        (site("a1", failing=1), [], Code.NO_HEALTHY),
        (site("a1", startable=1), [], Code.NO_CANDIDATE),
    ],
)
def test_the_end_has_a_code_that_says_why(own: Site, others: list[Site], expected: Code) -> None:
    assert first(own, *others, ask=Ask(may_wake=False, may_wait=False)) == Nothing(expected)


def test_it_waits_in_line_rather_than_for_checks_and_here_rather_than_there() -> None:
    assert first(site("a1", failing=1), site("a2", full=1)) == Wait(ME)
    assert first(site("a1"), site("a2", failing=9), site("a3", full=1)) == Wait(n("a3"))
    assert first(site("a1"), site("f1", failing=1), site("i1", full=1)) == Wait(n("f1"))


# --- sites come and go


def test_sites_change_in_place() -> None:
    known = sites(site("f1", 1), site("i1", 1))
    known.put(site("f1", **HARD))
    assert next_step(ANYWHERE, site("a1"), known, rng()) == Peer(n("i1"))
    assert next_step(wish("us", "eu"), site("a1"), known, rng()) == Peer(n("i1"))
    known.put(Site(n("i1"), FRA, 1))  # it has moved
    assert known.get(n("i1")) == Site(n("i1"), FRA, 1) and len(known) == 2
    assert [region for region, _ in known.groups()] == [AMS, FRA]
    assert next_step(wish("us", forced=True), site("a1"), known, rng()) == Nothing(Code.NO_CANDIDATE)
    known.remove(n("i1"))
    known.remove(n("f1"))
    known.remove(n("f1"))
    assert list(known) == [] and known.get(n("f1")) is None
    known.put(site("s1", 1))
    known.put(site("i1", 1))
    known.rank({AMS: 0, SYD: 1, IAD: 2})
    assert next_step(ANYWHERE, site("a1"), known, rng()) == Peer(n("s1"))


def test_wishes_of_anyone_are_not_all_remembered() -> None:
    known = sites(site("f1", 1), site("i1", 1))
    for at in range(500):
        assert next_step(wish(f"x{at}", "us"), site("a1"), known, rng()) == Peer(n("i1"))
    assert len(known._areas) <= 32
    many = wish(*(f"x{at}" for at in range(63)), "us")
    assert next_step(many, site("a1"), known, rng()) == Peer(n("i1"))
    assert many.wish not in known._areas


@given(st.lists(st.tuples(st.sampled_from(["f1", "f2", "i1"]), st.booleans(), some_counts, some_states), max_size=20))
def test_the_counts_are_those_of_the_sites(changes: list[tuple[str, bool, tuple[int, int, int], PeerState]]) -> None:
    known = sites()
    for name, stays, (below_soft, below_hard, startable), state in changes:
        if stays:
            known.put(site(name, below_soft, below_hard=below_hard, startable=startable, state=state))
        else:
            known.remove(n(name))
        left = list(known)
        assert known.with_room == sum(bool(one.below_soft or one.below_hard) for one in left)
        assert known.below_soft == sum(bool(one.below_soft) and one.state is PeerState.HEALTHY for one in left)
        assert known.asleep == sum(bool(one.startable) for one in left)
        assert known.unwell == sum(one.state is not PeerState.HEALTHY for one in left)


# --- properties

counts = st.integers(0, 2)
states = st.sampled_from([PeerState.HEALTHY] * 4 + list(PeerState))
NAMES = ["a2", "a3", "f1", "f2", "i1", "i2", "s1"]


@st.composite
def some_sites(draw: st.DrawFn, well: bool = False) -> tuple[Site, Sites]:
    made = [
        site(
            name, draw(counts), below_hard=draw(counts), full=draw(counts), failing=draw(counts),
            startable=draw(counts), starting=draw(st.integers(0, 1)),
            state=PeerState.HEALTHY if well or name == "a1" else draw(states),
            share=1.0 if well else draw(st.sampled_from([1.0, 1.0, 0.1])),
            vias=tuple(map(n, draw(st.lists(st.sampled_from(NAMES), max_size=2, unique=True)))),
        )
        for name in ["a1", *draw(st.lists(st.sampled_from(NAMES), unique=True))]
    ]  # fmt: skip
    known = sites(*made[1:], mode=draw(st.sampled_from(WakeMode)))
    return made[0], known


wishes = st.one_of(
    st.none(),
    st.builds(
        RegionWish, st.lists(st.sampled_from(["ams", "fra", "iad", "eu", "us", "any", "zz"])).map(tuple), st.booleans()
    ),
)
nodes = st.one_of(st.none(), st.none(), st.sampled_from([ME, *map(n, NAMES), n("x9")]))
asks = st.builds(Ask, wishes, nodes, st.booleans(), nodes, st.none(), st.booleans(), st.booleans())


def at(step: Step) -> NodeName:
    assert not isinstance(step, Nothing)
    return ME if isinstance(step, Here) else step.node


def by_the_rules(own: Site, known: Sites) -> set[Step]:
    """Rules 1 to 3 said plainly, for nodes that are all well: what the first step may be, `beside` left out."""
    everything = [own, *known]
    for region in ORDER:
        here = [one for one in everything if one.region == region]
        for band in ([one for one in here if one.below_soft], [one for one in here if one.below_hard]):
            if own in band:
                return {HERE}
            if band:
                return {Peer(one.node) for one in band}
        sleeping = [one for one in here if one.startable or one.starting]
        if sleeping and known.mode is WakeMode.NEAREST:
            return {Wake(one.node) for one in sleeping}
    for region in ORDER:
        sleeping = [one for one in everything if one.region == region and (one.startable or one.starting)]
        if sleeping:
            return {Wake(one.node) for one in sleeping}
    for region in ORDER:
        there = [one for one in everything if one.region == region and (one.full or one.failing)]
        if there:
            return {Wait(one.node) for one in there}
    return {Nothing(Code.NO_CANDIDATE)}


@given(some_sites(well=True), st.integers(0, 2**32))
def test_the_first_step_is_what_the_rules_say(made: tuple[Site, Sites], seed: int) -> None:
    own, known = made
    step = next_step(ANYWHERE, own, known, random.Random(seed))
    plain = HERE if isinstance(step, Here) else Peer(step.node) if isinstance(step, Peer) else step
    assert plain in by_the_rules(own, known)


@given(some_sites(), asks, st.lists(st.sampled_from(sorted(Code)), min_size=60, max_size=60), st.integers(0, 2**32))
def test_every_way_ends_none_is_gone_twice_and_what_is_forced_is_never_left(
    made: tuple[Site, Sites], ask: Ask, codes: list[Code], seed: int
) -> None:
    (own, known), chance = made, random.Random(seed)
    tried, gone = Tried(ME), set()
    step = next_step(ask, own, known, chance)
    for code in codes:
        if isinstance(step, Nothing):
            break
        way = (type(step), at(step), getattr(step, "via", None))
        assert way not in gone
        gone.add(way)
        there = own if at(step) == ME else known.get(at(step))
        assert there is not None
        if ask.force is not None:
            assert there.node == ask.force
        else:
            if isinstance(step, Here | Peer):
                assert there.below_soft or there.below_hard
            if isinstance(step, Wake):
                assert there.startable or there.starting
            if ask.wish is not None and ask.wish.is_forced and there.node != ask.prefer:
                assert ask.wish.rank(there.region) is not None
            if there.state is SILENT:
                assert getattr(step, "via", None) in there.vias
        if not ask.may_wake:
            assert not isinstance(step, Wake) and getattr(step, "beside", None) is None
        assert ask.may_wait or not isinstance(step, Wait)
        tried.add(step, code)
        step = next_step(ask, own, known, chance, tried)
    assert isinstance(step, Nothing)


@given(some_sites(), asks)
def test_plans_are_bounded_and_each_site_that_is_not_next_has_a_reason(made: tuple[Site, Sites], ask: Ask) -> None:
    own, known = made
    steps = plan(ask, own, known, rng())
    assert len(steps) == MAX_STEPS or isinstance(steps[-1], Nothing)
    told = why_not(ask, own, known)
    assert [one for one, _ in told] == [own, *known]
    for one, why in told:
        if not why:
            assert one.state is not PeerState.SILENT and one.share == 1.0


# --- in words


def reasons(own: Site, *others: Site, ask: Ask = ANYWHERE, mode: WakeMode = WakeMode.FLY) -> dict[str, str]:
    return {one.node: why for one, why in why_not(ask, own, sites(*others, mode=mode))}


def test_each_site_is_told_why_it_does_not_get_the_request() -> None:
    told = reasons(
        site("a1", full=2), site("a2", failing=1), site("a3"), site("f1", 2), site("f2", 1), site("f3", **SOFT),
        site("f4", 1, share=0.2), site("i1", 1), site("s1", 1, state=SILENT),
    )  # fmt: skip
    assert told == {
        "a1": "all that run (2) are at their hard limit",
        "a2": "the checks of all that run fail",
        "a3": "it has no machine that runs or may be started",
        "f1": "", "f2": "",
        "f3": "its machines are above their soft limit, others of its region are not",
        "f4": "it has just come back, and takes 20% of its requests",
        "i1": "fra comes first and has room",
        "s1": "the node is silent",
    }  # fmt: skip


def test_what_was_asked_tried_or_woken_is_among_the_reasons() -> None:
    assert reasons(site("a1", 1), site("a2", 1)) == {"a1": "", "a2": "this node comes before others of its region"}
    assert reasons(site("a1", 1), site("i1", 1), ask=wish("us", forced=True)) == {
        "a1": "ams is not among the regions asked for", "i1": "",
    }  # fmt: skip
    assert reasons(site("a1", startable=1), site("f1", startable=1), site("i1", full=1)) == {
        "a1": "", "f1": "none runs below its hard limit, and a1 comes first to be woken",
        "i1": "all that run (1) are at their hard limit",
    }  # fmt: skip
    assert reasons(site("a1", startable=1), site("f1", 1), mode=WakeMode.NEAREST)["f1"] == (
        "another is to be woken, which is nearer"
    )
    assert reasons(site("a1", 1), site("f1", 1), ask=Ask(force=n("f1")))["a1"] == (
        "another node has the machine that is forced"
    )
    assert (
        reasons(site("a1", 1), site("f1", 1), ask=Ask(prefer=n("f1")))["a1"] == "f1 has the machine that is preferred"
    )
    assert reasons(site("a1", 1), site("f1", 1), ask=Ask(excluded={ME: 1}))["a1"] == (
        "its machines that run are not to get this request"
    )
    tried = Tried(ME)
    tried.add(Peer(n("f1")), Code.AT_HARD_LIMIT)
    told = why_not(ANYWHERE, site("a1"), sites(site("f1", 1), site("i1", 1)), tried)
    assert [why for _, why in told][1:] == ["it was tried: WB01", ""]
