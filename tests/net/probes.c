/* Attempts to reach somebody, all at once. Each line of standard input is one: `NAME KIND WHERE PORT HEX`, where HEX is what to say.
 *
 *     tcp, udp     WHERE is an address
 *     icmp         an echo request to the address WHERE; HEX is its payload
 *     unix         a connection to the abstract name WHERE
 *     raw          a datagram to the address WHERE by a raw socket
 *     packet       the frame HEX by a packet socket on the interface WHERE; PORT is whose answer is awaited
 *
 * What becomes of each is told as it happens: `NAME sent`, `NAME refused WHY`, `NAME answer HEX`. It ends when all have ended; none waits
 * for longer than half a minute. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <netinet/udp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SECONDS = 30, OWN_PORT = 4445, MOST = 4096 };

union address {
    struct sockaddr any;
    struct sockaddr_in four;
    struct sockaddr_in6 six;
    struct sockaddr_un local;
    struct sockaddr_ll link;
};

struct probe {
    char name[64], kind[16], where[64], hex[2 * MOST + 1];
    unsigned port;
    unsigned char said[MOST];
    size_t size;
};

/* One write, so that lines stay whole. */
static void tell(const struct probe *probe, const char *what, const char *more)
{
    char line[2 * MOST + 128];
    int length = snprintf(line, sizeof line, "%s %s %s\n", probe->name, what, more);

    if (write(1, line, (size_t)length) != length)
        _exit(2);
}

static _Noreturn void refused(const struct probe *probe)
{
    tell(probe, "refused", strerrorname_np(errno));
    _exit(0);
}

static socklen_t resolve(const struct probe *probe, union address *address)
{
    *address = (union address){0};
    if (strchr(probe->where, ':')) {
        address->six.sin6_family = AF_INET6;
        address->six.sin6_port = htons((unsigned short)probe->port);
        inet_pton(AF_INET6, probe->where, &address->six.sin6_addr);
        return sizeof address->six;
    }
    address->four.sin_family = AF_INET;
    address->four.sin_port = htons((unsigned short)probe->port);
    inet_pton(AF_INET, probe->where, &address->four.sin_addr);
    return sizeof address->four;
}

static socklen_t resolve_local(const struct probe *probe, union address *address)
{
    *address = (union address){.local.sun_family = AF_UNIX};
    memcpy(address->local.sun_path + 1, probe->where, strlen(probe->where));
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(probe->where));
}

static socklen_t resolve_link(const struct probe *probe, union address *address)
{
    *address = (union address){.link = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP)}};
    address->link.sll_ifindex = (int)if_nametoindex(probe->where);
    return sizeof address->link;
}

static unsigned short sum(const void *bytes, size_t size)
{
    unsigned total = 0;
    unsigned short word;

    for (size_t i = 0; i + 1 < size; i += 2) {
        memcpy(&word, (const char *)bytes + i, sizeof word);
        total += word;
    }
    if (size % 2)
        total += ((const unsigned char *)bytes)[size - 1];
    total = (total & 0xffff) + (total >> 16);
    return (unsigned short)~(total + (total >> 16));
}

/* What stands in front of what is said: a header that the kernel leaves to those who use raw sockets. */
static size_t wrap(const struct probe *probe, int kind, unsigned char *packet)
{
    struct udphdr udp = {.source = htons(OWN_PORT), .dest = htons((unsigned short)probe->port), .len = htons((unsigned short)(sizeof udp + probe->size))};
    struct icmphdr echo = {.type = ICMP_ECHO, .un.echo.id = htons(OWN_PORT)};

    if (kind == IPPROTO_UDP)
        memcpy(packet, &udp, sizeof udp);
    else
        memcpy(packet, &echo, sizeof echo);
    memcpy(packet + 8, probe->said, probe->size);
    if (kind == IPPROTO_ICMP) {
        echo.checksum = sum(packet, 8 + probe->size);
        memcpy(packet, &echo, sizeof echo);
    }
    return 8 + probe->size;
}

/* Whether a packet is what the peer answers: peers say again what they were told, where this one's name is in. */
static int is_answer(const struct probe *probe, int kind, const unsigned char *packet, size_t size)
{
    size_t head = (size_t)(packet[0] & 15) * 4;

    if (size < head + 8 || packet[9] != kind || !memmem(packet + head, size - head, probe->name, strlen(probe->name)))
        return 0;
    return kind == IPPROTO_ICMP ? packet[head] == ICMP_ECHOREPLY : (unsigned)(packet[head] << 8 | packet[head + 1]) == probe->port;
}

static void answered(const struct probe *probe, const unsigned char *bytes, size_t size)
{
    char hex[2 * MOST + 1];

    for (size_t i = 0; i < size; i++)
        snprintf(hex + 2 * i, 3, "%02x", bytes[i]);
    hex[2 * size] = 0;
    tell(probe, "answer", hex);
}

static void attempt(struct probe *probe)
{
    const struct timeval patience = {.tv_sec = SECONDS};
    unsigned char bytes[MOST];
    union address address;
    int is_packet = !strcmp(probe->kind, "packet"), is_icmp = !strcmp(probe->kind, "icmp"), is_raw = is_icmp || !strcmp(probe->kind, "raw");
    int is_local = !strcmp(probe->kind, "unix"), is_stream = is_local || !strcmp(probe->kind, "tcp");
    socklen_t length = (is_local ? resolve_local : is_packet ? resolve_link : resolve)(probe, &address);
    int protocol = is_icmp ? IPPROTO_ICMP : is_raw ? IPPROTO_UDP : 0;
    int fd = socket(address.any.sa_family, is_raw || is_packet ? SOCK_RAW : is_stream ? SOCK_STREAM : SOCK_DGRAM, protocol);
    ssize_t size;

    if (fd < 0)
        refused(probe);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if ((is_packet ? bind : connect)(fd, &address.any, length) < 0)
        refused(probe);
    if (is_raw)
        size = send(fd, bytes, wrap(probe, protocol, bytes), 0);
    else
        size = send(fd, probe->said, probe->size, MSG_NOSIGNAL);
    if (size < 0)
        refused(probe);
    tell(probe, "sent", "");
    do
        if ((size = recv(fd, bytes, sizeof bytes / 2, 0)) < 0)
            refused(probe);
    while ((is_raw && !is_answer(probe, protocol, bytes, (size_t)size))
           || (is_packet && !is_answer(probe, IPPROTO_UDP, bytes + sizeof(struct ether_header), (size_t)size - sizeof(struct ether_header))));
    if (size == 0 && is_stream)
        tell(probe, "refused", "end");
    else
        answered(probe, bytes, (size_t)size);
}

int main(void)
{
    static struct probe probe;

    while (scanf("%63s %15s %63s %u %8192s", probe.name, probe.kind, probe.where, &probe.port, probe.hex) == 5) {
        for (probe.size = 0; sscanf(probe.hex + 2 * probe.size, "%2hhx", probe.said + probe.size) == 1; probe.size++)
            ;
        if (fork() == 0) {
            attempt(&probe);
            _exit(0);
        }
    }
    while (wait(NULL) > 0)
        ;
    return 0;
}
