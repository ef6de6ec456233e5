"""A child process that carries one order through, and kills itself at a point that it is told: for tests of crashes.

    python -m tests.certs.order_child STORE DIRECTORY CA_FILE DNS_MANAGEMENT NAME POINT

Challenges are TXT records of the CA's test DNS, so that a child that has died leaves nothing to be asked for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from certs import Certificate
from certs.issuer import AcmeClient
from certs.order import OrderRun, Want
from certs.store import SealedStore
from tests.support.txt_records import TxtRecords

SECRET = bytes(range(32))


async def main(store_path: str, directory: str, ca_file: str, management: str, name: str, fatal: str) -> None:
    store = SealedStore(Path(store_path), SECRET, time.time)
    client = AcmeClient(directory, store, time.time, ca_file=ca_file)

    def at(point: str) -> None:
        if point == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    async def keep(certificate: Certificate) -> None:
        await asyncio.to_thread(store.put, f"certificate/{name}/acme", certificate.to_pem())
        at("kept")

    run = OrderRun(client, store, TxtRecords(management), time.time, "node", on_point=at)
    await run.run(Want((name,)), keep)
    await client.close()
    store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:7]))
