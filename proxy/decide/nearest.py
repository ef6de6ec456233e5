"""Which node gets a request: the next step of its way, of an app whose machines are at several nodes.

A `Site` is what is known of an app's machines at one node, up to half a second old for nodes other than this one; the
node that gets the request decides last, and may refuse. So there is always a next step, until each way was gone once
(`Tried`). The rules, of Fly's where Fly has any (spec routing §5.1, §3; machines §3):

    1. Regions that the request asks for come in its order, area by area; else all regions are one area.
    2. In an area the nearest region with a machine below its hard limit serves: a soft limit moves nothing out of a
       region. In a region, machines below their soft limit come first, then this node's, then a draw among machines.
    3. Where none runs that can take it, the nearest that sleeps is woken. WakeMode says how near goes before running.
    4. Then come nodes that cannot be reached, by way of a third; those that requests failed to reach lately, once more;
       and those that drain.
    5. Then it waits at the nearest: in line at a hard limit, or for checks to pass.

Which machine of a node it is, is that node's to choose (balance.py, wake.py). With room here and nothing asked for, all
of this is one comparison; else the cost grows with the sites of the app, not with the fleet.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from proxy.decide.peer_health import PeerState, takes
from proxy.decide.region import RegionWish
from proxy.errors import Code
from proxy.model import NodeName, RegionCode, WakeMode


class Site(msgspec.Struct, frozen=True, gc=False):
    """An app's machines at a node that have a service, by how they stand. `gc=False`: it holds no cycle."""

    node: NodeName
    region: RegionCode
    below_soft: int = 0  # run, and their checks pass; of those whose load is not known yet, all
    below_hard: int = 0  # above the soft limit
    full: int = 0  # at the hard limit
    failing: int = 0  # run, and their checks do not pass
    startable: int = 0  # sleep, and nothing holds them back
    starting: int = 0
    state: PeerState = PeerState.HEALTHY
    share: float = 1.0  # of the requests that it would get (peer_health)
    vias: tuple[NodeName, ...] = ()  # healthy nodes that reach it, best first (latency.LatencyTable.detours)

    @property
    def running(self) -> int:
        """Those that might get a request."""
        return self.below_soft + self.below_hard + self.full


class Ask(msgspec.Struct, frozen=True):
    """What a request wants of the choice. Most want nothing: ANYWHERE."""

    wish: RegionWish | None = None
    force: NodeName | None = None  # where the machine is that it forces; no other will do
    force_sleeps: bool = False  # that machine does not run
    prefer: NodeName | None = None  # where the machine is, and runs, that it would like
    excluded: Mapping[NodeName, int] | None = None  # how many that run there it may not get (tried, `elsewhere`)
    may_wake: bool = True  # autostart is on, and no rule keeps this request from starting something
    may_wait: bool = True


ANYWHERE: Final = Ask()


# --- steps


class Here(msgspec.Struct, frozen=True):
    """A machine of this node that runs."""

    beside: NodeName | None = None  # and one there is started, for which nobody waits


class Peer(msgspec.Struct, frozen=True):
    """A machine of another node that runs."""

    node: NodeName
    via: NodeName | None = None  # the node that is asked to send it on
    beside: NodeName | None = None


class Wake(msgspec.Struct, frozen=True):
    """A machine of a node, of this one perhaps, is started, and the request waits for it there."""

    node: NodeName
    via: NodeName | None = None


class Wait(msgspec.Struct, frozen=True):
    """It stands in line at a node, or waits there for a machine whose checks pass."""

    node: NodeName


class Nothing(msgspec.Struct, frozen=True):
    """There is no way left."""

    code: Code


Step = Here | Peer | Wake | Wait | Nothing

HERE: Final = Here()
MAX_STEPS: Final = 12  # of one request


# --- what came of earlier steps

