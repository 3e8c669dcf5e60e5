/* What the emulator's network stack may hear of its guest: what the kernel of a guest sends for ARP, NDP, TCP and UDP, in its plainest form.
 * The stack's code for all else is out of reach: for pieces of packets (where 4.7.0 writes outside of its memory), options, urgent data,
 * ICMP, and for the services that it would offer. */
#include "guard.h"

#include <stdbool.h>
#include <string.h>

enum { ETHERNET = 14, ARP = 28, IPV4 = 20, IPV6 = 40, TCP = 20, UDP = 8, NEIGHBOUR = 24, MTU = 1500 };
enum { IS_TCP = 6, IS_UDP = 17, IS_ICMPV6 = 58, DONT_FRAGMENT = 0x4000, URGENT = 0x20 };
enum { SOLICITATION = 135, ADVERTISEMENT };

static unsigned number(const uint8_t *at)
{
    return (unsigned)at[0] << 8 | at[1];
}

/* Requests and answers, of IPv4 addresses on Ethernet. */
static size_t arp(const uint8_t *packet, size_t size)
{
    static const uint8_t start[] = {0, 1, 8, 0, 6, 4, 0};
    return size >= ARP && memcmp(packet, start, sizeof start) == 0 && (packet[7] == 1 || packet[7] == 2) ? ARP : 0;
}

static bool tcp(const uint8_t *segment, size_t size)
{
    if (size < TCP)
        return false;
    size_t header = (size_t)(segment[12] >> 4) * 4;
    return header >= TCP && header <= size && !(segment[13] & URGENT);
}

/* Anywhere but to the stack's own DHCP, TFTP and DHCPv6. */
static bool udp(const uint8_t *datagram, size_t size)
{
    if (size < UDP || number(datagram + 4) != size)
        return false;
    unsigned port = number(datagram + 2);
    return port != 67 && port != 69 && port != 547;
}

static bool neighbour(const uint8_t *message, size_t size)
{
    return size >= NEIGHBOUR && (message[0] == SOLICITATION || message[0] == ADVERTISEMENT) && message[1] == 0;
}

static size_t ipv4(const uint8_t *packet, size_t size)
{
    if (size < IPV4 || packet[0] != 0x45 || packet[8] == 0)
        return 0;
    size_t total = number(packet + 2);
    if (total < IPV4 || total > size || number(packet + 6) & ~(unsigned)DONT_FRAGMENT)
        return 0;
    bool good = packet[9] == IS_UDP ? udp(packet + IPV4, total - IPV4)
                                    : packet[9] == IS_TCP && total <= MTU && tcp(packet + IPV4, total - IPV4);
    return good ? total : 0;
}

static size_t ipv6(const uint8_t *packet, size_t size)
{
    if (size < IPV6 || packet[0] >> 4 != 6 || packet[7] == 0)
        return 0;
    const uint8_t *rest = packet + IPV6;
    size_t length = number(packet + 4), total = IPV6 + length;
    if (total > size || total > MTU)
        return 0;
    bool good = packet[6] == IS_TCP   ? tcp(rest, length)
                : packet[6] == IS_UDP ? udp(rest, length)
                                      : packet[6] == IS_ICMPV6 && packet[7] == 255 && neighbour(rest, length);
    return good ? total : 0;
}

size_t guard_admitted(const uint8_t *frame, size_t size)
{
    if (size < ETHERNET)
        return 0;
    const uint8_t *packet = frame + ETHERNET;
    size_t heard = 0;
    switch (number(frame + 12)) {
    case 0x0800: heard = ipv4(packet, size - ETHERNET); break;
    case 0x0806: heard = arp(packet, size - ETHERNET); break;
    case 0x86dd: heard = ipv6(packet, size - ETHERNET); break;
    }
    return heard ? ETHERNET + heard : 0;
}
