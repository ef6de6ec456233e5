"""aiohttp's server as an origin: answers each request with the digest of what it saw."""

import asyncio
import logging
import sys

from aiohttp import web

from tests.support.parsers import DIGEST_FIELD, digest_of


async def answer(request: web.BaseRequest) -> web.Response:
    body = await request.read()
    target = request._message.path.encode("latin-1", "surrogateescape")
    return web.Response(headers={DIGEST_FIELD: digest_of(request.method.encode(), target, body)})


logging.disable()  # it tells each request that it refuses


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(web.Server(answer, access_log=None), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


asyncio.run(main())
