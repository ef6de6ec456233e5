"""A machine that hands requests on, or takes them. Standard library only.

any method, header `x-go: INSTANCE`   until it is that machine's: answers with `fly-replay: instance=INSTANCE`
                                      (header `x-state`: and with that state; `x-cache`: cached for the path)
else                                  {"machine", "method", "bytes", "sha256", "headers"} of what came
Upgrade: echo                         101, then every byte comes back, after this machine's id and a line end
"""

import asyncio
import hashlib
import json
import os

ME = os.environ["FLY_MACHINE_ID"]


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while await answer(reader, writer):
            pass
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method = head[0].split(" ")[0]
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    digest, size = hashlib.sha256(), 0
    async for piece in body(reader, headers):
        digest.update(piece)
        size += len(piece)
    go = headers.get("x-go", ME)
    if go != ME:
        state = f";state={headers['x-state']}" if "x-state" in headers else ""
        cache = "fly-replay-cache: /*\r\nfly-replay-cache-ttl-secs: 60\r\n" if "x-cache" in headers else ""
        writer.write(
            f"HTTP/1.1 409 Elsewhere\r\nfly-replay: instance={go}{state}\r\n{cache}content-length: 0\r\n\r\n".encode()
        )
        return True
    if headers.get("upgrade") == "echo":
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n" + ME.encode() + b"\n"
        )
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        return False
    told = {"machine": ME, "method": method, "bytes": size, "sha256": digest.hexdigest(), "headers": headers}
    text = json.dumps(told).encode()
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text)
    )
    await writer.drain()
    return headers.get("connection") != "close"


async def body(reader, headers):  # type: ignore[no-untyped-def]  # run by whatever Python the test has, as a program
    left = int(headers.get("content-length", "0"))
    while left:
        piece = await reader.read(min(left, 65536))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")


async def main() -> None:
    server = await asyncio.start_server(serve, "", int(os.environ["PORT"]), backlog=1024, limit=1 << 20)
    async with server:
        await server.serve_forever()


asyncio.run(main())
