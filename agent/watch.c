#include "watch.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "conn.h"
#include "line.h"

enum {
    DATA_SIZE = 64 * 1024,       /* one DATA frame: fits a socket buffer a few times */
    LINE_DATA_SIZE = LINE_DATA_MAX - FRAME_HEADER - 8, /* over a VM's line: it goes in one write */
    CREDIT_BATCH = 16 * 1024,    /* stdin credit goes back in steps */
    LOST_HOLDS = 7,              /* a watcher that was cut off tries to come back for a minute */
};

static void mark_ready(struct watcher *watcher)
{
    if (!watcher->conn->closed && list_empty(&watcher->of_ready))
        list_append(&watcher->conn->ready, &watcher->of_ready);
}

struct watcher *watch_find(struct exec *exec, struct conn *conn)
{
    list_each(it, &exec->watchers) {
        struct watcher *watcher = entry(it, struct watcher, of_exec);
        if (watcher->conn == conn)
            return watcher;
    }
    return NULL;
}

static struct watcher *add(struct exec *exec, struct conn *conn)
{
    struct watcher *watcher = calloc(1, sizeof *watcher);
    if (!watcher)
        return NULL;
    watcher->exec = exec;
    watcher->conn = conn;
    list_append(&exec->watchers, &watcher->of_exec);
    list_append(&conn->watchers, &watcher->of_conn);
    list_init(&watcher->of_ready);
    return watcher;
}

uint64_t watch_acked(const struct stream *stream)
{
    uint64_t lowest = stream->window.head;
    list_each(it, &stream->exec->watchers) {
        const struct cursor *cursor = &entry(it, struct watcher, of_exec)->at[stream->number - 1];
        if (cursor->attached && cursor->acked < lowest)
            lowest = cursor->acked;
    }
    return lowest;
}

static void attach_stream(struct watcher *watcher, int index, uint64_t position)
{
    struct cursor *cursor = &watcher->at[index];
    struct stream *stream = &watcher->exec->out[index];
    if (!cursor->attached)
        stream->watchers++;
    *cursor = (struct cursor){.next = position, .acked = position, .attached = true};
    stream->held = false;
    timer_clear(&stream->hold);
    stream_update(stream);
}

/* The stream loses a watcher. What that watcher had not acknowledged is held back for the next one if the loss was not orderly. */
static void detach_stream(struct watcher *watcher, int index, bool orderly)
{
    struct cursor *cursor = &watcher->at[index];
    struct stream *stream = &watcher->exec->out[index];
    if (!cursor->attached)
        return;
    cursor->attached = false;
    if (--stream->watchers > 0)
        stream_update(stream);
    else if (orderly)
        stream_unread(stream);
    else
        stream_hold(stream, cursor->acked, LOST_HOLDS);
}

static void unlink_watcher(struct watcher *watcher)
{
    input_orphan(watcher->exec, watcher);
    list_remove(&watcher->of_exec);
    list_remove(&watcher->of_conn);
    list_remove(&watcher->of_ready);
    loop_free(&watcher->of_exec);
}

void watch_remove(struct watcher *watcher)
{
    for (int i = 0; i < 2; i++)
        detach_stream(watcher, i, false);
    unlink_watcher(watcher);
}

/* Everything that this watcher can get was sent: it can be released. */
static bool satisfied(const struct watcher *watcher)
{
    for (int i = 0; i < 2; i++)
        if (watcher->at[i].attached && !watcher->at[i].ended)
            return false;
    return watcher->told;
}

static void tell_exited(struct watcher *watcher)
{
    const struct exec *exec = watcher->exec;
    uint8_t payload[40] = {0};
    put32(payload, (uint32_t)exec->status);
    payload[4] = (uint8_t)(exec->timed_out | exec->core_dumped << 1 | exec->memory_ran_out << 2);
    put64(put64(put64(put64(payload + 8, exec->ended_ns), exec->user_us), exec->system_us), exec->max_rss);
    conn_send(watcher->conn, EXITED, 0, 0, exec->id, payload, sizeof payload);
    watcher->told = true;
}

static void tell_gap(struct watcher *watcher, int index, uint64_t from, uint64_t to)
{
    uint8_t payload[16];
    put64(put64(payload, from), to);
    conn_send(watcher->conn, GAP, (uint8_t)(index + 1), 0, watcher->exec->id, payload, sizeof payload);
}

static void tell_attached(struct watcher *watcher, uint32_t req)
{
    uint8_t payload[16] = {0};
    put32(payload, watcher->credit);
    payload[4] = watcher->exec->state == EXEC_EXITED;
    put64(payload + 8, watcher->exec->in.accepted);
    if (req)
        conn_send(watcher->conn, ATTACHED, 0, req, watcher->exec->id, payload, sizeof payload);
}

