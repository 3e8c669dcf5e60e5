#include "conn.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "line.h"
#include "port.h"
#include "watch.h"

enum {
    IN_ROOM = 16 * 1024,      /* grows for a larger frame ... */
    IN_ROOM_KEPT = 128 * 1024, /* ... and shrinks again if it grew beyond this */
    BLOCK_ROOM = 4096 - 64,
    CONTROL_MAX = 1 << 20,    /* a host that sends requests but reads nothing is disconnected */
    STAGE_MAX = 64 * 1024,    /* small frames gather up to this size before they are sent */
    SMALL_DATA = 2048,        /* data that is cheaper to copy than to send alone */
    TURN_FRAMES = 64,         /* data frames of one connection in one turn of the loop */
    ACCEPT_RETRY_MS = 100,
};

struct block {
    struct link link;
    size_t size, sent, room;
    int fd; /* goes with the first byte; -1: none */
    uint8_t bytes[];
};

static struct link conns = {&conns, &conns};
static unsigned conn_count;
static struct source listener;
static struct timer accept_retry;

static void free_block(struct block *block)
{
    list_remove(&block->link);
    if (block->fd >= 0)
        close(block->fd);
    free(block);
}

void conn_close(struct conn *conn)
{
    if (conn->closed)
        return;
    conn->closed = true;
    conn_count--;
    if (conn->number)
        port_tell(LINE_CLOSE, conn->number, NULL, 0);
    source_close(&conn->source);
    list_each(it, &conn->watchers)
        watch_remove(entry(it, struct watcher, of_conn));
    list_each(it, &conn->out)
        free_block(entry(it, struct block, link));
    free(conn->in);
    conn->in = NULL;
    conn->in_size = 0;
    list_remove(&conn->link);
    loop_free(&conn->link);
}

/* Room for a frame of `size` bytes at the end of the queue; NULL when the connection is or gets closed. */
static uint8_t *queue(struct conn *conn, size_t size, int fd)
{
    if (conn->closed)
        return NULL;
    struct block *block = entry(conn->out.prev, struct block, link);
    if (fd >= 0 || list_empty(&conn->out) || block->fd >= 0 || block->room - block->size < size) {
        size_t room = fd < 0 && size < BLOCK_ROOM ? BLOCK_ROOM : size;
        block = conn->control + size > CONTROL_MAX ? NULL : malloc(sizeof *block + room);
        if (!block) {
            conn_close(conn);
            return NULL;
        }
        *block = (struct block){.room = room, .fd = fd};
        list_append(&conn->out, &block->link);
    }
    uint8_t *place = block->bytes + block->size;
    block->size += size;
    conn->control += size;
    return place;
}

void conn_send_fd(struct conn *conn, uint8_t type, uint8_t stream, uint32_t req, const char *id, const void *payload,
                  uint32_t size, int fd)
{
    uint8_t *place = queue(conn, FRAME_HEADER + size, fd);
    if (place && (place = frame_header(place, type, stream, req, id, size)) && size)
        memcpy(place, payload, size);
    if (!place && fd >= 0)
        close(fd);
}

void conn_send(struct conn *conn, uint8_t type, uint8_t stream, uint32_t req, const char *id, const void *payload,
               uint32_t size)
{
    conn_send_fd(conn, type, stream, req, id, payload, size, -1);
}

void conn_reply(struct conn *conn, const struct frame *frame, uint8_t type, const void *payload, uint32_t size)
{
    if (frame->req)
        conn_send(conn, type, frame->stream, frame->req, frame->id, payload, size);
}

void conn_fail(struct conn *conn, uint32_t req, const char *id, uint16_t code, uint16_t error, const char *message)
{
    uint8_t payload[1024];
    size_t length = strnlen(message, sizeof payload - 4);
    if (!req)
        return;
    memcpy(put16(put16(payload, code), error), message, length);
    conn_send(conn, FAILED, 0, req, id, payload, (uint32_t)(4 + length));
}

