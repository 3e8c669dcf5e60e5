/* A tunnel to a TCP port of the box: standard input goes to the port, what the port says to standard output. The first byte on standard
 * output, '+', says that the connection is made. The end of one direction leaves the other open; a '.' on standard error says
 * that what came out is all, where a connection that breaks just ends. */
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BUFFER = 64 * 1024 };

struct way {
    int from, to;
    bool ended; /* `from` has ended, and `to` was told */
    size_t start, end;
    char bytes[BUFFER];
};

static int connect_to(const struct sockaddr *address, socklen_t size)
{
    int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int saved;

    if (fd < 0 || connect(fd, address, size) == 0)
        return fd;
    saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

static int connect_loopback(unsigned short port)
{
    const struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    int fd = connect_to((const struct sockaddr *)&four, sizeof four);
    int saved = errno;

    if (fd < 0) {
        fd = connect_to((const struct sockaddr *)&six, sizeof six);
        errno = saved; /* what a server that is not there means to most people */
    }
    return fd;
}

static bool would_block(void)
{
    return errno == EAGAIN || errno == EINTR;
}

/* Move what can be moved; false when the connection is broken. */
static bool turn(struct way *way, int connection)
{
    ssize_t size;

    if (way->start == way->end) {
        size = read(way->from, way->bytes, sizeof way->bytes);
        if (size < 0)
            return would_block();
        way->start = 0;
        way->end = (size_t)size;
        if (size == 0) {
            way->ended = true;
            if (way->to == connection)
                return shutdown(connection, SHUT_WR) == 0;
            return write(STDERR_FILENO, ".", 1) == 1 && close(way->to) == 0;
        }
    }
    size = write(way->to, way->bytes + way->start, way->end - way->start);
    if (size < 0)
        return would_block();
    way->start += (size_t)size;
    return true;
}

static struct pollfd wanted(const struct way *way)
{
    if (way->ended)
        return (struct pollfd){.fd = -1};
    return way->start == way->end ? (struct pollfd){.fd = way->from, .events = POLLIN} : (struct pollfd){.fd = way->to, .events = POLLOUT};
}

int tunnel_child(const char *port)
{
    static struct way ways[2];
    bool udp = strncmp(port, "udp:", 4) == 0;
    char *rest;
    unsigned long number = strtoul(udp ? port + 4 : port, &rest, 10);
    int connection, on = 1;

    if (number < 1 || number > 65535 || *rest) {
        fprintf(stderr, "%s is not a port\n", port);
        return 1;
    }
    if (udp)
        return datagrams_child((unsigned short)number);
    connection = connect_loopback((unsigned short)number);
    if (connection < 0) {
        fprintf(stderr, "%s\n", strerror(errno));
        return 1;
    }
    signal(SIGPIPE, SIG_IGN);
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (write(STDOUT_FILENO, "+", 1) != 1)
        return 1;
    ways[0] = (struct way){.from = STDIN_FILENO, .to = connection};
    ways[1] = (struct way){.from = connection, .to = STDOUT_FILENO};
    for (int fd = STDIN_FILENO; fd <= STDOUT_FILENO; fd++)
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    fcntl(connection, F_SETFL, O_NONBLOCK);
    while (!ways[0].ended || !ways[1].ended) {
        struct pollfd polls[2] = {wanted(&ways[0]), wanted(&ways[1])};

        if (poll(polls, 2, -1) < 0 && errno != EINTR)
            return 1;
        for (size_t i = 0; i < 2; i++)
            if (polls[i].revents && !turn(&ways[i], connection))
                return 1;
    }
    return 0;
}