/* Credit is granted once; a new ATTACH on the same connection tells what is left of it. */
static void grant(struct watcher *watcher)
{
    if (!watcher->granted)
        watcher->credit = input_adopt(watcher->exec, watcher);
    watcher->granted = true;
}

struct watcher *watch_starter(struct exec *exec, struct conn *conn, uint32_t req, bool all)
{
    struct watcher *watcher = add(exec, conn);
    if (!watcher)
        return NULL;
    watcher->starter = true;
    watcher->req = req;
    for (int i = 0; all && i < 2; i++)
        attach_stream(watcher, i, 0);
    if (all)
        grant(watcher);
    return watcher;
}

void watch_started(struct exec *exec)
{
    uint8_t pid[4];
    put32(pid, (uint32_t)exec->pid);
    list_each(it, &exec->watchers) {
        struct watcher *watcher = entry(it, struct watcher, of_exec);
        if (watcher->starter && watcher->req)
            conn_send(watcher->conn, STARTED, 0, watcher->req, exec->id, pid, sizeof pid);
        if (watcher->attaching) {
            watcher->attaching = false;
            grant(watcher);
            tell_attached(watcher, watcher->req);
        }
        mark_ready(watcher);
    }
}

void watch_failed(struct exec *exec, uint16_t code, uint16_t error, const char *message)
{
    list_each(it, &exec->watchers) {
        struct watcher *watcher = entry(it, struct watcher, of_exec);
        if (watcher->starter)
            conn_fail(watcher->conn, watcher->req, exec->id, code, error, message);
        else
            conn_fail(watcher->conn, watcher->req, exec->id, F_NOT_FOUND, 0, "the execution could not be started");
        unlink_watcher(watcher);
    }
}

void watch_attach(struct conn *conn, const struct frame *frame)
{
    struct exec *exec = exec_find(frame->id);
    if (!exec) {
        bool reaped = exec_evicted(frame->id);
        conn_fail(conn, frame->req, frame->id, reaped ? F_REAPED : F_NOT_FOUND, 0,
                  reaped ? "the execution's log has been released" : "no such execution");
        return;
    }
    uint8_t streams = frame->payload[0];
    uint64_t position[2] = {get64(frame->payload + 1), get64(frame->payload + 9)};
    for (int i = 0; i < 2; i++)
        if ((streams & 1 << i) && position[i] > exec->out[i].window.head) {
            conn_fail(conn, frame->req, frame->id, F_INVALID, 0, "the position is beyond the end of the stream");
            return;
        }
    struct watcher *watcher = watch_find(exec, conn);
    if (watcher && (watcher->starter || watcher->attaching) && exec->state == EXEC_STARTING) {
        conn_fail(conn, frame->req, frame->id, F_BUSY, 0, "the execution is being started");
        return;
    }
    if (!watcher && !(watcher = add(exec, conn))) {
        conn_fail(conn, frame->req, frame->id, F_RESOURCE, ENOMEM, "out of memory");
        return;
    }
    for (int i = 0; i < 2; i++) {
        uint64_t tail = window_tail(&exec->out[i].window);
        if (streams & 1 << i) /* the others stay as they are: DETACH is what detaches */
            attach_stream(watcher, i, position[i] < tail ? tail : position[i]);
    }
    if (exec->state == EXEC_STARTING) {
        watcher->attaching = true;
        watcher->req = frame->req;
        return;
    }
    /* From here on the connection may break, which releases the watcher. */
    grant(watcher);
    tell_attached(watcher, frame->req);
    if (exec->state == EXEC_EXITED)
        tell_exited(watcher);
    for (int i = 0; i < 2; i++)
        if ((streams & 1 << i) && position[i] < watcher->at[i].next)
            tell_gap(watcher, i, position[i], watcher->at[i].next);
    mark_ready(watcher);
}

void watch_detach(struct conn *conn, const struct frame *frame)
{
    struct exec *exec = exec_find(frame->id);
    struct watcher *watcher = exec ? watch_find(exec, conn) : NULL;
    for (int i = 0; watcher && i < 2; i++)
        if (frame->payload[0] & 1 << i)
            detach_stream(watcher, i, true);
    if (watcher)
        mark_ready(watcher);
    if (exec)
        conn_reply(conn, frame, OK, NULL, 0);
    else
        conn_fail(conn, frame->req, frame->id, F_NOT_FOUND, 0, "no such execution");
}

void watch_ack(struct conn *conn, const struct frame *frame)
{
    struct exec *exec = exec_find(frame->id);
    struct watcher *watcher = exec && frame->stream ? watch_find(exec, conn) : NULL;
    if (!watcher)
        return;
    struct cursor *cursor = &watcher->at[frame->stream - 1];
    uint64_t position = get64(frame->payload);
    if (!cursor->attached || position <= cursor->acked)
        return;
    if (position > cursor->next) {
        conn_close(conn);
        return;
    }
    cursor->acked = position;
    stream_update(&exec->out[frame->stream - 1]);
}

