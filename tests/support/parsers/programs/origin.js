// Node's own parser as an origin: answers each request with the digest of what it saw.
'use strict';
const crypto = require('crypto');
const http = require('http');

const server = http.createServer({ maxHeaderSize: 262144, requestTimeout: 0, headersTimeout: 0 }, (request, response) => {
  const hash = crypto.createHash('sha1').update(`${request.method} ${request.url}\n`, 'latin1');
  request.on('data', (piece) => hash.update(piece));
  request.on('end', () => {
    response.writeHead(200, { 'x-digest': hash.digest('hex'), 'content-length': 0 });
    response.end();
  });
});
server.keepAliveTimeout = 0;
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
process.stdin.on('end', () => process.exit(0)).resume();
