"""An origin that counts how many requests it has at once, and which it has had. Standard library only.

GET|POST /work?ms=M&id=ID   answers after M ms; leaves the count before its last byte is written
GET /told                   {"most": highest count ever, "served": n, "twice": ids of POSTs that came more than once}

Environment: POSTS (file: the id of every POST, as it comes; it outlives this process).
"""

import asyncio
import json
import os
from urllib.parse import parse_qs, urlsplit

POSTS = os.open(os.environ["POSTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if "POSTS" in os.environ else None
now = most = served = 0
posts: dict[str, int] = {}


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while await answer(reader, writer):
            pass
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    global now, most, served
    head = await reader.readuntil(b"\r\n\r\n")
    method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
    parts = urlsplit(target)
    if parts.path == "/told":
        twice = [one for one, count in posts.items() if count > 1]
        body = json.dumps({"most": most, "served": served, "twice": twice}).encode()
    else:
        now += 1
        most = max(most, now)
        asked = parse_qs(parts.query)
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0))
        if method == "POST":
            one = asked["id"][0]
            posts[one] = posts.get(one, 0) + 1
            if POSTS is not None:
                os.write(POSTS, f"{one}\n".encode())
        await asyncio.sleep(float(asked.get("ms", ["0"])[0]) / 1000)
        served += 1
        now -= 1
        body = os.environ["FLY_MACHINE_ID"].encode()
    length = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(body)
    closes = b"connection: close" in head.lower()
    writer.write(length + (b"Connection: close\r\n" if closes else b"") + b"\r\n" + body)
    await writer.drain()
    return not closes


async def main() -> None:
    server = await asyncio.start_server(serve, "", int(os.environ["PORT"]), backlog=1024)
    async with server:
        await server.serve_forever()


asyncio.run(main())
