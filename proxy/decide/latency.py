"""How far other nodes and regions are in time: estimates from probes, and the regions nearest first.

    probes of this node --add--> Pair, one a node --own_row--> published
    rows of other nodes --take_row--> LatencyTable --rtt, order--> where requests go (nearest.py)

Only probes measure: what the kernel knows of a live connection (TCP_INFO) may be a relay's distance. Nothing here asks
the time or sends anything; `now` is monotonic seconds, times are round trips in seconds.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from proxy.decide.places import Places
from proxy.model import NodeName, RegionCode

MAX_RTT_S: Final = 10.0  # more is no distance on Earth, but something that stands still
MAX_NODES: Final = 512
MAX_REGIONS: Final = 64

WINDOW: Final = 5  # samples whose median counts: two spikes among them move nothing
WEIGHT: Final = 0.6  # of a new median: a lasting change shows to 60 % at the third sample, to 94 % at the fifth
JITTER_WEIGHT: Final = 0.25  # as of RTTVAR, RFC 6298 §2
PAIR_TTL_S: Final = 10.0  # without a sample; probes come every second or so
ROW_TTL_S: Final = 15.0
REMEMBERED_S: Final = 600.0  # a time that was measured is a better guess than one by distance

MARGIN_S: Final = 0.002
MARGIN: Final = 0.1  # of the longer of two times
HOLD_S: Final = 3.0  # with ~5 s for a pair to show a change: 10 s in all

# Light in fibre (index 1.468) takes 4.9 µs for a kilometre, a round trip 9.8. Ways are longer than the great circle:
# 1.3 times by the shortest conduits, 2.1 as seen on the Internet (Bozkurt et al., "Dissecting Latency in the Internet's
# Fiber Infrastructure", 2018); between data centres, which is what regions are, we take it for 1.5.
FACTOR_S_KM: Final = 0.000_015
FACTOR_VOTES: Final = 3  # of the figure above, beside what was measured: one pair alone does not set the scale
FIT_S: Final = 30.0
SHORTEST_KM: Final = 100.0  # nearer ones tell of equipment, not of distance
LEAST_GUESS_S: Final = 0.001
FARTHEST_S: Final = 20_015 * FACTOR_S_KM  # of a region nobody has placed: as far as Earth goes


class LatencyError(ValueError):
    """A measured or published time that cannot be one, or from someone who may not say it."""


def _checked(rtt_s: float) -> float:
    # bool is an int; NaN fails both comparisons
    if isinstance(rtt_s, bool) or not isinstance(rtt_s, (int, float)) or not 0.0 < rtt_s <= MAX_RTT_S:
        raise LatencyError(f"round trip: expected more than 0 and up to {MAX_RTT_S:g} s, saw {str(rtt_s)[:40]}")
    return float(rtt_s)


def _median(values: Iterable[float]) -> float:
    """Of an even number the lower middle: a first spike beside one good sample is not believed."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


def margin_s(rtt_s: float) -> float:
    """By how much another time has to differ from this one to make a difference."""
    return max(MARGIN_S, MARGIN * rtt_s)


class Pair:
    """The round trip to one node. `add` measures; a gap of more than 10 s begins anew."""

    __slots__ = ("_at", "_window", "count", "jitter_s", "value_s")

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW)
        self.value_s = 0.0  # the estimate, whatever its age; 0 before the first sample
        self._at = -math.inf
        self.jitter_s = 0.0  # mean deviation of samples from the estimate
        self.count = 0  # samples, since the last gap

    def add(self, rtt_s: float, now: float = 0.0) -> None:
        """A probe was answered after `rtt_s`. Without `now` the estimate has no age. Raises LatencyError."""
        rtt_s = _checked(rtt_s)
        if not self.is_fresh(now):
            self._window.clear()
            self.count, self.jitter_s = 0, 0.0
        self._window.append(rtt_s)
        self.count += 1
        self._at = now
        median = _median(self._window)
        # While few are known the median is all there is: an average would keep a first spike for long.
        self.value_s = median if self.count <= WINDOW else self.value_s + WEIGHT * (median - self.value_s)
        if self.count > 1:
            self.jitter_s += JITTER_WEIGHT * (abs(rtt_s - self.value_s) - self.jitter_s)

    def rtt_s(self, now: float) -> float | None:
        """The estimate, or None if there is none that still counts."""
        return self.value_s if self.is_fresh(now) else None

    def is_fresh(self, now: float) -> bool:
        return now - self._at <= PAIR_TTL_S


