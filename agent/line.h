/* The line: one byte stream between a VM's agent and its keeper on the host that carries all connections. See docs/agent-protocol.md. */
#ifndef HUTCH_LINE_H
#define HUTCH_LINE_H

#include <stddef.h>
#include <stdint.h>

#include "proto.h"

enum {
    LINE_HEADER = 8,
    LINE_FRAME_MAX = 32 * 1024, /* what the guest's driver takes in one write, whole or not at all */
    LINE_DATA_MAX = LINE_FRAME_MAX - LINE_HEADER,
    LINE_CREDIT = 512 * 1024, /* of a new connection, towards the host */
};

/* Connection 0 is between agent and keeper themselves. */
enum line_type {
    LINE_OPEN = 1, LINE_CLOSE, LINE_DATA, LINE_CREDIT_MORE, /* of a connection */
    LINE_READY = 16, LINE_RESUME, LINE_UP, LINE_FAILED, LINE_LOG, LINE_EXIT, LINE_OFF,
    LINE_HOLD = 32, LINE_HELD, LINE_GO, /* around a fork of the machine */
};

struct line_frame {
    uint32_t length;
    uint16_t number;
    uint8_t type;
    uint8_t *payload;
};

static inline uint8_t *line_header(uint8_t *to, uint8_t type, uint16_t number, uint32_t length)
{
    to = put16(put32(to, length), number);
    *to++ = type;
    *to++ = 0;
    return to;
}

/* Look for one frame at the start of `bytes`: its whole size, 0 if more bytes are needed, -1 if it is none. */
static inline long line_parse(uint8_t *bytes, size_t size, struct line_frame *frame)
{
    if (size < LINE_HEADER)
        return 0;
    *frame = (struct line_frame){get32(bytes), get16(bytes + 4), bytes[6], bytes + LINE_HEADER};
    if (frame->length > LINE_DATA_MAX || bytes[7] != 0)
        return -1;
    return size < LINE_HEADER + frame->length ? 0 : (long)(LINE_HEADER + frame->length);
}

#endif
