/* A client that asks at a fixed rate, whatever the answers take: each request has its time, and what it took is counted
 * from then on, so that a slow answer does not spare those behind it.
 *
 * usage: paced PORT RATE SECONDS CONNECTIONS BODY_BYTES REQUEST_FILE
 * The first second is not counted. Requests whose time has come while all connections are busy wait in line. Prints one
 * JSON object: requests, errors, late (more than 1 ms between a request's time and its sending), and p50_us to max_us.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

struct conn {
    int fd;
    double due;
    size_t got;
    char in[8192];
};

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int smaller(const void *a, const void *b) {
    unsigned x = *(const unsigned *)a, y = *(const unsigned *)b;
    return (x > y) - (x < y);
}

static void die(const char *why) {
    fprintf(stderr, "%s: %s\n", why, strerror(errno));
    exit(1);
}

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    double gap = 1e6 / atof(argv[2]), seconds = atof(argv[3]);
    int connections = atoi(argv[4]), free_count = 0, timer, epoll_fd = epoll_create1(0);
    size_t body = strtoul(argv[5], NULL, 10), most = (size_t)(seconds * 1e6 / gap) + 16;
    static char request[8192];
    int file = open(argv[6], O_RDONLY);
    ssize_t length = read(file, request, sizeof request);
    if (length <= 0) die("request file");
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argv[1]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct conn *all = calloc((size_t)connections, sizeof *all), **idle = calloc((size_t)connections, sizeof *idle);
    unsigned *samples = calloc(most, sizeof *samples);
    prctl(PR_SET_TIMERSLACK, 1UL);
    for (int i = 0; i < connections; i++) {
        int one = 1;
        all[i].fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(all[i].fd, (struct sockaddr *)&address, sizeof address)) die("connect");
        setsockopt(all[i].fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        fcntl(all[i].fd, F_SETFL, O_NONBLOCK);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &all[i]};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, all[i].fd, &event);
        idle[free_count++] = &all[i];
    }
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, ready[64];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer, &event);
    unsigned long done = 0, late = 0, errors = 0;
    double began = now_us(), counted = began + 1e6, end = counted + seconds * 1e6, due = began;
    while (now_us() < end + 1e6 && (due < end || free_count < connections)) {
        double now = now_us();
        while (due <= now && due < end && free_count > 0) {
            struct conn *c = idle[--free_count];
            c->due = due;
            c->got = 0;
            if (now - due > 1000 && due >= counted) late++;
            due += gap;
            if (send(c->fd, request, (size_t)length, MSG_NOSIGNAL) != length) die("send");
            now = now_us();
        }
        if (due < end && free_count > 0) {
            struct itimerspec at = {.it_value = {(time_t)(due / 1e6), 0}};
            at.it_value.tv_nsec = (long)((due - (double)at.it_value.tv_sec * 1e6) * 1e3);
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
        }
        int n = epoll_wait(epoll_fd, ready, 64, 200);
        for (int i = 0; i < n; i++) {
            struct conn *c = ready[i].data.ptr;
            if (!c) {
                unsigned long long ticks;
                if (read(timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN) die("timer");
                continue;
            }
            ssize_t got = recv(c->fd, c->in + c->got, sizeof c->in - 1 - c->got, 0);
            if (got < 0 && errno == EAGAIN) continue;
            if (got <= 0) die("the connection ended");
            c->got += (size_t)got;
            c->in[c->got] = 0;
            char *head_end = strstr(c->in, "\r\n\r\n");
            if (!head_end || c->got < (size_t)(head_end + 4 - c->in) + body) continue;
            if (strncmp(c->in, "HTTP/1.1 200", 12)) errors++;
            else if (c->due >= counted && done < most) samples[done++] = (unsigned)(now_us() - c->due);
            idle[free_count++] = c;
        }
    }
    errors += (unsigned long)(connections - free_count);
    qsort(samples, done, sizeof *samples, smaller);
#define AT(q) (done ? samples[(unsigned long)((q) * (double)(done - 1))] : 0)
    printf("{\"requests\": %lu, \"errors\": %lu, \"late\": %lu, \"p50_us\": %u, \"p90_us\": %u, \"p99_us\": %u, \"p999_us\": %u, "
           "\"max_us\": %u}\n", done, errors, late, AT(.5), AT(.9), AT(.99), AT(.999), AT(1));
    return 0;
}