static ssize_t transmit(struct conn *conn, const struct msghdr *message)
{
    if (conn->number)
        return port_send(conn, message->msg_iov, (int)message->msg_iovlen);
    return sendmsg(conn->source.fd, message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Send the first block as far as the socket takes it; false when it takes no more. */
static bool flush_block(struct conn *conn, struct block *block)
{
    struct iovec piece = {block->bytes + block->sent, block->size - block->sent};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    if (block->fd >= 0) {
        memset(&control, 0, sizeof control);
        control.header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
        memcpy(CMSG_DATA(&control.header), &block->fd, sizeof(int));
        message.msg_control = &control;
        message.msg_controllen = sizeof control.space;
    }
    ssize_t size = transmit(conn, &message);
    if (size < 0) {
        conn->blocked = errno == EAGAIN;
        if (errno != EAGAIN && errno != EINTR)
            conn_close(conn);
        return false;
    }
    if (block->fd >= 0) {
        close(block->fd);
        block->fd = -1;
    }
    block->sent += (size_t)size;
    conn->control -= (size_t)size;
    if (block->sent < block->size)
        return true; /* the next attempt tells whether the socket is full */
    free_block(block);
    return true;
}

static bool flush(struct conn *conn)
{
    while (!conn->blocked && !conn->closed && !list_empty(&conn->out))
        flush_block(conn, entry(conn->out.next, struct block, link));
    return !conn->blocked && !conn->closed;
}

void conn_send_data(struct conn *conn, uint8_t stream, const char *id, uint64_t position, const struct iovec place[2],
                    int pieces)
{
    uint8_t header[FRAME_HEADER + 8];
    struct iovec part[3] = {{header, sizeof header}, place[0], pieces > 1 ? place[1] : (struct iovec){0}};
    size_t size = part[1].iov_len + part[2].iov_len;
    put64(frame_header(header, DATA, stream, 0, id, (uint32_t)(8 + size)), position);
    size_t total = sizeof header + size, sent = 0;
    if (size > SMALL_DATA && flush(conn)) {
        struct msghdr message = {.msg_iov = part, .msg_iovlen = 3};
        ssize_t taken = transmit(conn, &message);
        if (taken > 0)
            sent = (size_t)taken;
        else if (errno == EAGAIN)
            conn->blocked = true;
        else if (errno != EINTR)
            conn_close(conn);
    }
    uint8_t *rest = sent < total ? queue(conn, total - sent, -1) : NULL;
    for (int i = 0; rest && i < 3; i++) {
        size_t skip = sent < part[i].iov_len ? sent : part[i].iov_len;
        if (part[i].iov_len > skip)
            memcpy(rest, (uint8_t *)part[i].iov_base + skip, part[i].iov_len - skip);
        rest += part[i].iov_len - skip;
        sent -= skip;
    }
}

/* Control frames first, then one frame of each watcher in turn, as long as the socket takes them. */
static void pump(struct conn *conn)
{
    for (int frames = 0; flush(conn) && !list_empty(&conn->ready) && frames < TURN_FRAMES;) {
        while (!list_empty(&conn->ready) && conn->control < STAGE_MAX && !conn->blocked && frames++ < TURN_FRAMES) {
            struct watcher *watcher = entry(conn->ready.next, struct watcher, of_ready);
            list_remove(&watcher->of_ready);
            if (watch_produce(watcher) && !conn->closed)
                list_append(&conn->ready, &watcher->of_ready);
        }
    }
    bool more = !list_empty(&conn->out) || !list_empty(&conn->ready);
    if (conn->closed)
        return;
    if (!conn->number && !source_watch(&conn->source, EPOLLIN | (more ? EPOLLOUT : 0)))
        conn_close(conn);
    else if (conn->number && more && !conn->blocked) /* it has no descriptor whose room could bring the next turn */
        port_go_on();
}

void conn_flush_all(void)
{
    list_each(it, &conns) {
        struct conn *conn = entry(it, struct conn, link);
        if (!list_empty(&conn->out) || !list_empty(&conn->ready))
            pump(conn);
    }
}

bool conn_all_sent(void)
{
    list_each(it, &conns) {
        struct conn *conn = entry(it, struct conn, link);
        if (!list_empty(&conn->out) || !list_empty(&conn->ready))
            return false;
    }
    return true;
}

/* Make room for a frame of this size, the start of which may be in the buffer. */
static bool make_room(struct conn *conn, size_t needed)
{
    if (needed <= conn->in_room && conn->in_room <= IN_ROOM_KEPT)
        return true;
    if (needed < IN_ROOM)
        needed = IN_ROOM;
    uint8_t *in = realloc(conn->in, needed);
    if (!in)
        return false;
    conn->in = in;
    conn->in_room = needed;
    return true;
}

/* Act on the frames that are complete in the buffer. */
static bool handle(struct conn *conn)
{
    size_t used = 0;
    struct frame frame = {0};
    for (;;) {
        long taken = frame_parse(conn->in + used, conn->in_size - used, &frame);
        if (taken < 0)
            return false;
        if (taken == 0)
            break;
        used += (size_t)taken;
        if (!request_handle(conn, &frame) || conn->closed)
            return false;
    }
    conn->in_size -= used;
    memmove(conn->in, conn->in + used, conn->in_size);
    return make_room(conn, FRAME_HEADER + (size_t)frame.length);
}

static bool receive(struct conn *conn)
{
    ssize_t size = recv(conn->source.fd, conn->in + conn->in_size, conn->in_room - conn->in_size, MSG_DONTWAIT);
    if (size < 0)
        return errno == EAGAIN || errno == EINTR;
    if (size == 0)
        return false;
    conn->in_size += (size_t)size;
    return handle(conn);
}

void conn_receive(struct conn *conn, const uint8_t *bytes, size_t size)
{
    while (size > 0 && !conn->closed) {
        size_t room = conn->in_room - conn->in_size, piece = size < room ? size : room;
        memcpy(conn->in + conn->in_size, bytes, piece);
        conn->in_size += piece;
        bytes += piece;
        size -= piece;
        if (!handle(conn))
            conn_close(conn);
    }
}

static void ready(struct source *source, uint32_t events)
{
    struct conn *conn = entry(source, struct conn, source);
    if (events & EPOLLOUT)
        conn->blocked = false;
    if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && !receive(conn))
        conn_close(conn);
}

static void accept_again(struct timer *timer)
{
    (void)timer;
    source_watch(&listener, EPOLLIN);
}

/* A writer whose connection broke comes back on a new one: what the old one still holds comes first. */
static void settle_broken(void)
{
    list_each(it, &conns) {
        struct conn *conn = entry(it, struct conn, link);
        struct pollfd state = {.fd = conn->source.fd, .events = POLLIN | POLLRDHUP};
        if (conn->closed || poll(&state, 1, 0) <= 0 || !(state.revents & (POLLHUP | POLLRDHUP | POLLERR)))
            continue;
        while (receive(conn))
            ;
        conn_close(conn);
    }
}

static struct conn *make(int fd)
{
    struct conn *conn = conn_count < CONN_MAX ? calloc(1, sizeof *conn) : NULL;
    if (!conn || !make_room(conn, IN_ROOM)) {
        free(conn);
        return NULL;
    }
    list_init(&conn->out);
    list_init(&conn->watchers);
    list_init(&conn->ready);
    list_append(&conns, &conn->link);
    conn_count++;
    source_init(&conn->source, fd, ready);
    return conn;
}

static void accept_ready(struct source *source, uint32_t events)
{
    (void)events;
    settle_broken();
    int fd = accept4(source->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
            /* No descriptor or memory left: level-triggered readiness would spin. */
            source_watch(source, 0);
            timer_set(&accept_retry, loop_now() + ACCEPT_RETRY_MS);
        }
        return;
    }
    struct conn *conn = make(fd);
    if (!conn)
        close(fd);
    else if (!source_watch(&conn->source, EPOLLIN))
        conn_close(conn);
}

struct conn *conn_open(uint16_t number, uint32_t credit)
{
    struct conn *conn = make(-1);
    if (conn) {
        conn->number = number;
        conn->credit = credit;
    }
    return conn;
}

struct conn *conn_find(uint16_t number)
{
    list_each(it, &conns) {
        struct conn *conn = entry(it, struct conn, link);
        if (number && conn->number == number)
            return conn;
    }
    return NULL;
}

void conn_unblock(void)
{
    list_each(it, &conns)
        entry(it, struct conn, link)->blocked = false;
}

void conn_lose_all(void)
{
    list_each(it, &conns) {
        struct conn *conn = entry(it, struct conn, link);
        conn->number = 0;
        conn_close(conn);
    }
}

void conn_listen(int fd)
{
    timer_init(&accept_retry, accept_again);
    source_init(&listener, fd, accept_ready);
    source_watch(&listener, EPOLLIN);
}
