/* libFuzzer: what the guard lets the emulator's network stack hear. Built with agent/guard/admit.c. */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "guard/guard.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

static void demand(bool condition)
{
    if (!condition)
        abort();
}

static void check_transport(uint8_t protocol, const uint8_t *data, size_t size)
{
    if (protocol == 6) {
        demand(size >= 20 && data[12] >= 0x50 && size >= 4u * (data[12] >> 4) && !(data[13] >> 5 & 1));
    } else {
        static const uint8_t closed[] = {67, 69};
        demand(protocol == 17 && size >= 8 && data[4] * 256u + data[5] == size);
        demand(data[2] != 0 || !memchr(closed, data[3], sizeof closed));
        demand(data[2] != 547 / 256 || data[3] != 547 % 256);
    }
}

/* What is heard is what it says it is, of exactly that size, whatever was sent. */
static void check(const uint8_t *frame, size_t size)
{
    const uint8_t *packet = frame + 14;
    demand(size >= 42);
    if (memcmp(frame + 12, "\x08\x06", 2) == 0) {
        demand(size == 42 && memcmp(packet, "\0\1\10\0\6\4\0", 7) == 0 && packet[7] - 1u < 2);
    } else if (memcmp(frame + 12, "\x08\0", 2) == 0) {
        demand(packet[0] == 0x45 && packet[2] * 256u + packet[3] == size - 14 && packet[8]);
        demand((packet[6] == 0 || packet[6] == 0x40) && packet[7] == 0); /* whole */
        demand(size <= 1514 || packet[9] == 17);
        check_transport(packet[9], packet + 20, size - 34);
    } else {
        demand(memcmp(frame + 12, "\x86\xdd", 2) == 0 && packet[0] >> 4 == 6 && packet[7]);
        demand(size <= 1514 && packet[4] * 256u + packet[5] == size - 54);
        if (packet[6] == 58)
            demand(size >= 78 && packet[7] == 255 && (packet[40] == 135 || packet[40] == 136) && packet[41] == 0);
        else
            check_transport(packet[6], packet + 40, size - 54);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *frame = malloc(size ? size : 1);
    memcpy(frame, data, size);
    size_t heard = guard_admitted(frame, size);
    demand(heard <= size && memcmp(frame, data, size) == 0);
    if (heard) {
        check(frame, heard);
        demand(guard_admitted(frame, heard) == heard);
    }
    free(frame);
    return 0;
}

/* Half of what is tried is a packet of a kind that may be heard, whose lengths are right. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
    static const uint8_t kinds[][2] = {{0x08, 0x00}, {0x08, 0x06}, {0x86, 0xdd}}, protocols[] = {6, 17, 58};

    size = LLVMFuzzerMutate(data, size, max_size);
    if (size < 78 || seed % 2)
        return size;
    bool four = seed / 2 % 3 == 0;
    uint8_t protocol = protocols[seed / 6 % 3], *packet = data + 14, *rest = packet + (four ? 20 : 40);
    size_t length = size - (size_t)(rest - data), told = four ? size - 14 : length;
    memcpy(data + 12, kinds[seed / 2 % 3], 2);
    if (seed / 2 % 3 == 1) {
        memcpy(packet, "\0\1\10\0\6\4\0\1", 8);
        return size;
    }
    packet[0] = four ? 0x45 : 0x60;
    packet[four ? 9 : 6] = protocol;
    packet[four ? 2 : 4] = (uint8_t)(told >> 8);
    packet[four ? 3 : 5] = (uint8_t)told;
    if (four && seed / 18 % 4)
        memset(packet + 6, 0, 2);
    if (protocol == 17) {
        rest[4] = (uint8_t)(length >> 8);
        rest[5] = (uint8_t)length;
    }
    return size;
}
