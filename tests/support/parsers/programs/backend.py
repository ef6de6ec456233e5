"""The backend behind nginx."""

import asyncio
import sys

import uvloop

from tests.support.parsers.servers import Backend


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


uvloop.run(main())
