/* What nc(1) of a small image cannot do. `talk udp ADDRESS PORT SECONDS` sends standard input as one datagram and prints the answer;
 * `talk chat ADDRESS PORT` does so with everything that it reads, and prints all answers; `talk flood ADDRESS COUNT` sends a datagram
 * to so many ports, from as many; `talk echo PORT` serves echo over TCP and UDP; `talk raw SOURCE ADDRESS PORT` sends a datagram with a
 * source of its choice through a raw socket, and `talk pieces …` in two fragments; `talk frames INTERFACE`
 * sends frames of Ethernet from standard input, where each has its length in front (two bytes, the high one first), and
 * `talk datagrams ADDRESS PORT` does so with datagrams. Exit status 1: refused. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

static int refused(const char *step)
{
    perror(step);
    return 1;
}

static int connected(const char *address, const char *port)
{
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(port))};
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons((unsigned short)atoi(port))};
    int is_six = strchr(address, ':') != NULL;
    int fd = socket(is_six ? AF_INET6 : AF_INET, SOCK_DGRAM, 0);

    inet_pton(AF_INET, address, &four.sin_addr);
    inet_pton(AF_INET6, address, &six.sin6_addr);
    return connect(fd, is_six ? (struct sockaddr *)&six : (struct sockaddr *)&four, is_six ? sizeof six : sizeof four) < 0 ? -1 : fd;
}

static int udp(const char *address, const char *port, const char *seconds)
{
    int fd = connected(address, port);
    char bytes[65536];
    ssize_t size = read(0, bytes, sizeof bytes);
    struct pollfd answer = {.fd = fd, .events = POLLIN};

    if (fd < 0)
        return refused("connect");
    if (send(fd, bytes, (size_t)size, 0) < 0)
        return refused("send");
    if (poll(&answer, 1, 1000 * atoi(seconds)) != 1)
        return 1;
    size = recv(fd, bytes, sizeof bytes, 0);
    if (size < 0)
        return refused("recv");
    return write(1, bytes, (size_t)size) != size;
}

static int chat(const char *address, const char *port)
{
    struct pollfd polls[2] = {{.fd = 0, .events = POLLIN}, {.fd = connected(address, port), .events = POLLIN}};
    char bytes[65536];

    if (polls[1].fd < 0)
        return refused("connect");
    while (poll(polls, 2, -1) > 0)
        for (int i = 0; i < 2; i++)
            if (polls[i].revents) {
                ssize_t size = read(polls[i].fd, bytes, sizeof bytes);

                if (size < 0 || (i == 0 && size == 0))
                    return size < 0;
                if (write(i ? 1 : polls[1].fd, bytes, (size_t)size) != size)
                    return refused("write");
            }
    return 1;
}

static int flood(const char *address, const char *count)
{
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(address)};

    for (int i = 0; i < atoi(count); i++) {
        int fd = socket(AF_INET, SOCK_DGRAM, 0);

        peer.sin_port = htons((unsigned short)(20000 + i));
        if (sendto(fd, "flood", 5, 0, (struct sockaddr *)&peer, sizeof peer) < 0)
            return refused("sendto");
        close(fd);
    }
    return 0;
}

static int raw(const char *source, const char *address, const char *port, int pieces)
{
    struct {
        struct iphdr ip;
        struct udphdr udp;
        char text[8];
    } packet = {.ip = {.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_UDP, .id = 77}, .text = "raw"};
    struct {
        struct iphdr ip;
        char text[8];
    } rest = {.text = "rest"};
    struct sockaddr_in target = {.sin_family = AF_INET};
    int on = 1, fd = socket(AF_INET, SOCK_RAW, IPPROTO_UDP);
    unsigned short length = sizeof packet - sizeof packet.ip;

    packet.ip.tot_len = htons(sizeof packet);
    packet.ip.saddr = inet_addr(source);
    packet.ip.daddr = target.sin_addr.s_addr = inet_addr(address);
    packet.udp = (struct udphdr){.source = htons(4444), .dest = htons((unsigned short)atoi(port)), .len = htons(length)};
    if (fd < 0 || setsockopt(fd, IPPROTO_IP, IP_HDRINCL, &on, sizeof on) < 0)
        return refused("a raw socket");
    if (pieces) {
        setsockopt(fd, IPPROTO_IP, IP_NODEFRAG, &on, sizeof on);
        packet.udp.len = htons(length + sizeof rest.text);
        packet.ip.frag_off = htons(IP_MF);
        rest.ip = packet.ip;
        rest.ip.tot_len = htons(sizeof rest);
        rest.ip.frag_off = htons(length / 8);
    }
    if (sendto(fd, &packet, sizeof packet, 0, (struct sockaddr *)&target, sizeof target) < 0
        || (pieces && sendto(fd, &rest, sizeof rest, 0, (struct sockaddr *)&target, sizeof target) < 0))
        return refused("sendto");
    return 0;
}

static void echo_datagrams(struct sockaddr_in address)
{
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    char bytes[65536];

    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return;
    for (;;) {
        socklen_t length = sizeof address;
        ssize_t size = recvfrom(fd, bytes, sizeof bytes, 0, (struct sockaddr *)&address, &length);

        if (size < 0 || sendto(fd, bytes, (size_t)size, 0, (struct sockaddr *)&address, length) != size)
            return;
    }
}

/* Send what is on standard input, piece by piece. */
static int send_pieces(int fd, const struct sockaddr *target, socklen_t size)
{
    unsigned char length[2];
    char bytes[65536];

    while (fread(length, sizeof length, 1, stdin) == 1) {
        size_t count = fread(bytes, 1, (size_t)(length[0] << 8 | length[1]), stdin);

        if (sendto(fd, bytes, count, 0, target, size) < 0)
            return refused("sendto");
    }
    return 0;
}

