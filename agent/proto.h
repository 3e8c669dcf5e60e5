/* The agent protocol: frames and START attributes. Pure: bytes in, values out. See docs/agent-protocol.md. */
#ifndef HUTCH_PROTO_H
#define HUTCH_PROTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    PROTO_VERSION = 1,
    FRAME_HEADER = 24,
    FRAME_PAYLOAD_MAX = 1 << 20,
    ID_SIZE = 12,
    DATA_MAX = 256 * 1024,
};

enum frame_type {
    HELLO = 1, START, ATTACH, DETACH, ACK, STDIN, STDIN_EOF, SIGNAL, RESIZE, LIST, FORGET, STATS, POWEROFF, SHM, PING, SYNC, CLOCK,
    NETWORK, HOLD, REQUEST_LAST = HOLD,
    HELLO_OK = 64, STARTED, ATTACHED, EXECS, STATS_OK, SHM_OK, PONG, OK, FAILED,
    DATA = 80, GAP, RANGE, END, EXITED, STDIN_CREDIT, STDIN_CLOSED,
};

enum failure {
    F_INVALID = 1, F_NOT_FOUND, F_EXISTS, F_FINISHED, F_BUSY, F_REAPED, F_UNSUPPORTED, F_RESOURCE,
    F_COMMAND_NOT_FOUND = 16, F_NOT_EXECUTABLE, F_BAD_CWD, F_BAD_USER, F_START_FAILED,
};

enum start_flag { START_STDIN = 1, START_MAIN = 2, START_WATCH = 4 };

struct frame {
    uint32_t length;
    uint8_t type;
    uint8_t stream;
    uint32_t req;
    char id[ID_SIZE];
    uint8_t *payload; /* points into the parsed buffer */
};

static inline uint16_t get16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static inline uint32_t get32(const uint8_t *p) { return get16(p) | (uint32_t)get16(p + 2) << 16; }
static inline uint64_t get64(const uint8_t *p) { return get32(p) | (uint64_t)get32(p + 4) << 32; }

static inline uint8_t *put16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
    return p + 2;
}

static inline uint8_t *put32(uint8_t *p, uint32_t v) { return put16(put16(p, (uint16_t)v), (uint16_t)(v >> 16)); }
static inline uint8_t *put64(uint8_t *p, uint64_t v) { return put32(put32(p, (uint32_t)v), (uint32_t)(v >> 32)); }

/* Look for one request frame at the start of `bytes`. Returns its whole size, 0 if more bytes are needed (`frame->length` is right as
 * soon as the header is complete), -1 if the bytes are no legal frame. */
long frame_parse(uint8_t *bytes, size_t size, struct frame *frame);

/* Write a header; returns the place of the payload. `id` may be NULL. */
uint8_t *frame_header(uint8_t *to, uint8_t type, uint8_t stream, uint32_t req, const char *id, uint32_t length);

struct start_limit {
    uint32_t resource;
    uint64_t soft, hard;
};

struct start_request {
    char **argv; /* NULL-terminated */
    char **env;  /* NULL-terminated, with one slot to spare behind the NULL */
    size_t env_count;
    const char *cwd;
    const char *user;
    bool tty;
    uint16_t rows, cols;
    uint32_t flags;
    uint64_t timeout_ms, kill_after_ms, linger_ms;
    struct start_limit *limits;
    size_t limit_count;
    int file_op; /* 0: none */
    const char *file_path;
};

/* Parse the payload of START in place (strings are terminated inside `bytes`, which must outlive the request).
 * Returns NULL, or what is wrong with it. start_free is due only after success. */
const char *start_parse(uint8_t *bytes, size_t size, struct start_request *request);
void start_free(struct start_request *request);

#endif
