#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "conn.h"
#include "hold.h"
#include "nic.h"
#include "oom.h"
#include "power.h"
#include "watch.h"

enum { SIGNAL_MAX = 64, RECORD_SIZE = 40 };

static void hello(struct conn *conn, const struct frame *frame)
{
    uint8_t payload[16];
    if (get32(frame->payload) != PROTO_VERSION) {
        conn_fail(conn, frame->req, frame->id, F_UNSUPPORTED, 0, "this agent speaks version 1 of the protocol");
        return;
    }
    put32(put32(put32(put32(payload, PROTO_VERSION), WINDOW_SIZE), conn->number == 0), (uint32_t)power_uptime_ms());
    conn_reply(conn, frame, HELLO_OK, payload, sizeof payload);
}

/* The running execution a request is about, or NULL after the reply. */
static struct exec *running(struct conn *conn, const struct frame *frame)
{
    struct exec *exec = exec_find(frame->id);
    if (exec && exec->state == EXEC_RUNNING)
        return exec;
    if ((exec && exec->state == EXEC_EXITED) || exec_evicted(frame->id))
        conn_fail(conn, frame->req, frame->id, F_FINISHED, 0, "the execution has finished");
    else
        conn_fail(conn, frame->req, frame->id, F_NOT_FOUND, 0, "no such execution");
    return NULL;
}

static bool stdin_bytes(struct conn *conn, const struct frame *frame)
{
    struct exec *exec = exec_find(frame->id);
    struct watcher *watcher = exec ? watch_find(exec, conn) : NULL;
    if (!watcher || exec->in.source.fd < 0 || exec->in.end)
        return true; /* finished, failed to start or closed: STDIN_CLOSED or EXITED is on its way */
    if (frame->length > watcher->credit)
        return false;
    watcher->credit -= frame->length;
    input_write(exec, watcher, frame->payload, frame->length);
    return true;
}

static void send_signal(struct conn *conn, const struct frame *frame)
{
    uint32_t number = get32(frame->payload);
    struct exec *exec;
    if (number < 1 || number > SIGNAL_MAX)
        conn_fail(conn, frame->req, frame->id, F_INVALID, 0, "no such signal");
    else if ((exec = running(conn, frame)) && exec_signal(exec, (int)number))
        conn_reply(conn, frame, OK, NULL, 0);
    else if (exec)
        conn_fail(conn, frame->req, frame->id, F_FINISHED, 0, "the execution has finished");
}

static void resize(struct conn *conn, const struct frame *frame)
{
    struct winsize size = {.ws_row = get16(frame->payload), .ws_col = get16(frame->payload + 2)};
    struct exec *exec = running(conn, frame);
    if (!exec)
        return;
    if (!exec->tty || size.ws_row == 0 || size.ws_col == 0)
        conn_fail(conn, frame->req, frame->id, F_INVALID, 0, exec->tty ? "a size of zero" : "the execution has no terminal");
    else if (ioctl(exec->out[0].source.fd, TIOCSWINSZ, &size) < 0)
        conn_fail(conn, frame->req, frame->id, F_FINISHED, 0, "the terminal is closed");
    else
        conn_reply(conn, frame, OK, NULL, 0);
}

static uint8_t *record(uint8_t *p, const struct exec *exec)
{
    memcpy(p, exec->id, ID_SIZE);
    p += ID_SIZE;
    *p++ = exec->state == EXEC_EXITED;
    *p++ = (uint8_t)(exec->tty | exec->has_stdin << 1 | exec->main << 2 | exec->timed_out << 3);
    p = put32(put32(put16(p, 0), (uint32_t)exec->pid), (uint32_t)exec->status);
    return put64(put64(p, exec->started_ns), exec->ended_ns);
}

static void list(struct conn *conn, const struct frame *frame)
{
    struct link *lists[2] = {&exec_finished, &exec_running};
    size_t count = 0;
    for (int i = 0; i < 2; i++)
        list_each(it, lists[i])
            count += entry(it, struct exec, link)->state != EXEC_STARTING;
    if (count > FRAME_PAYLOAD_MAX / RECORD_SIZE)
        count = FRAME_PAYLOAD_MAX / RECORD_SIZE;
    uint8_t *payload = malloc(count * RECORD_SIZE + 1), *p = payload;
    if (!payload) {
        conn_fail(conn, frame->req, frame->id, F_RESOURCE, 0, "out of memory");
        return;
    }
    for (int i = 0; i < 2; i++)
        list_each(it, lists[i]) {
            struct exec *exec = entry(it, struct exec, link);
            if (exec->state != EXEC_STARTING && p < payload + count * RECORD_SIZE)
                p = record(p, exec);
        }
    conn_reply(conn, frame, EXECS, payload, (uint32_t)(p - payload));
    free(payload);
}

static void forget(struct conn *conn, const struct frame *frame)
{
    struct exec *exec = exec_find(frame->id);
    if (!exec && exec_evicted(frame->id)) {
        conn_fail(conn, frame->req, frame->id, F_REAPED, 0, "the execution's log has been released");
    } else if (!exec) {
        conn_fail(conn, frame->req, frame->id, F_NOT_FOUND, 0, "no such execution");
    } else if (exec->state != EXEC_EXITED || exec->main) {
        conn_fail(conn, frame->req, frame->id, F_BUSY, 0, "the execution is running");
    } else {
        exec_forget(exec);
        conn_reply(conn, frame, OK, NULL, 0);
    }
}

