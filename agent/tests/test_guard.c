/* What the guard admits of frames, byte by byte. Built with agent/guard/admit.c. */
#include <stdbool.h>
#include <string.h>

#include "check.h"
#include "guard/guard.h"

static uint8_t frame[66000];

static void put(size_t at, unsigned value)
{
    frame[at] = (uint8_t)(value >> 8);
    frame[at + 1] = (uint8_t)value;
}

/* A packet of IPv4 (or IPv6) with so many bytes after the header, and whatever they are. Returns the frame's size. */
static size_t packet(bool four, uint8_t protocol, size_t length)
{
    memset(frame, 0, sizeof frame);
    put(12, four ? 0x0800 : 0x86dd);
    frame[14] = four ? 0x45 : 0x60;
    put(four ? 16 : 18, (unsigned)(four ? 20 + length : length));
    frame[four ? 22 : 21] = 255;
    frame[four ? 23 : 20] = protocol;
    return (four ? 34 : 54) + length;
}

static size_t udp(bool four, unsigned port, size_t length)
{
    size_t size = packet(four, 17, length), at = size - length;
    put(at + 2, port);
    put(at + 4, (unsigned)length);
    return size;
}

static size_t tcp(bool four, size_t header, size_t length)
{
    size_t size = packet(four, 6, length);
    frame[size - length + 12] = (uint8_t)(header / 4 << 4);
    return size;
}

static size_t arp(unsigned operation)
{
    memset(frame, 0, sizeof frame);
    put(12, 0x0806);
    memcpy(frame + 14, "\0\1\10\0\6\4", 6);
    put(20, operation);
    return 42;
}

static size_t neighbour(uint8_t type)
{
    size_t size = packet(false, 58, 32);
    frame[54] = type;
    return size;
}

static void heard(size_t size, size_t expected)
{
    CHECK(guard_admitted(frame, size) == expected);
}

/* Admitted as it is; not with one byte of it being another, nor without its end. */
static void only(size_t size, size_t at, uint8_t value)
{
    uint8_t was = frame[at];
    heard(size, size);
    heard(size + 9, size); /* padding is not heard */
    for (size_t cut = 0; cut < size; cut++)
        heard(cut, 0);
    frame[at] = value;
    heard(size, 0);
    frame[at] = was;
}

static void both_families(bool four)
{
    size_t start = four ? 34 : 54, most = 1514 - start;

    only(udp(four, 53, 8), 14, four ? 0x65 : 0x40); /* the other version */
    only(udp(four, 53, 100), start + 5, 99);        /* its length */
    only(udp(four, 53, 100), start + 5, 101);
    only(udp(four, 70, 9), start + 3, 69);
    only(udp(four, 68, 9), start + 3, 67);
    only(udp(four, 546, 9), start + 3, 547 & 255);
    only(udp(four, 53, 9), four ? 22 : 21, 0);      /* no hop left */
    only(tcp(four, 20, 20), start + 12, 0x40);
    only(tcp(four, 40, 40), start + 12, 0xb0);
    only(tcp(four, 20, 21), start + 13, 0x20);      /* urgent */
    only(tcp(four, 20, 21), 12, 0x81);              /* another type: a VLAN, for example */
    heard(tcp(four, 20, most), 1514);
    heard(tcp(four, 20, most + 1), 0);
    heard(udp(four, 53, most), 1514);
    heard(udp(four, 53, most + 1), four ? 1515 : 0);
    for (unsigned protocol = 0; protocol < 256; protocol++)
        if (protocol != 6 && protocol != 17)
            heard(packet(four, (uint8_t)protocol, 64), 0);
}

int main(void)
{
    both_families(true);
    both_families(false);
    heard(udp(true, 53, 65515), 65549);
    for (unsigned header = 0; header < 256; header++) { /* options, other versions */
        size_t size = udp(true, 53, 100);
        frame[14] = (uint8_t)header;
        heard(size, header == 0x45 ? size : 0);
    }
    for (unsigned piece = 0; piece <= 0xffff; piece++) {
        size_t size = udp(true, 53, 100);
        put(20, piece);
        heard(size, piece == 0 || piece == 0x4000 ? size : 0);
    }
    for (unsigned operation = 0; operation <= 0xffff; operation++)
        heard(arp(operation), operation == 1 || operation == 2 ? 42 : 0);
    only(arp(1), 18, 8);
    only(arp(2), 17, 6);
    for (unsigned type = 0; type < 256; type++)
        heard(neighbour((uint8_t)type), type == 135 || type == 136 ? 86 : 0);
    only(neighbour(135), 55, 1);
    only(neighbour(136), 21, 254); /* from beyond the link */
    heard(packet(false, 58, 23), 0);
    return 0;
}
