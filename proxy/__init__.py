"""Wakefront, the life of a request in prose; each step names the module it happens in.

A client connects to a port that the supervisor holds (`supervisor`) and a worker accepts from (`worker`,
`edge.listener`). On a TLS port the ClientHello is read first (`wire.client_hello`, `edge.tls`): its name picks the app,
starts a sleeping machine at once (`edge.waker`), and picks the certificate (`edge.certificates`). Then bytes are HTTP
(`edge.downstream` feeds `wire.http1`), and each whole head becomes one exchange (`edge.exchange`).

The exchange goes through its phases. The host gives the app (`edge.table`); a plain request may be redirected; a
running machine is chosen (`decide.balance`) or one is woken (`decide.wake` says which, `edge.waker` holds the
request). The head is written anew with our own fields (`decide.headers`) on a kept or new connection
(`edge.upstream`). If that fails, `decide.retry` says whether it is safe to try again. The answer's head is rewritten,
its body relayed under back-pressure (`edge.flow`); an upgrade becomes a tunnel (`edge.relay`). The request ends in
counters (`state`) and one log record (`edge.access_log`).

What a worker knows came from control (`server`, `control`) as messages (`ipc`): control reads the configuration
(`config`, `wire.fly_toml`), owns the machines (`control.machines` over `machines`), probes what it started, stops what
is idle (`decide.autostop`), and answers the operator (`control.api`, `cli`).
"""

from proxy import compiled

compiled.install()