class Ranking:
    """Regions in an order that noise does not move.

    A region overtakes one before it once it has been nearer by more than 2 ms and 10 % for 3 s on end. What lies
    between the two may move with them, but nothing is ever moved behind what is farther. Newcomers are put where their
    time belongs. `update` judges "on end" by what it is shown, so it is to be called about as often as times change.
    """

    __slots__ = ("_order", "_since")

    def __init__(self) -> None:
        self._order: list[RegionCode] = []
        self._since: dict[tuple[RegionCode, RegionCode], float] = {}  # (before, behind and yet nearer): since when

    def update(self, times_s: Mapping[RegionCode, float], now: float) -> tuple[RegionCode, ...]:
        order = [region for region in self._order if region in times_s]
        known = set(order)
        for region in sorted((one for one in times_s if one not in known), key=lambda one: (times_s[one], one)):
            at = next((at for at, other in enumerate(order) if times_s[other] > times_s[region]), len(order))
            order.insert(at, region)
        since, ripe = self._watch(order, times_s, now)
        for before, behind in ripe:
            first, last = order.index(before), order.index(behind)
            if first < last:
                order[first : last + 1] = _parted(order[first : last + 1], times_s, times_s[behind])
        place = {region: at for at, region in enumerate(order)}
        self._since = {pair: at for pair, at in since.items() if place[pair[0]] < place[pair[1]]}
        self._order = order
        return tuple(order)

    def _watch(
        self, order: list[RegionCode], times_s: Mapping[RegionCode, float], now: float
    ) -> tuple[dict[tuple[RegionCode, RegionCode], float], list[tuple[RegionCode, RegionCode]]]:
        """The pairs that stand the wrong way round by more than the margin, since when, and which of them for long."""
        since: dict[tuple[RegionCode, RegionCode], float] = {}
        ripe: list[tuple[RegionCode, RegionCode]] = []
        for at, before in enumerate(order):
            limit = times_s[before] - margin_s(times_s[before])
            for behind in order[at + 1 :]:
                if times_s[behind] < limit:
                    pair = (before, behind)
                    since[pair] = self._since.get(pair, now)
                    if now - since[pair] >= HOLD_S:
                        ripe.append(pair)
        return since, ripe


def _parted(order: list[RegionCode], times_s: Mapping[RegionCode, float], pivot_s: float) -> list[RegionCode]:
    """Those up to a time, then those beyond it, both as they stood."""
    return [one for one in order if times_s[one] <= pivot_s] + [one for one in order if times_s[one] > pivot_s]


def fitted(ratios: Iterable[float]) -> float:
    """Seconds of a round trip for a kilometre, of what was measured: the median, to which a few lies are nothing."""
    return _median([FACTOR_S_KM] * FACTOR_VOTES + list(ratios))


def guess_s(km: float | None, factor_s_km: float) -> float:
    """A round trip that was never measured; with no distance known it is as far as Earth goes."""
    return FARTHEST_S if km is None else max(LEAST_GUESS_S, km * factor_s_km)


class Basis(enum.Enum):
    """What a time between regions rests on, best first."""

    MEASURED = "measured"
    REMEMBERED = "remembered"  # it was measured, a while ago
    DISTANCE = "distance"  # a guess by the great circle
    NOTHING = "nothing"  # nobody said where it is


@dataclass(frozen=True, slots=True)
class RegionTime:
    rtt_s: float
    basis: Basis


class _Row:
    """What a node published of its round trips, as it was received."""

    __slots__ = ("at", "by_region", "pairs")

    def __init__(self, pairs: dict[NodeName, float], at: float) -> None:
        self.pairs = pairs
        self.at = at
        self.by_region: dict[RegionCode, float] | None = None  # made when it is asked for: few rows ever are


