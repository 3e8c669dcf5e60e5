#include "port.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "hold.h"
#include "line.h"

enum { TURN_READS = 8 };

static struct source port = {.fd = -1};
static uint8_t in[2 * LINE_FRAME_MAX], out[LINE_FRAME_MAX];
static size_t in_start, in_end;

bool port_used(void) { return port.fd >= 0; }

/* One frame in one write: the driver queues a write of this size whole, or not at all. */
static bool put(size_t size)
{
    ssize_t put;
    do
        put = write(port.fd, out, size);
    while (put < 0 && errno == EINTR);
    return put == (ssize_t)size;
}

void port_tell(uint8_t type, uint16_t number, const void *payload, size_t size)
{
    uint8_t *rest = line_header(out, type, number, (uint32_t)size);
    if (size > 0)
        memcpy(rest, payload, size);
    while (!put(LINE_HEADER + size)) {
        struct pollfd room = {.fd = port.fd, .events = POLLOUT};
        poll(&room, 1, 1000);
    }
}

ssize_t port_send(struct conn *conn, const struct iovec *part, int parts)
{
    size_t most = conn->credit < LINE_DATA_MAX ? conn->credit : LINE_DATA_MAX, size = 0;
    for (int i = 0; i < parts && size < most; i++) {
        size_t piece = part[i].iov_len < most - size ? part[i].iov_len : most - size;
        memcpy(out + LINE_HEADER + size, part[i].iov_base, piece);
        size += piece;
    }
    line_header(out, LINE_DATA, conn->number, (uint32_t)size);
    if (size > 0 && put(LINE_HEADER + size)) {
        conn->credit -= (uint32_t)size;
        conn->blocked = conn->credit < LINE_DATA_MAX; /* whole frames or none: a rest would have to be copied */
        return (ssize_t)size;
    }
    if (size > 0)
        source_watch(&port, EPOLLIN | EPOLLOUT);
    errno = EAGAIN;
    return -1;
}

void port_log(uint8_t stream, uint64_t position, const struct iovec *place, int pieces, size_t size)
{
    for (int i = 0; i < pieces && size > 0; i++) {
        const uint8_t *from = place[i].iov_base;
        size_t left = place[i].iov_len < size ? place[i].iov_len : size;
        size -= left;
        while (left > 0) {
            uint8_t payload[LINE_DATA_MAX];
            size_t piece = left < sizeof payload - 9 ? left : sizeof payload - 9;
            payload[0] = stream;
            memcpy(put64(payload + 1, position), from, piece);
            port_tell(LINE_LOG, 0, payload, 9 + piece);
            position += piece;
            from += piece;
            left -= piece;
        }
    }
}

void port_exit(int32_t status, bool timed_out, uint64_t unix_ns)
{
    uint8_t payload[13];
    uint8_t *p = put32(payload, (uint32_t)status);
    *p++ = timed_out;
    put64(p, unix_ns);
    port_tell(LINE_EXIT, 0, payload, sizeof payload);
}

static bool fill(void)
{
    if (in_start > 0) {
        memmove(in, in + in_start, in_end - in_start);
        in_end -= in_start;
        in_start = 0;
    }
    ssize_t size = read(port.fd, in + in_end, sizeof in - in_end);
    if (size > 0)
        in_end += (size_t)size;
    return size > 0;
}

static bool next(struct line_frame *frame)
{
    long taken = line_parse(in + in_start, in_end - in_start, frame);
    if (taken < 0)
        _exit(1); /* the keeper is trusted, so this is a bug: the kernel panics, and the host tells of it */
    in_start += (size_t)taken;
    return taken > 0;
}

void port_read(struct line_frame *frame)
{
    while (!next(frame)) {
        struct pollfd state = {.fd = port.fd, .events = POLLIN};
        if (!fill())
            poll(&state, 1, state.revents & POLLHUP ? 10 : -1);
    }
}

static void act(const struct line_frame *frame)
{
    struct conn *conn = conn_find(frame->number);
    if (frame->type == LINE_OPEN) {
        if (!conn_open(frame->number, LINE_CREDIT))
            port_tell(LINE_CLOSE, frame->number, NULL, 0);
    } else if (frame->type == LINE_HELD) {
        hold();
    } else if (!conn) {
        return; /* closed meanwhile */
    } else if (frame->type == LINE_CLOSE) {
        conn->number = 0;
        conn_close(conn);
    } else if (frame->type == LINE_DATA) {
        conn_receive(conn, frame->payload, frame->length);
    } else if (frame->type == LINE_CREDIT_MORE && frame->length == 4) {
        conn->credit += get32(frame->payload);
        conn->blocked = conn->credit < LINE_DATA_MAX;
    }
}

static void ready(struct source *source, uint32_t events)
{
    struct line_frame frame;
    if (events & EPOLLOUT) {
        source_watch(source, EPOLLIN);
        conn_unblock();
    }
    for (int i = 0; i < TURN_READS && fill(); i++)
        while (next(&frame))
            act(&frame);
}

void port_open(int fd) { source_init(&port, fd, ready); }

void port_serve(void) { source_watch(&port, EPOLLIN); }
