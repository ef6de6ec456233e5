/* The origin of bench/load.py: fixed bodies, uploads swallowed, as little processor time as plain epoll needs.
 *
 * usage: origin PORT            listens on 127.0.0.1:PORT, prints "ready" once it does
 * GET  /small /1k /100k /10m    a body of 100, 1024, 102400, 10485760 bytes
 * GET  /fresh                    as /small, with another ETag each time
 * POST /upload                  reads the body (Content-Length or chunked), answers with its length, 10 digits
 * GET  /head                    answers with the request head as it arrived, so that a check can look at it
 * GET  /stats                   connections accepted and requests answered so far, as JSON
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define IN_SIZE 65536
#define OUT_SIZE 80000
#define BODY_MAX 10485760

enum chunk { SIZE_LINE, DATA, DATA_END, TRAILER };

struct conn {
    int fd;
    size_t in_len, out_len, out_off;
    const char *body; /* sent after `out` */
    size_t body_len, body_off;
    int in_body, chunked, closing;
    enum chunk chunk;
    unsigned long long body_left, body_seen;
    int want_write;
    char in[IN_SIZE + 1];
    char out[OUT_SIZE];
};

static char *big;
static int epoll_fd;
static unsigned long long connections, requests;

static const char *find_header(const char *head, const char *name) {
    size_t n = strlen(name);
    const char *line = strstr(head, "\r\n");
    while (line && line[2] && line[2] != '\r') {
        line += 2;
        if (strncasecmp(line, name, n) == 0 && line[n] == ':') {
            line += n + 1;
            while (*line == ' ') line++;
            return line;
        }
        line = strstr(line, "\r\n");
    }
    return NULL;
}

static const char *hand_to;

static void answer_tagged(struct conn *c, const char *status, const char *body, size_t length, unsigned long long tag) {
    c->out_len += (size_t)snprintf(c->out + c->out_len, OUT_SIZE - c->out_len,
                                   "HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: %zu\r\n"
                                   "Cache-Control: max-age=60\r\nETag: \"%04llx-1c\"\r\nServer: origin\r\n%s\r\n",
                                   status, length, tag, c->closing ? "Connection: close\r\n" : "");
    requests++;
    if (length <= 1024 || body < big || body >= big + BODY_MAX) {
        memcpy(c->out + c->out_len, body, length);
        c->out_len += length;
    } else {
        c->body = body;
        c->body_len = length;
        c->body_off = 0;
    }
}

static void answer(struct conn *c, const char *status, const char *body, size_t length) {
    answer_tagged(c, status, body, length, 0x5f3a);
}

/* A replay to the machine named on the command line; without a name this origin is the one that answers. */
static void answer_handed(struct conn *c) {
    c->out_len += (size_t)snprintf(c->out + c->out_len, OUT_SIZE - c->out_len,
                                   "HTTP/1.1 409 Conflict\r\nfly-replay: instance=%s;state=bench\r\n"
                                   "Content-Length: 0\r\n\r\n", hand_to);
    requests++;
}

static void answer_upload(struct conn *c) {
    char text[16];
    snprintf(text, sizeof text, "%010llu", c->body_seen);
    answer(c, "200 OK", text, 10);
}

/* One request head, NUL-terminated at its end. */
static void on_head(struct conn *c, char *head, size_t length) {
    const char *connection = find_header(head, "Connection"), *size = find_header(head, "Content-Length");
    const char *coding = find_header(head, "Transfer-Encoding");
    const char *path = strchr(head, ' ');
    if (!path) path = " /";
    path++;
    c->closing = connection && strncasecmp(connection, "close", 5) == 0;
    c->body_left = size ? strtoull(size, NULL, 10) : 0;
    c->chunked = coding && strncasecmp(coding, "chunked", 7) == 0;
    c->chunk = SIZE_LINE;
    c->body_seen = 0;
    if (c->chunked || c->body_left > 0) {
        c->in_body = 1;
        return;
    }
    if (strncmp(path, "/small ", 7) == 0) answer(c, "200 OK", big, 100);
    else if (strncmp(path, "/fresh ", 7) == 0) answer_tagged(c, "200 OK", big, 100, requests);
    else if (strncmp(path, "/1k ", 4) == 0) answer(c, "200 OK", big, 1024);
    else if (strncmp(path, "/100k ", 6) == 0) answer(c, "200 OK", big, 102400);
    else if (strncmp(path, "/10m ", 5) == 0) answer(c, "200 OK", big, BODY_MAX);
    else if (strncmp(path, "/upload ", 8) == 0) answer_upload(c);
    else if (strncmp(path, "/handed ", 8) == 0 && hand_to) answer_handed(c);
    else if (strncmp(path, "/handed ", 8) == 0) answer(c, "200 OK", big, 100);
    else if (strncmp(path, "/head ", 6) == 0) answer(c, "200 OK", head, length);
    else if (strncmp(path, "/stats ", 7) == 0) {
        char text[96];
        int n = snprintf(text, sizeof text, "{\"connections\": %llu, \"requests\": %llu}", connections, requests);
        answer(c, "200 OK", text, (size_t)n);
    } else answer(c, "404 Not Found", "none", 4);
}