static int frames(const char *interface)
{
    struct sockaddr_ll link = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(interface)};
    int fd = socket(AF_PACKET, SOCK_RAW, 0);

    return fd < 0 ? refused("a packet socket") : send_pieces(fd, (struct sockaddr *)&link, sizeof link);
}

static int datagrams(const char *address, const char *port)
{
    int fd = connected(address, port);

    return fd < 0 ? refused("connect") : send_pieces(fd, NULL, 0);
}

/* Echo to every connection, each in a process of its own, until it ends. */
static int echo(const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(port))};
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    char bytes[65536];

    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 1024) < 0)
        return refused("listening");
    signal(SIGCHLD, SIG_IGN);
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        echo_datagrams(address);
        return 1;
    }
    if (write(1, "listening\n", 10) != 10)
        return 1;
    for (;;) {
        int connection = accept(listener, NULL, NULL);
        if (fork() == 0) {
            ssize_t size;
            while ((size = read(connection, bytes, sizeof bytes)) > 0)
                for (ssize_t sent = 0, put; sent < size; sent += put)
                    if ((put = write(connection, bytes + sent, (size_t)(size - sent))) < 0)
                        return 1;
            return 0;
        }
        close(connection);
    }
}

int main(int argc, char **argv)
{
    if (argc == 5 && !strcmp(argv[1], "udp"))
        return udp(argv[2], argv[3], argv[4]);
    if (argc == 4 && !strcmp(argv[1], "chat"))
        return chat(argv[2], argv[3]);
    if (argc == 4 && !strcmp(argv[1], "flood"))
        return flood(argv[2], argv[3]);
    if (argc == 3 && !strcmp(argv[1], "echo"))
        return echo(argv[2]);
    if (argc == 3 && !strcmp(argv[1], "frames"))
        return frames(argv[2]);
    if (argc == 4 && !strcmp(argv[1], "datagrams"))
        return datagrams(argv[2], argv[3]);
    if (argc == 5 && !strcmp(argv[1], "pieces"))
        return raw(argv[2], argv[3], argv[4], 1);
    return argc == 5 && !strcmp(argv[1], "raw") ? raw(argv[2], argv[3], argv[4], 0) : 2;
}
