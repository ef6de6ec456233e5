// The Node program that bench/wake.py starts: listens on $PORT, answers every request with "hello".
const http = require("node:http");
http
  .createServer((request, response) => {
    response.setHeader("Content-Type", "text/plain");
    response.end("hello\n");
  })
  .listen({ port: Number(process.env.PORT || 8080), host: "0.0.0.0", backlog: 4096 });