_SERVE, _WAKE, _WAIT, _DETOUR = 1, 2, 4, 8
_DIRECT: Final = _SERVE | _WAKE | _WAIT
_ALL: Final = _DIRECT | _DETOUR
_UNREACHED: Final = frozenset(
    {Code.PEER_UNREACHED, Code.CONNECT_REFUSED, Code.CONNECT_RESET, Code.CONNECT_TIMEOUT, Code.CONNECT_IO,
     Code.REQUEST_UNFINISHED}
)  # fmt: skip
# After these the node may yet start a machine, or have the request wait; after all others it had better be left alone.
_BUSY: Final = frozenset({Code.AT_HARD_LIMIT, Code.NO_HEALTHY, Code.RECENTLY_STOPPED, Code.MACHINE_GONE})
_RUNS_THOUGH: Final = frozenset({Code.AT_HARD_LIMIT, Code.NO_HEALTHY})
_NOT_STARTED: Final = frozenset(
    {Code.AT_HARD_LIMIT, Code.NO_HEALTHY, Code.WAKE_HELD, Code.START_FAILED, Code.NOT_STARTABLE, Code.WAKE_TIMEOUT,
     Code.TOO_MANY_WAITERS, Code.START_CANCELLED}
)  # fmt: skip


class Tried:
    """The steps that a request has taken in vain, and why. Each bars at least itself, so that they come to an end."""

    __slots__ = ("_barred", "_own", "_vias", "codes")

    def __init__(self, own: NodeName) -> None:
        self._own = own
        self._barred: dict[NodeName, int] = {}
        self._vias: set[tuple[NodeName, NodeName]] = set()  # node, by way of
        self.codes: dict[NodeName, Code] = {}  # the last, by node

    def add(self, step: Step, code: Code) -> None:
        """A step ended with this code."""
        if isinstance(step, Nothing):
            return
        node = self._own if isinstance(step, Here) else step.node
        self.codes[node] = code
        if isinstance(step, (Peer, Wake)) and step.via is not None:
            self._vias.add((node, step.via))
            return
        if code in _UNREACHED and node != self._own:
            bars = _DIRECT
        elif isinstance(step, (Here, Peer)):
            # A machine of our own that could not be connected to is no reason to give the node up.
            bars = _SERVE if code in _BUSY or node == self._own else _ALL
        elif isinstance(step, Wake):
            bars = _SERVE | _WAKE | (0 if code in _NOT_STARTED else _ALL)
        else:
            bars = _ALL
        self._barred[node] = self._barred.get(node, 0) | bars

    def bars(self, node: NodeName, what: int) -> bool:
        return self._barred.get(node, 0) & what != 0

    def is_unreached(self, node: NodeName) -> bool:
        return self._barred.get(node, 0) & _ALL == _DIRECT

    def has_gone(self, node: NodeName, via: NodeName) -> bool:
        return (node, via) in self._vias

    def __len__(self) -> int:
        return len(self.codes)


# --- sites

_AREAS_MAX: Final = 32  # wishes that are remembered, of an app
_WISH_MAX: Final = 8  # names in one of them

Group = tuple[RegionCode, dict[NodeName, Site]]