class LatencyTable:
    """Round trips between the nodes of a fleet as one node knows them, and what they come to between regions.

    From this node's own region its own probes count, where there are any: that is the way its requests go. Else, and
    between other regions, it is the median over the pairs of nodes: the least would be one lucky, or lying, node's
    word, and the mean that of a sick one. A round trip is the same from either end, so a region that was measured only
    from there is known too; then comes what was measured up to ten minutes ago; then distance.
    """

    __slots__ = ("_factor", "_fitted_at", "_members", "_node", "_pairs", "_places", "_rankings", "_region", "_regions",
        "_remembered", "_rows")  # fmt: skip

    def __init__(self, node: NodeName, region: RegionCode, places: Places) -> None:
        self._node = node
        self._region = region
        self._places = places
        self._regions: dict[NodeName, RegionCode] = {node: region}
        self._members: dict[RegionCode, set[NodeName]] = {region: {node}}
        self._pairs: dict[NodeName, Pair] = {}
        self._rows: dict[NodeName, _Row] = {}
        self._remembered: dict[tuple[RegionCode, RegionCode], tuple[float, float]] = {}  # time, when
        self._rankings: dict[RegionCode, Ranking] = {}
        self._factor = FACTOR_S_KM
        self._fitted_at = -math.inf

    # --- who there is

    def set_node(self, node: NodeName, region: RegionCode) -> None:
        """A node of the fleet, in a region. Raises LatencyError where there are too many."""
        was = self._regions.get(node)
        if was == region or node == self._node:
            return
        if was is None and len(self._regions) >= MAX_NODES:
            raise LatencyError(f"{node}: more than {MAX_NODES} nodes")
        if region not in self._members and len(self._members) >= MAX_REGIONS:
            raise LatencyError(f"{node}: {region} would be more than {MAX_REGIONS} regions")
        if was is not None:
            self._leave(node, was)
        self._regions[node] = region
        self._members.setdefault(region, set()).add(node)
        for row in self._rows.values():
            row.by_region = None

    def remove_node(self, node: NodeName) -> None:
        """It is of the fleet no more. This node stays."""
        region = self._regions.get(node)
        if region is None or node == self._node:
            return
        del self._regions[node]
        self._pairs.pop(node, None)
        self._rows.pop(node, None)
        for row in self._rows.values():
            row.pairs.pop(node, None)
            row.by_region = None
        self._leave(node, region)

    def _leave(self, node: NodeName, region: RegionCode) -> None:
        members = self._members[region]
        members.discard(node)
        if not members:
            del self._members[region]
            self._rankings.pop(region, None)
            self._remembered = {pair: one for pair, one in self._remembered.items() if region not in pair}

    # --- what is measured

    def sample(self, node: NodeName, rtt_s: float, now: float) -> None:
        """A probe of this node was answered by another. Raises LatencyError."""
        if node == self._node or node not in self._regions:
            raise LatencyError(f"{node}: not another node of the fleet")
        pair = self._pairs.get(node)
        if pair is None:
            pair = self._pairs[node] = Pair()
        pair.add(rtt_s, now)

    def pair(self, node: NodeName) -> Pair | None:
        return self._pairs.get(node)

    def own_row(self, now: float) -> dict[NodeName, float]:
        """What this node is to publish: its round trips that still count."""
        return {node: rtt for node, pair in self._pairs.items() if (rtt := pair.rtt_s(now)) is not None}

    def take_row(self, sender: NodeName, about: NodeName, row: Mapping[NodeName, float], now: float) -> None:
        """Take what `sender`, as its certificate has it, says of the node `about`: of itself, or it is refused.

        The whole row or nothing of it: the last one stands until it is too old. Raises LatencyError. Nodes that are not
        known here are passed over, their records may come later.
        """
        if about != sender:
            raise LatencyError(f"{sender} speaks of {str(about)[:64]}: a node's row is its own")
        if sender == self._node:
            raise LatencyError(f"{sender} is this node: it has its own row")
        if sender not in self._regions:
            raise LatencyError(f"{sender}: not a node of the fleet")
        if len(row) > MAX_NODES:
            raise LatencyError(f"{sender}: {len(row)} entries, more than {MAX_NODES}")
        pairs: dict[NodeName, float] = {}
        for node, rtt_s in row.items():
            try:
                checked = _checked(rtt_s)
            except LatencyError as error:
                raise LatencyError(f"{sender} to {str(node)[:64]}: {error}") from None
            if node != sender and node in self._regions:
                pairs[node] = checked
        self._rows[sender] = _Row(pairs, now)

    # --- what follows

    def node_rtt_s(self, node: NodeName, now: float) -> float | None:
        """This node's round trip to another, as measured."""
        pair = self._pairs.get(node)
        return pair.rtt_s(now) if pair is not None else None

    def rtt(self, a: RegionCode, b: RegionCode, now: float) -> RegionTime:
        """The round trip from a region to another."""
        if a == b:
            return RegionTime(0.0, Basis.MEASURED)
        measured = self._measured(a, b, now)
        if measured is None:
            measured = self._measured(b, a, now)
        if measured is not None:
            if a in self._members and b in self._members:
                self._remembered[a, b] = (measured, now)
            return RegionTime(measured, Basis.MEASURED)
        was = self._remembered.get((a, b))
        if was is not None and now - was[1] <= REMEMBERED_S:
            return RegionTime(was[0], Basis.REMEMBERED)
        km = self._places.distance_km(a, b)
        return RegionTime(guess_s(km, self.factor_s_km(now)), Basis.NOTHING if km is None else Basis.DISTANCE)

    def order(self, region: RegionCode, now: float) -> tuple[RegionCode, ...]:
        """All regions, `region` first and then nearest first, as Ranking keeps them; for regions there are.

        To be asked about as often as rows and samples come.
        """
        times = {other: self.rtt(region, other, now).rtt_s for other in self._members if other != region}
        ranking = self._rankings.get(region)
        if ranking is None:
            ranking = Ranking()
            if region in self._members:
                self._rankings[region] = ranking
        return (region, *ranking.update(times, now))

    def detours(self, node: NodeName, now: float) -> tuple[NodeName, ...]:
        """The nodes that have lately reached one that this node may not reach, the shortest way first."""
        ways: list[tuple[float, NodeName]] = []
        for via, row in self._rows.items():
            if via != node and now - row.at <= ROW_TTL_S and node in row.pairs:
                first = self.node_rtt_s(via, now)
                if first is not None:
                    ways.append((first + row.pairs[node], via))
        return tuple(via for _, via in sorted(ways))

    def factor_s_km(self, now: float) -> float:
        """Seconds of a round trip for a kilometre of great circle: the median of what is measured.

        One row a region is asked, so that neither a region of many nodes nor one node that lies has much weight.
        """
        if now - self._fitted_at >= FIT_S:
            self._fitted_at = now
            ratios: list[float] = []
            for region, times in self._witnesses(now).items():
                for other, rtt_s in times.items():
                    km = self._places.distance_km(region, other)
                    if km is not None and km >= SHORTEST_KM:
                        ratios.append(rtt_s / km)
            self._factor = fitted(ratios)
        return self._factor

    def _witnesses(self, now: float) -> dict[RegionCode, Mapping[RegionCode, float]]:
        newest: dict[RegionCode, _Row] = {}
        for node, row in self._rows.items():
            region = self._regions[node]
            if now - row.at <= ROW_TTL_S and (region not in newest or newest[region].at < row.at):
                newest[region] = row
        rows: dict[RegionCode, Mapping[RegionCode, float]] = {
            region: self._by_region(row) for region, row in newest.items()
        }
        own = self._merged(self.own_row(now))
        return rows | {self._region: own} if own else rows

    def _measured(self, a: RegionCode, b: RegionCode, now: float) -> float | None:
        """As seen from nodes of `a`."""
        if a == self._region:
            own = [rtt for node in self._members.get(b, ()) if (rtt := self.node_rtt_s(node, now)) is not None]
            if own:
                return _median(own)
        seen: list[float] = []
        for node in self._members.get(a, ()):
            row = self._rows.get(node)
            if row is not None and now - row.at <= ROW_TTL_S:
                time = self._by_region(row).get(b)
                if time is not None:
                    seen.append(time)
        return _median(seen) if seen else None

    def _by_region(self, row: _Row) -> dict[RegionCode, float]:
        if row.by_region is None:
            row.by_region = self._merged(row.pairs)
        return row.by_region

    def _merged(self, pairs: Mapping[NodeName, float]) -> dict[RegionCode, float]:
        grouped: dict[RegionCode, list[float]] = {}
        for node, rtt_s in pairs.items():
            grouped.setdefault(self._regions[node], []).append(rtt_s)
        return {region: _median(times) for region, times in grouped.items()}