void watch_share(struct conn *conn, const struct frame *frame)
{
    struct exec *exec = exec_find(frame->id);
    struct watcher *watcher = exec && frame->stream ? watch_find(exec, conn) : NULL;
    if (!watcher || !watcher->at[frame->stream - 1].attached) {
        uint16_t code = exec && exec->state == EXEC_EXITED ? F_FINISHED : exec ? F_INVALID : F_NOT_FOUND;
        conn_fail(conn, frame->req, frame->id, code, 0, "this connection is not attached to the stream");
        return;
    }
    if (conn->number) {
        conn_fail(conn, frame->req, frame->id, F_UNSUPPORTED, 0, "a VM shares no memory with its host");
        return;
    }
    int fd = window_share(&exec->out[frame->stream - 1].window);
    int copy = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (copy < 0) {
        conn_fail(conn, frame->req, frame->id, errno == ENOSYS || errno == EPERM ? F_UNSUPPORTED : F_RESOURCE,
                  (uint16_t)errno, strerror(errno));
        return;
    }
    uint8_t size[4];
    put32(size, WINDOW_SIZE);
    conn_send_fd(conn, SHM_OK, frame->stream, frame->req, exec->id, size, sizeof size, copy);
    watcher->at[frame->stream - 1].shared = true;
}

void watch_exited(struct exec *exec)
{
    list_each(it, &exec->watchers) {
        struct watcher *watcher = entry(it, struct watcher, of_exec);
        tell_exited(watcher);
        mark_ready(watcher);
    }
}

void watch_output(struct stream *stream)
{
    list_each(it, &stream->exec->watchers)
        mark_ready(entry(it, struct watcher, of_exec));
}

static void send_end(struct watcher *watcher, int index)
{
    const struct stream *stream = &watcher->exec->out[index];
    uint8_t payload[9];
    put64(payload, stream->window.head);
    payload[8] = stream->given_up;
    conn_send(watcher->conn, END, stream->number, 0, watcher->exec->id, payload, sizeof payload);
    watcher->at[index].ended = true;
}

void watch_dropped(struct exec *exec)
{
    list_each(it, &exec->watchers) {
        struct watcher *watcher = entry(it, struct watcher, of_exec);
        for (int i = 0; i < 2; i++) {
            const struct cursor *cursor = &watcher->at[i];
            const struct stream *stream = &exec->out[i];
            if (!cursor->attached || cursor->ended)
                continue;
            if (cursor->next < stream->window.head)
                tell_gap(watcher, i, cursor->next, stream->window.head);
            send_end(watcher, i);
        }
        unlink_watcher(watcher);
    }
}

void watch_input_closed(struct exec *exec)
{
    list_each(it, &exec->watchers)
        conn_send(entry(it, struct watcher, of_exec)->conn, STDIN_CLOSED, 0, 0, exec->id, NULL, 0);
}

void watch_credit(struct watcher *watcher, uint32_t size)
{
    uint8_t payload[4];
    watcher->owed += size;
    if (watcher->owed < CREDIT_BATCH)
        return;
    put32(payload, watcher->owed);
    watcher->credit += watcher->owed;
    watcher->owed = 0;
    conn_send(watcher->conn, STDIN_CREDIT, 0, 0, watcher->exec->id, payload, sizeof payload);
}

static bool produce_stream(struct watcher *watcher, int index)
{
    struct cursor *cursor = &watcher->at[index];
    const struct stream *stream = &watcher->exec->out[index];
    if (!cursor->attached || cursor->ended)
        return false;
    uint64_t left = stream->window.head - cursor->next;
    if (left == 0) {
        if (!stream->open)
            send_end(watcher, index);
        return !stream->open;
    }
    if (cursor->shared) {
        uint8_t payload[12];
        put32(put64(payload, cursor->next), (uint32_t)left);
        conn_send(watcher->conn, RANGE, stream->number, 0, watcher->exec->id, payload, sizeof payload);
    } else {
        struct iovec place[2];
        uint64_t most = watcher->conn->number ? LINE_DATA_SIZE : DATA_SIZE;
        left = left < most ? left : most;
        int pieces = window_find(&stream->window, cursor->next, left, place);
        conn_send_data(watcher->conn, stream->number, watcher->exec->id, cursor->next, place, pieces);
    }
    cursor->next += left;
    return true;
}

bool watch_produce(struct watcher *watcher)
{
    if (watcher->exec->state == EXEC_STARTING)
        return false;
    for (int i = 0; i < 2; i++) {
        unsigned index = watcher->turn++ & 1;
        if (produce_stream(watcher, (int)index))
            return true;
    }
    if (satisfied(watcher))
        unlink_watcher(watcher);
    return false;
}