class Sites:
    """An app's sites at other nodes, for one service, by region and nearest first.

    Changed in place as nodes publish, which costs the same however many there are; regions are sorted again only when
    another order of theirs, or another region, has come. The counts save a choice from looking for what is nowhere.
    """

    __slots__ = ("_areas", "_groups", "_nodes", "_primary", "_ranks", "_region", "_regions", "asleep", "below_soft",
        "mode", "unwell", "with_room")  # fmt: skip

    def __init__(self, region: RegionCode, mode: WakeMode = WakeMode.FLY, primary: RegionCode | None = None) -> None:
        """`region`: this node's. `primary`: of regions that nobody has ranked it comes first; else it changes nothing
        here (it is autostop.py that keeps machines running there)."""
        self.mode = mode
        self._region = region
        self._primary = primary
        self._ranks: Mapping[RegionCode, int] = {}
        self._regions: dict[RegionCode, dict[NodeName, Site]] = {region: {}}
        self._nodes: dict[NodeName, RegionCode] = {}
        self._groups: list[Group] | None = None
        self._areas: dict[RegionWish, list[list[Group]]] = {}  # as long as the groups are these
        self.with_room = 0  # sites with machines below their hard limit
        self.below_soft = 0  # sites that are well, with machines below their soft limit
        self.asleep = 0  # sites with machines that could be started, or are starting
        self.unwell = 0  # sites of nodes that are not healthy

    def put(self, site: Site) -> None:
        """A site, new or changed."""
        was = self._nodes.get(site.node)
        if was is not None and was != site.region:
            self.remove(site.node)
        group = self._regions.get(site.region)
        if group is None:
            group = self._regions[site.region] = {}
            self._groups = None
        if (old := group.get(site.node)) is not None:
            self._count(old, -1)
        group[site.node] = site
        self._nodes[site.node] = site.region
        self._count(site, 1)

    def _count(self, site: Site, by: int) -> None:
        if site.below_soft or site.below_hard:
            self.with_room += by
            if site.below_soft and site.state is PeerState.HEALTHY:
                self.below_soft += by
        if site.startable or site.starting:
            self.asleep += by
        if site.state is not PeerState.HEALTHY:
            self.unwell += by

    def remove(self, node: NodeName) -> None:
        region = self._nodes.pop(node, None)
        if region is None:
            return
        self._count(self._regions[region].pop(node), -1)
        if not self._regions[region] and region != self._region:
            del self._regions[region]
            self._groups = None

    def get(self, node: NodeName) -> Site | None:
        region = self._nodes.get(node)
        return None if region is None else self._regions[region][node]

    def rank(self, ranks: Mapping[RegionCode, int]) -> None:
        """The order of regions is another, in another mapping; 0 = the nearest."""
        if ranks is not self._ranks:
            self._ranks = ranks
            self._groups = None

    def groups(self) -> list[Group]:
        """This node's region first, even if there is no other node in it."""
        if self._groups is None:
            self._areas.clear()
            ranks, last = self._ranks, len(self._ranks)
            order = sorted(
                self._regions,
                key=lambda one: (one != self._region, ranks.get(one, last), one != self._primary, one),
            )
            self._groups = [(region, self._regions[region]) for region in order]
        return self._groups

    def areas(self, wish: RegionWish) -> list[list[Group]]:
        """The regions of a wish, in its order; inside an area the nearest first.

        Remembered, since 35 regions cost 25 µs; anyone may wish for anything, so not much is.
        """
        groups = self.groups()
        known = self._areas.get(wish)
        if known is None:
            areas: dict[int, list[Group]] = {}
            for rank, group in zip(wish.ranks([region for region, _ in groups]), groups, strict=True):
                if rank is not None:
                    areas.setdefault(rank, []).append(group)
            known = [areas[rank] for rank in sorted(areas)]
            if len(self._areas) >= _AREAS_MAX:
                self._areas.clear()
            if len(wish.names) <= _WISH_MAX:
                self._areas[wish] = known
        return known

    def __iter__(self) -> Iterator[Site]:
        for _, sites in self.groups():
            yield from sites.values()

    def __len__(self) -> int:
        return len(self._nodes)


# --- the choice


def next_step(ask: Ask, own: Site, sites: Sites, rng: random.Random, tried: Tried | None = None) -> Step:
    """The next step of a request. `own`: this node's machines as they stand now; `tried`: None at first."""
    if own.below_soft and ask is ANYWHERE and tried is None and own.state is PeerState.HEALTHY:
        return HERE
    return _Search(ask, own, sites, rng, tried).step()


