/* A client that opens a new TLS connection for each request, with a full handshake each time (no session is offered), or,
 * with RESUME 1, with a ticket that an earlier connection of the same client was given (a ticket is used once).
 *
 * usage: handshakes HOST PORT NAME PATH BODY_BYTES CONNECTIONS SECONDS RESUME
 * Prints one JSON object: requests, errors, resumed, seconds, and the time from connect() to the last byte in
 * microseconds (p50, p90, p99, p99.9, max). An answer counts only with status 200 and BODY_BYTES bytes after its head.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SAMPLES 2000000

struct conn {
    int fd, sent;
    SSL *ssl;
    SSL_SESSION *session; /* the latest ticket given to this client */
    double began;
    size_t got;
    char in[65536];
};

static SSL_CTX *context;
static int epoll_fd;
static struct sockaddr_in address;
static const char *name;
static char request[1024];
static int request_len;
static size_t body_bytes;
static unsigned long requests, errors, resumed;
static unsigned samples[SAMPLES];
static char first_error[256];

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

/* A ticket came. Kept for the next connection where that is asked for; else OpenSSL drops it. */
static int on_ticket(SSL *ssl, SSL_SESSION *session) {
    struct conn *c = SSL_get_app_data(ssl);
    if (c->session) SSL_SESSION_free(c->session);
    c->session = session;
    return 1;
}

static void watch(struct conn *c, int op, unsigned events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    epoll_ctl(epoll_fd, op, c->fd, &event);
}

static void begin(struct conn *c) {
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->sent = 0;
    c->got = 0;
    c->began = now_us();
    c->ssl = SSL_new(context);
    SSL_set_app_data(c->ssl, c);
    if (c->session) {
        SSL_set_session(c->ssl, c->session);
        SSL_SESSION_free(c->session);
        c->session = NULL;
    }
    SSL_set_fd(c->ssl, c->fd);
    SSL_set_tlsext_host_name(c->ssl, name);
    SSL_set_connect_state(c->ssl);
    connect(c->fd, (struct sockaddr *)&address, sizeof address);
    watch(c, EPOLL_CTL_ADD, EPOLLOUT);
}

static void finish(struct conn *c, const char *error, int again) {
    if (!error) {
        char *end;
        c->in[c->got] = 0;
        if (c->got < 16 || strncmp(c->in, "HTTP/1.1 200", 12)) error = "status is not 200";
        else if (!(end = memmem(c->in, c->got, "\r\n\r\n", 4))) error = "no end of head";
        else if (c->got - (size_t)(end + 4 - c->in) != body_bytes) error = "body of another length";
    }
    if (error) {
        errors++;
        if (!first_error[0]) snprintf(first_error, sizeof first_error, "%s", error);
    } else {
        if (requests < SAMPLES) samples[requests] = (unsigned)(now_us() - c->began);
        requests++;
        if (SSL_session_reused(c->ssl)) resumed++;
    }
    SSL_free(c->ssl);
    close(c->fd);
    if (again) begin(c);
}

static void step(struct conn *c, int again) {
    ERR_clear_error();
    int done;
    if (!c->sent) {
        done = SSL_do_handshake(c->ssl);
        if (done == 1) {
            done = SSL_write(c->ssl, request, request_len);
            c->sent = done > 0;
        }
        if (done <= 0) {
            int why = SSL_get_error(c->ssl, done);
            if (why == SSL_ERROR_WANT_READ) return watch(c, EPOLL_CTL_MOD, EPOLLIN);
            if (why == SSL_ERROR_WANT_WRITE) return watch(c, EPOLL_CTL_MOD, EPOLLOUT);
            return finish(c, "handshake failed", again);
        }
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
    }
    for (;;) {
        if (c->got >= sizeof c->in - 1) return finish(c, "answer too long", again);
        done = SSL_read(c->ssl, c->in + c->got, (int)(sizeof c->in - 1 - c->got));
        if (done > 0) {
            c->got += (size_t)done;
            continue;
        }
        int why = SSL_get_error(c->ssl, done);
        if (why == SSL_ERROR_WANT_READ) return;
        if (why == SSL_ERROR_ZERO_RETURN) {
            SSL_shutdown(c->ssl);
            return finish(c, NULL, again);
        }
        return finish(c, "connection ended without close_notify", again);
    }
}

static int smaller(const void *a, const void *b) {
    unsigned x = *(const unsigned *)a, y = *(const unsigned *)b;
    return (x > y) - (x < y);
}

static unsigned quantile(double q) {
    unsigned long n = requests < SAMPLES ? requests : SAMPLES;
    return n ? samples[(unsigned long)(q * (double)(n - 1))] : 0;
}

int main(int argc, char **argv) {
    if (argc != 9) return 2;
    address.sin_family = AF_INET;
    inet_pton(AF_INET, argv[1], &address.sin_addr);
    address.sin_port = htons((unsigned short)atoi(argv[2]));
    name = argv[3];
    body_bytes = strtoul(argv[5], NULL, 10);
    int connections = atoi(argv[6]);
    double seconds = atof(argv[7]);
    request_len = snprintf(request, sizeof request,
                           "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: handshakes\r\nAccept: */*\r\nConnection: close\r\n\r\n",
                           argv[4], name);
    context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    if (atoi(argv[8])) {
        SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
        SSL_CTX_sess_set_new_cb(context, on_ticket);
    } else {
        SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    }
    epoll_fd = epoll_create1(0);
    struct conn *all = calloc((size_t)connections, sizeof *all);
    double began = now_us(), end = began + seconds * 1e6;
    for (int i = 0; i < connections; i++) begin(&all[i]);
    struct epoll_event ready[256];
    while (now_us() < end) {
        int n = epoll_wait(epoll_fd, ready, 256, 100);
        for (int i = 0; i < n; i++) step(ready[i].data.ptr, 1);
    }
    double took = (now_us() - began) / 1e6;
    qsort(samples, requests < SAMPLES ? requests : SAMPLES, sizeof samples[0], smaller);
    printf("{\"requests\": %lu, \"errors\": %lu, \"resumed\": %lu, \"seconds\": %.6f, \"p50_us\": %u, \"p90_us\": %u, "
           "\"p99_us\": %u, \"p999_us\": %u, \"max_us\": %u, \"first_error\": \"%s\"}\n",
           requests, errors, resumed, took, quantile(.5), quantile(.9), quantile(.99), quantile(.999), quantile(1), first_error);
    return 0;
}