/* Takes what it can of the body at `from`; returns the bytes taken. */
static size_t on_body(struct conn *c, char *from, size_t length) {
    size_t taken = 0;
    if (!c->chunked) {
        taken = length < c->body_left ? length : (size_t)c->body_left;
        c->body_left -= taken;
        c->body_seen += taken;
        if (c->body_left == 0) c->in_body = 0;
    }
    while (c->chunked && c->in_body && taken < length) {
        if (c->chunk == DATA) {
            size_t n = length - taken < c->body_left ? length - taken : (size_t)c->body_left;
            c->body_left -= n;
            c->body_seen += n;
            taken += n;
            if (c->body_left == 0) c->chunk = DATA_END;
            continue;
        }
        char *end = memchr(from + taken, '\n', length - taken);
        if (!end) break;
        size_t line = (size_t)(end - (from + taken)) + 1;
        if (c->chunk == SIZE_LINE) {
            c->body_left = strtoull(from + taken, NULL, 16);
            c->chunk = c->body_left ? DATA : TRAILER;
        } else if (c->chunk == DATA_END) c->chunk = SIZE_LINE;
        else if (line <= 2) c->in_body = 0;
        taken += line;
    }
    if (!c->in_body) answer_upload(c);
    return taken;
}

static void drop(struct conn *c) {
    close(c->fd);
    free(c);
}

/* 0 = all sent, 1 = the socket is full, -1 = gone. */
static int flush(struct conn *c) {
    while (c->out_off < c->out_len || c->body) {
        const char *from = c->out_off < c->out_len ? c->out + c->out_off : c->body + c->body_off;
        size_t length = c->out_off < c->out_len ? c->out_len - c->out_off : c->body_len - c->body_off;
        int more = c->out_off < c->out_len && c->body ? MSG_MORE : 0;
        ssize_t n = send(c->fd, from, length, MSG_NOSIGNAL | more);
        if (n < 0) return errno == EAGAIN ? 1 : -1;
        if (c->out_off < c->out_len) c->out_off += (size_t)n;
        else if ((c->body_off += (size_t)n) == c->body_len) c->body = NULL;
    }
    c->out_len = c->out_off = 0;
    return 0;
}

static void watch(struct conn *c, int want_write) {
    if (c->want_write == want_write) return;
    c->want_write = want_write;
    struct epoll_event event = {.events = want_write ? EPOLLOUT : EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
}

/* Answers what has been read; stops at a full socket and goes on when it has room. */
static int work(struct conn *c) {
    size_t used = 0;
    while (used < c->in_len && !c->body && c->out_len < OUT_SIZE - IN_SIZE) {
        if (c->in_body) {
            size_t n = on_body(c, c->in + used, c->in_len - used);
            used += n;
            if (n == 0) break;
        } else {
            char *end = memmem(c->in + used, c->in_len - used, "\r\n\r\n", 4);
            if (!end) break;
            size_t length = (size_t)(end + 4 - (c->in + used));
            char kept = end[4];
            end[4] = 0;
            on_head(c, c->in + used, length);
            end[4] = kept;
            used += length;
        }
    }
    memmove(c->in, c->in + used, c->in_len - used);
    c->in_len -= used;
    return flush(c);
}

static void on_event(struct conn *c, unsigned events) {
    if (events & EPOLLOUT) {
        int state = flush(c);
        if (state == 0) state = work(c);
        if (state < 0 || (state == 0 && c->closing && !c->in_body)) return drop(c);
        return watch(c, state == 1);
    }
    for (;;) {
        size_t room = IN_SIZE - c->in_len;
        ssize_t n = recv(c->fd, c->in + c->in_len, room, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) return drop(c);
        if (n < 0) return;
        c->in_len += (size_t)n;
        c->in[c->in_len] = 0;
        int state = work(c);
        if (state < 0 || (state == 0 && c->closing && !c->in_body)) return drop(c);
        if (state == 1) return watch(c, 1);
        if ((size_t)n < room) return;
    }
}

int main(int argc, char **argv) {
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argc > 1 ? argv[1] : "0"))};
    hand_to = argc > 2 ? argv[2] : NULL;
    inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("origin");
        return 1;
    }
    big = malloc(BODY_MAX);
    for (size_t i = 0; i < BODY_MAX; i++) big[i] = "abcdefghijklmnopqrstuvwxyz012345"[i % 32];
    epoll_fd = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, ready[256];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int n = epoll_wait(epoll_fd, ready, 256, -1);
        for (int i = 0; i < n; i++) {
            if (ready[i].data.ptr) {
                on_event(ready[i].data.ptr, ready[i].events);
                continue;
            }
            int fd;
            while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                struct conn *c = calloc(1, sizeof *c);
                c->fd = fd;
                connections++;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                event.events = EPOLLIN;
                event.data.ptr = c;
                epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
            }
        }
    }
}