static uint64_t count_processes(void)
{
    uint64_t count = 0;
    DIR *directory = opendir("/proc");
    for (struct dirent *file; directory && (file = readdir(directory));)
        count += isdigit((unsigned char)file->d_name[0]) != 0;
    if (directory)
        closedir(directory);
    return count;
}

static void stats(struct conn *conn, const struct frame *frame)
{
    uint8_t payload[56], *p = put64(payload, count_processes());
    p = put64(put64(p, exec_counts.started), exec_counts.failed);
    p = put64(put64(put64(p, exec_counts.output_bytes), exec_counts.input_bytes), power_uptime_ms());
    put64(p, oom_kills());
    conn_reply(conn, frame, STATS_OK, payload, sizeof payload);
}

static void poweroff(struct conn *conn, const struct frame *frame)
{
    uint32_t number = get32(frame->payload + 4);
    if (number > SIGNAL_MAX) {
        conn_fail(conn, frame->req, frame->id, F_INVALID, 0, "no such signal");
        return;
    }
    conn_reply(conn, frame, OK, NULL, 0);
    power_off(get32(frame->payload), (int)number);
}

/* Everything else waits: whoever asks is about to hold the box still, or to end it. */
static void sync_disk(struct conn *conn, const struct frame *frame)
{
    int root = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root >= 0 && syncfs(root) == 0)
        conn_reply(conn, frame, OK, NULL, 0);
    else
        conn_fail(conn, frame->req, frame->id, F_RESOURCE, (uint16_t)errno, strerror(errno));
    if (root >= 0)
        close(root);
}

/* A VM's clock stands still while the VM does. A container's is the host's. */
static void set_clock(struct conn *conn, const struct frame *frame)
{
    uint64_t now = get64(frame->payload);
    struct timespec time = {(time_t)(now / 1000000000u), (long)(now % 1000000000u)};
    if (!conn->number)
        conn_fail(conn, frame->req, frame->id, F_UNSUPPORTED, 0, "the clock is the host's");
    else if (clock_settime(CLOCK_REALTIME, &time) < 0)
        conn_fail(conn, frame->req, frame->id, F_INVALID, (uint16_t)errno, strerror(errno));
    else {
        hold_end();
        conn_reply(conn, frame, OK, NULL, 0);
    }
}

/* A container has no card: its packets end in its own namespace. */
static void network(struct conn *conn, const struct frame *frame)
{
    const char *wrong = conn->number ? nic_up(frame->payload) : "not a VM";
    if (wrong)
        conn_fail(conn, frame->req, frame->id, F_UNSUPPORTED, 0, wrong);
    else
        conn_reply(conn, frame, OK, NULL, 0);
}

/* Exact sizes of the payloads, or the bounds where they vary. */
static const struct {
    uint32_t least, most;
} payload_size[REQUEST_LAST + 1] = {
    [HELLO] = {4, 4}, [START] = {1, FRAME_PAYLOAD_MAX}, [ATTACH] = {17, 17}, [DETACH] = {1, 1}, [ACK] = {8, 8},
    [STDIN] = {1, FRAME_PAYLOAD_MAX}, [SIGNAL] = {4, 4}, [RESIZE] = {4, 4}, [POWEROFF] = {8, 8}, [PING] = {0, 64}, [CLOCK] = {8, 8},
    [NETWORK] = {NIC_SETTINGS, NIC_SETTINGS},
};

bool request_handle(struct conn *conn, const struct frame *frame)
{
    if (frame->length < payload_size[frame->type].least || frame->length > payload_size[frame->type].most) {
        conn_fail(conn, frame->req, frame->id, F_INVALID, 0, "the payload has the wrong size");
        return frame->req != 0;
    }
    struct exec *exec;
    switch (frame->type) {
    case HELLO: hello(conn, frame); break;
    case START: exec_start(conn, frame); break;
    case ATTACH: watch_attach(conn, frame); break;
    case DETACH: watch_detach(conn, frame); break;
    case ACK: watch_ack(conn, frame); break;
    case STDIN: return stdin_bytes(conn, frame);
    case STDIN_EOF:
        if ((exec = exec_find(frame->id)))
            input_end(exec);
        break;
    case SIGNAL: send_signal(conn, frame); break;
    case RESIZE: resize(conn, frame); break;
    case LIST: list(conn, frame); break;
    case FORGET: forget(conn, frame); break;
    case STATS: stats(conn, frame); break;
    case POWEROFF: poweroff(conn, frame); break;
    case SHM: watch_share(conn, frame); break;
    case SYNC: sync_disk(conn, frame); break;
    case CLOCK: set_clock(conn, frame); break;
    case NETWORK: network(conn, frame); break;
    case HOLD: hold_ask(conn, frame); break;
    case PING: conn_reply(conn, frame, PONG, frame->payload, frame->length); break;
    }
    return true;
}
