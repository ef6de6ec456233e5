"""Hostile input, row by row, and what each cost: the attack table of docs/threat-model.md.

A test states its cases under an attack; at the end of the run a table tells, for each: how many cases, by how much the
attacked worker grew, its CPU time, the p99 of a bystander's honest requests before and during, and whether it held.

    def test_both_framings_are_refused_or_rewritten(node: AttackedNode, attack: Begin) -> None:
        with attack("A6", "CL.TE spellings", node) as run:
            for spelling in SPELLINGS:
                run.case(spelling)
                head = node.head("/x", f"Transfer-Encoding: {spelling}", "Content-Length: 5", method="POST")
                got = node.attempt(head + b"0\\r\\n\\r\\n")
                seen = node.origin.take()
                if seen: assert rewritten_once(seen, "/x")
                else: got.assert_refused(400)

What there is (tests/support/attacks.py, recording.py, bystander.py, peer.py):

- `node`: one `wakefront serve` for the session, one worker, the defaults of config.toml. Its app `web` is
  `node.origin`, a `RecordingOrigin` in the test's process: exact bytes per connection, whole requests (`take`), its own
  concurrency (`peak_in_flight`), `hold`/`release`, `respond` to answer otherwise; `node` is given to each test with the
  origin reset. `node.attempt(bytes)` is one connection read to its end; `node.peer(...)` a raw client by hand, with
  `source="127.0.0.3"` from another address of loopback.
- Other settings: make one, `with AttackedNode(folder, sections="[limits]\\n...", web='max_queued = 3\\n') as node`,
  best in a module's fixture. Plane's and ServedNode's methods are there too (`metric`, `record`, `api`, `worker_pids`).
- Correctness without a process of its own: use the `edge` fixture of tests/edge (EdgeHarness), and `attack(row, name)`
  without a node: the row then has cases and outcome only.
- Marks: `attack(..., growth_mib=64, p99_ms=50)`. `run.note("...")` puts words, such as further figures, into the table.
- Always held with a node: no worker ends, no traceback is logged, no request of the bystander fails, and the origin is
  sent nothing that our edge may not write. The bystander asks 150 requests a second from 127.0.0.9, a third of them on
  a connection each; times count from when a request was due. 50 more go past the node, straight to its origin: their
  p99 ("past it") is what the host does to anybody. "host" is how long, within half a second, the worker could have run
  and was not let: on a busy host that is most of a high p99. The larger of both is taken off before the mark is held.
- Asynchronous tests may use it too: only the begin and the end of an attack block the loop, a second at most.

Attacks of the same row and name, such as those of a parametrized test, become one line. WAKEFRONT_ATTACK_TABLE=PATH
writes the rows as JSON. `cases(normal)` gives how many generated cases to run: WAKEFRONT_CASES multiplies it
(`./run soak` does). WAKEFRONT_SEED takes a printed seed again. WAKEFRONT_SOAK=SECONDS is how long the longer runs last.
"""

from __future__ import annotations

import os


def cases(normal: int) -> int:
    """How many generated cases to run: `normal` in ./run test, more where WAKEFRONT_CASES, a factor, says so."""
    return max(1, round(normal * float(os.environ.get("WAKEFRONT_CASES") or 1)))
