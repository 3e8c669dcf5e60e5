/* A tunnel to a UDP port of the box: each datagram on standard input goes to the port, each that the port answers to standard output, all
 * with their length in front (two bytes, the high one first). The first byte on standard output, '+', says that the socket is there. It
 * ends with standard input. */
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { LENGTH = 2, LARGEST = 65535 };

static int open_socket(unsigned short port)
{
    const struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0 || connect(fd, (const struct sockaddr *)&peer, sizeof peer) < 0) {
        fprintf(stderr, "%s\n", strerror(errno));
        return -1;
    }
    return fd;
}

static bool write_all(const unsigned char *bytes, size_t size)
{
    while (size > 0) {
        ssize_t put = write(STDOUT_FILENO, bytes, size);

        if (put < 0 && errno != EINTR)
            return false;
        if (put > 0) {
            bytes += put;
            size -= (size_t)put;
        }
    }
    return true;
}

/* Send what is complete, and keep the rest; a datagram that cannot be sent is lost. */
static size_t send_complete(int fd, unsigned char *bytes, size_t held)
{
    size_t start = 0;

    while (held - start >= LENGTH) {
        size_t size = (size_t)bytes[start] << 8 | bytes[start + 1];

        if (held - start < LENGTH + size)
            break;
        (void)!send(fd, bytes + start + LENGTH, size, 0);
        start += LENGTH + size;
    }
    memmove(bytes, bytes + start, held - start);
    return held - start;
}

/* False: nobody hears it any more. */
static bool pass_answer(int fd, unsigned char *bytes)
{
    ssize_t size = recv(fd, bytes + LENGTH, LARGEST, 0);

    if (size < 0)
        return true; /* nobody listens at the port, mostly */
    bytes[0] = (unsigned char)(size >> 8);
    bytes[1] = (unsigned char)size;
    return write_all(bytes, LENGTH + (size_t)size);
}

int datagrams_child(unsigned short port)
{
    static unsigned char in[LENGTH + LARGEST], out[LENGTH + LARGEST];
    size_t held = 0;
    int fd = open_socket(port);
    struct pollfd polls[2] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = fd, .events = POLLIN}};

    if (fd < 0 || !write_all((const unsigned char *)"+", 1))
        return 1;
    for (;;) {
        if (poll(polls, 2, -1) < 0 && errno != EINTR)
            return 1;
        if (polls[0].revents) {
            ssize_t got = read(STDIN_FILENO, in + held, sizeof in - held);

            if (got == 0 || (got < 0 && errno != EINTR && errno != EAGAIN))
                return got < 0;
            if (got > 0)
                held = send_complete(fd, in, held + (size_t)got);
        }
        if (polls[1].revents && !pass_answer(fd, out))
            return 1;
    }
}