class _Search:
    """One choice. Areas are lists of groups, nearest first."""

    __slots__ = ("_ask", "_draws", "_has_declined", "_own", "_rng", "_sites", "_tried")

    def __init__(
        self, ask: Ask, own: Site, sites: Sites, rng: random.Random, tried: Tried | None, draws: bool = True
    ) -> None:
        """`draws`: whether shares count."""
        self._ask = ask
        self._own = own
        self._sites = sites
        self._rng = rng
        self._tried = tried
        self._draws = draws
        self._has_declined = False

    def step(self) -> Step:
        ask = self._ask
        if ask.force is not None:
            return self._forced(ask.force)
        if ask.prefer is not None and (preferred := self._preferred(ask.prefer)) is not None:
            return preferred
        areas = self.areas()
        for area in areas:
            if (step := self._near(area)) is not None:
                return step
        if (step := self._last_resort(areas)) is not None:
            return step
        if ask.may_wait:
            for area in areas:
                for region, sites in area:
                    if (node := self._line(region, sites)) is not None:
                        return Wait(node)
        return Nothing(self._reason(areas))

    def areas(self) -> list[list[Group]]:
        """What is asked for, in its order; all, if nothing is."""
        wish = self._ask.wish
        return [self._sites.groups()] if wish is None else self._sites.areas(wish)

    # --- machines that run, and those that sleep

    def _near(self, area: list[Group]) -> Step | None:
        """At nodes that are well."""
        own, known = self._own, self._sites
        wakes = self._ask.may_wake and bool(known.asleep or own.startable or own.starting)
        if not (wakes or known.with_room or own.below_soft or own.below_hard):
            return None
        if wakes and not (known.with_room or own.below_soft or own.below_hard):
            return self._wake(area)
        wakes_nearest = wakes and known.mode is WakeMode.NEAREST
        for at, (region, sites) in enumerate(area):
            if (site := self._serving(region, sites, PeerState.HEALTHY, self._draws)) is not None:
                return self._go(site, area, at)
            if wakes_nearest and (site := self._sleeping(region, sites, PeerState.HEALTHY)) is not None:
                return Wake(site.node)
        if self._has_declined:  # no other can take it: a node that has just come back is better than a cold start
            for at, (region, sites) in enumerate(area):
                if (site := self._serving(region, sites, PeerState.HEALTHY, False)) is not None:
                    return self._go(site, area, at)
        return self._wake(area) if wakes else None

    def _wake(self, area: list[Group], state: PeerState = PeerState.HEALTHY) -> Step | None:
        for region, sites in area:
            if (site := self._sleeping(region, sites, state)) is not None:
                return Wake(site.node)
        return None

    def _last_resort(self, areas: list[list[Group]]) -> Step | None:
        """At nodes that are not well, if there are such: by a third node, once more, and though they drain."""
        own, known = self._own, self._sites
        if self._tried or known.unwell:
            for area in areas:
                if (step := self._detour(area)) is not None:
                    return step
        if known.unwell or own.state is not PeerState.HEALTHY:
            for state in (PeerState.SUSPECT, PeerState.DRAINING):
                for area in areas:
                    if (step := self._once_more(area, state)) is not None:
                        return step
        return None

    def _once_more(self, area: list[Group], state: PeerState) -> Step | None:
        for region, sites in area:
            if (site := self._serving(region, sites, state, False)) is not None:
                return HERE if site is self._own else Peer(site.node)
        return self._wake(area, state) if self._ask.may_wake else None

    def _serving(self, region: RegionCode, sites: dict[NodeName, Site], state: PeerState, draws: bool) -> Site | None:
        """The site in a region that has room, or None.

        The draw is among machines: one of ten gets what one of ten should, however they are spread over nodes.
        """
        own, best, is_best_below = self._own, None, False
        if region == own.region and (own.below_soft or own.below_hard) and own.state is state and self._may_serve(own):
            if own.below_soft:
                return own
            best = own
        count = 0
        for site in sites.values():
            below = site.below_soft
            if below == 0 and (is_best_below or best is own or site.below_hard == 0):
                continue
            if site.state is not state or not self._may_serve(site):
                continue
            if draws and site.share < 1.0 and not takes(site.share, self._rng):
                self._has_declined = True
                continue
            if below and not is_best_below:
                best, is_best_below, count = site, True, below
                continue
            machines = below or site.below_hard
            count += machines
            if best is None or self._rng.random() * count < machines:
                best = site
        return best

    def _may_serve(self, site: Site) -> bool:
        tried, excluded = self._tried, self._ask.excluded
        if tried is not None and tried.bars(site.node, _SERVE):
            return False
        return excluded is None or excluded.get(site.node, 0) < site.running

    def _sleeping(self, region: RegionCode, sites: dict[NodeName, Site], state: PeerState) -> Site | None:
        """The site in a region that is to start a machine: one that does already, then this node, then by name.

        No draw: requests that come at once, to whichever node, are to agree on one machine.
        """
        able = [site for site in sites.values() if self._may_wake(site, state)]
        own = self._own
        if region == own.region and self._may_wake(own, state):
            able.append(own)
        return min(able, key=lambda one: (not one.starting, one is not own, one.node)) if able else None

    def _may_wake(self, site: Site, state: PeerState) -> bool:
        if not (site.startable or site.starting) or site.state is not state:
            return False
        return self._tried is None or not self._tried.bars(site.node, _WAKE)

    def _go(self, site: Site, area: list[Group], at: int) -> Step:
        beside = self._beside(site, area, at) if self._ask.may_wake else None
        if site is self._own:
            return HERE if beside is None else Here(beside)
        return Peer(site.node, None, beside)

    def _beside(self, serving: Site, area: list[Group], at: int) -> NodeName | None:
        """Where one more is started while `serving` has the request. None also where one is starting already."""
        own, known, mode = self._own, self._sites, self._sites.mode
        if not (known.asleep or own.startable or own.starting):
            return None
        if mode is WakeMode.RACE:
            for region, sites in area[:at]:
                if (nearer := self._sleeping(region, sites, PeerState.HEALTHY)) is not None:
                    return None if nearer.starting else nearer.node
        if serving.below_soft:
            return None
        if mode is WakeMode.NEAREST:
            area = area[at : at + 1]
        elif known.below_soft or own.below_soft:
            return None  # not all that run are above their soft limit (spec machines §3)
        for region, sites in area:
            if (another := self._sleeping(region, sites, PeerState.HEALTHY)) is not None:
                return None if another.starting else another.node
        return None

    # --- by a third node

    def _detour(self, area: list[Group]) -> Step | None:
        for wakes in (False, True):
            for _, sites in area:
                for site in sites.values():
                    if site.vias and (step := self._around(site, wakes)) is not None:
                        return step
        return None

    def _around(self, site: Site, wakes: bool) -> Step | None:
        """By way of another, to a node that we do not reach."""
        tried = self._tried
        is_cut = site.state in (PeerState.SUSPECT, PeerState.SILENT)
        if not is_cut and (tried is None or not tried.is_unreached(site.node)):
            return None
        if tried is not None and tried.bars(site.node, _DETOUR):
            return None
        if wakes:
            can = self._ask.may_wake and (site.startable or site.starting)
        else:
            left = site.running - (self._ask.excluded or {}).get(site.node, 0)
            can = (site.below_soft or site.below_hard) and left > 0
        via = self._way(site) if can else None
        if via is None:
            return None
        return Wake(site.node, via) if wakes else Peer(site.node, via)

    def _way(self, site: Site) -> NodeName | None:
        tried, own = self._tried, self._own.node
        for via in site.vias:
            if via not in (own, site.node) and (
                tried is None or not (tried.has_gone(site.node, via) or tried.is_unreached(via))
            ):
                return via
        return None

    # --- a machine that is named

    def _forced(self, node: NodeName) -> Step:
        """There, running or woken or waited for; by another way if need be; or nowhere."""
        site = self._own if node == self._own.node else self._sites.get(node)
        if site is None:
            return Nothing(Code.FORCED_UNREACHED)
        ask, tried = self._ask, self._tried
        ways: list[tuple[int, Step]] = []
        if not ask.force_sleeps:
            ways.append((_SERVE, HERE if site is self._own else Peer(node)))
        if ask.may_wake:
            ways.append((_WAKE, Wake(node)))
        if ask.may_wait:
            ways.append((_WAIT, Wait(node)))
        if site.state is not PeerState.SILENT:
            for what, step in ways:
                if tried is None or not tried.bars(node, what):
                    return step
        is_cut = site.state is PeerState.SILENT or (tried is not None and tried.is_unreached(node))
        via = self._way(site) if is_cut else None
        if via is not None and (ask.may_wake or not ask.force_sleeps):
            return Wake(node, via) if ask.force_sleeps else Peer(node, via)
        return Nothing(Code.FORCED_UNREACHED)

    def _preferred(self, node: NodeName) -> Step | None:
        """There if it has room; shares do not count, for it is asked for."""
        site = self._own if node == self._own.node else self._sites.get(node)
        if site is None or not (site.below_soft or site.below_hard) or site.state is not PeerState.HEALTHY:
            return None
        if not self._may_serve(site):
            return None
        return HERE if site is self._own else Peer(node)

    # --- the end

    def _line(self, region: RegionCode, sites: dict[NodeName, Site]) -> NodeName | None:
        """Where to stand in line in a region: at a hard limit rather than before checks that fail."""
        own = self._own
        if region == own.region and self._may_wait(own):
            return own.node
        best, count, is_full = None, 0, False
        for site in sites.values():
            if site.state is not PeerState.HEALTHY or not self._may_wait(site) or (is_full and not site.running):
                continue
            machines = site.running or site.failing or 1
            if site.running and not is_full:
                best, count, is_full = site, machines, True
                continue
            count += machines
            if best is None or self._rng.random() * count < machines:
                best = site
        return None if best is None else best.node

    def _may_wait(self, site: Site) -> bool:
        tried, excluded = self._tried, self._ask.excluded
        if tried is not None:
            if tried.bars(site.node, _WAIT):
                return False
            if tried.codes.get(site.node) in _RUNS_THOUGH:
                return True  # whatever was known of it
        left = site.running + site.failing
        return left > (0 if excluded is None else excluded.get(site.node, 0))

    def _reason(self, areas: list[list[Group]]) -> Code:
        if self._tried:
            return Code.NO_CANDIDATE_AFTER_RETRIES
        asked = [site for area in areas for _, sites in area for site in sites.values()]
        if any(region == self._own.region for area in areas for region, _ in area):
            asked.append(self._own)
        having = [site for site in asked if site.running or site.failing or site.startable or site.starting]
        well = [site for site in having if site.state is PeerState.HEALTHY]
        if having and not well:
            return Code.PEER_UNREACHED
        if any(site.full for site in well):
            return Code.AT_HARD_LIMIT
        return Code.NO_HEALTHY if any(site.failing for site in well) else Code.NO_CANDIDATE

    # --- in words

    def why_not(self) -> list[tuple[Site, str]]:
        step = self.step()
        node = self._own.node if isinstance(step, Here) else None if isinstance(step, Nothing) else step.node
        chosen = self._own if node == self._own.node else self._sites.get(node) if node is not None else None
        asked = {region for area in self.areas() for region, _ in area}
        return [(site, self._why_not(site, step, chosen, asked)) for site in (self._own, *self._sites)]

    def _why_not(self, site: Site, step: Step, chosen: Site | None, asked: set[RegionCode]) -> str:
        returns = "" if site.share >= 1.0 else f"it has just come back, and takes {site.share:.0%} of its requests"
        if site is chosen:
            return returns
        if self._ask.force is not None:
            return "another node has the machine that is forced"
        if site.region not in asked:
            return f"{site.region} is not among the regions asked for"
        if self._tried is not None and site.node in self._tried.codes:
            return f"it was tried: {self._tried.codes[site.node].value}"
        if site.state is not PeerState.HEALTHY:
            return f"the node is {site.state.value}"
        if not isinstance(step, (Here, Peer)) or chosen is None or not (site.below_soft or site.below_hard):
            return self._why_no_room(site, step)
        if not self._may_serve(site):
            return "its machines that run are not to get this request"
        if chosen.node == self._ask.prefer:
            return f"{chosen.node} has the machine that is preferred"
        if site.region != chosen.region:
            return f"{chosen.region} comes first and has room"
        if chosen.below_soft and not site.below_soft:
            return "its machines are above their soft limit, others of its region are not"
        return "this node comes before others of its region" if chosen is self._own else returns

    def _why_no_room(self, site: Site, step: Step) -> str:
        if site.below_soft or site.below_hard:
            return "another is to be woken, which is nearer"
        if site.startable or site.starting:
            if isinstance(step, Wake):
                return f"none runs below its hard limit, and {step.node} comes first to be woken"
            return "none runs below its hard limit; one could be started"
        if site.full:
            return f"all that run ({site.full}) are at their hard limit"
        return "the checks of all that run fail" if site.failing else "it has no machine that runs or may be started"


def why_not(ask: Ask, own: Site, sites: Sites, tried: Tried | None = None) -> list[tuple[Site, str]]:
    """Each site, this node's first and then nearest first, with why it does not get the request next.

    Empty for the one that gets it, and for those with which it is drawn. Shares are told, not drawn.
    """
    return _Search(ask, own, sites, random.Random(0), tried, draws=False).why_not()
