/* The C program that bench/wake.py starts: listens on 0.0.0.0:$PORT, answers every request with "hello". */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static const char answer[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\n\r\nhello\n";

static void *serve(void *given) {
    int fd = (int)(long)given;
    char in[65536];
    size_t have = 0;
    ssize_t n;
    while ((n = recv(fd, in + have, sizeof in - 1 - have, 0)) > 0) {
        char *end;
        have += (size_t)n;
        in[have] = 0;
        while ((end = strstr(in, "\r\n\r\n"))) {
            if (send(fd, answer, sizeof answer - 1, MSG_NOSIGNAL) < 0) break;
            have -= (size_t)(end + 4 - in);
            memmove(in, end + 4, have + 1);
        }
        if (have == sizeof in - 1) break;
    }
    close(fd);
    return NULL;
}

int main(void) {
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    const char *port = getenv("PORT");
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(port ? port : "8080"))};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) return 1;
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setdetachstate(&small, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&small, 256 * 1024);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        pthread_t thread;
        if (fd >= 0 && pthread_create(&thread, &small, serve, (void *)(long)fd)) close(fd);
    }
}
