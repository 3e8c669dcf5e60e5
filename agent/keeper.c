#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "launch.h"
#include "line.h"
#include "loop.h"
#include "mainlog.h"

enum {
    CLIENT_MAX = 64,
    IN_ROOM = 512 * 1024,
    OUT_ROOM = 1024 * 1024,
    OUT_FULL = OUT_ROOM / 2, /* clients are read only below; above there is room for frames of our own */
    GRANT = LINE_CREDIT / 4,
    CONSOLE_MAX = 128 * 1024,
    TAIL = 1024,
    END_MS = 3000, /* the emulator's to end, and the clients' to take what is left */
};

struct client {
    struct link link;
    struct source source;
    uint16_t number;
    bool leaving; /* the agent has closed it: it gets what is left */
    uint8_t *out; /* what the socket has not taken; never more than the credit */
    size_t out_start, out_size;
    uint32_t owed; /* credit not yet given back */
};

static const struct keeper *keeper;
static struct link clients = {&clients, &clients};
static unsigned client_count;
static uint16_t last_number;
static struct source control, listener, line, output, emulator, notify;
static struct timer patience;
static uint8_t in[IN_ROOM], out[OUT_ROOM];
static size_t in_size, out_start, out_size;
static off_t console_size;
static char tail[TAIL];
static size_t tail_size;
static bool committed, off, ended, expired;
/* Who is about to fork the machine: until that client speaks or goes, the guest gets no more than so many bytes of `out`. */
static struct client *holder;
static size_t passing;

/* Towards the guest. */

static void flush_line(void)
{
    size_t size;
    while ((size = holder ? passing : out_size) > 0) {
        ssize_t sent = send(line.fd, out + out_start, size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent <= 0)
            break;
        out_start += (size_t)sent;
        out_size -= (size_t)sent;
        passing -= holder ? (size_t)sent : 0;
    }
    if (out_size == 0)
        out_start = 0;
    source_watch(&line, EPOLLIN | (size ? EPOLLOUT : 0));
}

static uint8_t *room(size_t size)
{
    if (out_start + out_size + size > OUT_ROOM) {
        memmove(out, out + out_start, out_size);
        out_start = 0;
    }
    return out_size + size > OUT_ROOM ? NULL : out + out_start + out_size;
}

static void tell_guest(uint8_t type, uint16_t number, const void *payload, size_t size)
{
    uint8_t *place = room(LINE_HEADER + size);
    if (!place)
        return; /* a guest that has not read half a megabyte is not going to */
    uint8_t *rest = line_header(place, type, number, (uint32_t)size);
    if (size > 0)
        memcpy(rest, payload, size);
    out_size += LINE_HEADER + size;
}

/* Clients. */

static void close_client(struct client *client, bool tell)
{
    if (tell)
        tell_guest(LINE_CLOSE, client->number, NULL, 0);
    if (client == holder)
        holder = NULL;
    source_close(&client->source);
    free(client->out);
    list_remove(&client->link);
    client_count--;
    loop_free(&client->link);
}

static void watch_client(struct client *client)
{
    uint32_t events = client->leaving || (out_size >= OUT_FULL && client != holder) ? 0 : EPOLLIN;
    source_watch(&client->source, events | (client->out_size ? EPOLLOUT : 0));
}

static void grant(struct client *client, size_t size)
{
    uint8_t payload[4];
    client->owed += (uint32_t)size;
    if (client->owed >= GRANT && !client->leaving) {
        put32(payload, client->owed);
        tell_guest(LINE_CREDIT_MORE, client->number, payload, sizeof payload);
        client->owed = 0;
    }
}

/* false: the client is gone. */
static bool flush_client(struct client *client)
{
    while (client->out_size > 0) {
        ssize_t sent = send(client->source.fd, client->out + client->out_start, client->out_size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EAGAIN)
            break;
        if (sent < 0) {
            close_client(client, !client->leaving);
            return false;
        }
        client->out_start += (size_t)sent;
        client->out_size -= (size_t)sent;
        grant(client, (size_t)sent);
    }
    if (client->out_size == 0) {
        free(client->out);
        client->out = NULL;
        client->out_start = 0;
        if (client->leaving) {
            close_client(client, false);
            return false;
        }
    }
    watch_client(client);
    return true;
}

static void deliver(struct client *client, const uint8_t *bytes, size_t size)
{
    ssize_t sent = client->out_size ? 0 : send(client->source.fd, bytes, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno != EAGAIN) {
        close_client(client, true);
        return;
    }
    if (sent > 0)
        grant(client, (size_t)sent);
    size_t left = size - (sent > 0 ? (size_t)sent : 0);
    if (left == 0)
        return;
    if (!client->out)
        client->out = malloc(LINE_CREDIT);
    if (!client->out || client->out_size + left > LINE_CREDIT) { /* more than the agent may send */
        close_client(client, true);
        return;
    }
    if (client->out_start + client->out_size + left > LINE_CREDIT) {
        memmove(client->out, client->out + client->out_start, client->out_size);
        client->out_start = 0;
    }
    memcpy(client->out + client->out_start + client->out_size, bytes + (size - left), left);
    client->out_size += left;
    watch_client(client);
}

/* Hand on what a client has sent; false when it is gone. */
static bool receive(struct client *client)
{
    uint8_t *place = room(LINE_FRAME_MAX);
    if (!place)
        return true;
    ssize_t size = recv(client->source.fd, place + LINE_HEADER, LINE_DATA_MAX, MSG_DONTWAIT);
    if (size <= 0) {
        if (size < 0 && (errno == EAGAIN || errno == EINTR))
            return true;
        close_client(client, true);
        return false;
    }
    line_header(place, LINE_DATA, client->number, (uint32_t)size);
    out_size += LINE_HEADER + (size_t)size;
    return true;
}

static void client_ready(struct source *source, uint32_t events)
{
    struct client *client = entry(source, struct client, source);
    if (client == holder && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        holder = NULL;
    if ((events & EPOLLOUT) && !flush_client(client))
        return;
    if (client->leaving) {
        if (events & (EPOLLHUP | EPOLLERR))
            close_client(client, false);
    } else if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        receive(client);
    }
}

/* A writer whose connection broke comes back on a new one: what the old one still holds goes first. */
static void settle_broken(void)
{
    list_each(it, &clients) {
        struct client *client = entry(it, struct client, link);
        struct pollfd state = {.fd = client->source.fd, .events = POLLIN | POLLRDHUP};
        if (client->leaving || poll(&state, 1, 0) <= 0 || !(state.revents & (POLLHUP | POLLRDHUP | POLLERR)))
            continue;
        while (out_size < OUT_FULL && receive(client))
            ;
    }
}

static struct client *find(uint16_t number)
{
    list_each(it, &clients) {
        struct client *client = entry(it, struct client, link);
        if (client->number == number && !client->leaving)
            return client;
    }
    return NULL;
}

static void accept_ready(struct source *source, uint32_t events)
{
    (void)events;
    settle_broken();
    int fd = accept4(source->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    struct client *client = client_count < CLIENT_MAX ? calloc(1, sizeof *client) : NULL;
    if (!client) {
        close(fd);
        return;
    }
    do
        last_number++;
    while (last_number == 0 || find(last_number));
    client->number = last_number;
    source_init(&client->source, fd, client_ready);
    list_append(&clients, &client->link);
    client_count++;
    tell_guest(LINE_OPEN, client->number, NULL, 0);
    watch_client(client);
}

/* From the guest: nothing of it is trusted. */

static void fail(char kind, const char *text, size_t size)
{
    char message[TAIL + 256];
    if (!committed)
        launch_tell(message, (size_t)snprintf(message, sizeof message, "%c%.*s", kind, (int)size, text), -1);
}

/* What follows HELD waits. GO is the first of it. */
static void hold(struct client *client)
{
    if (holder || !room(2 * LINE_HEADER))
        return;
    tell_guest(LINE_HELD, 0, NULL, 0);
    passing = out_size;
    tell_guest(LINE_GO, 0, NULL, 0);
    holder = client;
}

static void act(const struct line_frame *frame)
{
    struct client *client = frame->number ? find(frame->number) : NULL;
    uint8_t *payload = frame->payload;
    uint32_t size = frame->length;
    if (client && frame->type == LINE_DATA) {
        deliver(client, payload, size);
    } else if (client && frame->type == LINE_CLOSE) {
        client->leaving = true;
        flush_client(client);
    } else if (client && frame->type == LINE_HOLD) {
        hold(client);
    } else if (frame->number) {
        return;
    } else if (frame->type == LINE_READY && !committed) {
        launch_tell("B", 1, -1);
    } else if (frame->type == LINE_UP && !committed) {
        launch_tell("R", 1, -1);
    } else if (frame->type == LINE_FAILED) {
        fail('F', (char *)payload, size < TAIL ? size : TAIL);
    } else if (frame->type == LINE_LOG && size > 9 && (payload[0] == 1 || payload[0] == 2)) {
        struct iovec place = {payload + 9, size - 9};
        mainlog_write(payload[0], get64(payload + 1), &place, 1, size - 9);
    } else if (frame->type == LINE_EXIT && size == 13) {
        mainlog_exit((int32_t)get32(payload), payload[4] == 1, get64(payload + 5));
    } else if (frame->type == LINE_OFF && !off) {
        off = true;
        kill(keeper->emulator, SIGTERM); /* it writes what its disks still owe */
        timer_set(&patience, loop_now() + END_MS);
    }
}

static void line_ready(struct source *source, uint32_t events)
{
    size_t used = 0;
    struct line_frame frame;
    (void)events;
    ssize_t size = recv(source->fd, in + in_size, IN_ROOM - in_size, MSG_DONTWAIT);
    if (size == 0 || (size < 0 && errno != EAGAIN && errno != EINTR)) {
        source_close(source); /* the emulator is ending */
        return;
    }
    in_size += size < 0 ? 0 : (size_t)size;
    for (long taken; (taken = line_parse(in + used, in_size - used, &frame)) != 0; used += (size_t)taken) {
        if (taken < 0) {
            kill(keeper->emulator, SIGKILL); /* whoever rules the guest's kernel has left our agent no line */
            source_close(source);
            return;
        }
        act(&frame);
    }
    in_size -= used;
    memmove(in, in + used, in_size);
}

/* What the console and the emulator say. */

static void note(const char *bytes, size_t size)
{
    size_t keep = size < TAIL ? TAIL - size : 0;
    if (tail_size > keep) {
        memmove(tail, tail + tail_size - keep, keep);
        tail_size = keep;
    }
    size_t part = size < TAIL ? size : TAIL;
    memcpy(tail + tail_size, bytes + size - part, part);
    tail_size += part;
    if (console_size + (off_t)size > CONSOLE_MAX && ftruncate(keeper->console_fd, 0) == 0) {
        console_size = 0;
        bytes = tail; /* what is left of the past */
        size = tail_size;
    }
    ssize_t written = write(keeper->console_fd, bytes, size);
    console_size += written > 0 ? written : 0;
}

static void output_ready(struct source *source, uint32_t events)
{
    char bytes[4096];
    (void)events;
    ssize_t size = read(source->fd, bytes, sizeof bytes);
    if (size > 0)
        note(bytes, (size_t)size);
    else if (size == 0)
        source_close(source);
}

static void emulator_ready(struct source *source, uint32_t events)
{
    int status = 0;
    char text[TAIL + 128];
    (void)events;
    source_close(source);
    waitpid(keeper->emulator, &status, 0);
    while (output.fd >= 0 && poll(&(struct pollfd){.fd = output.fd, .events = POLLIN}, 1, 0) > 0)
        output_ready(&output, EPOLLIN);
    int size = snprintf(text, sizeof text, "the emulator ended (%s %d): %.*s", WIFSIGNALED(status) ? "signal" : "exit code",
                        WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status), (int)tail_size, tail);
    fail('E', text, (size_t)size < sizeof text ? (size_t)size : sizeof text - 1);
    if (line.fd >= 0)
        line_ready(&line, EPOLLIN);
    if (!off)
        note("hutch: the emulator ended\n", 26);
    ended = true;
    timer_set(&patience, loop_now() + END_MS);
}

static void patience_over(struct timer *timer)
{
    (void)timer;
    if (ended)
        expired = true;
    else
        kill(keeper->emulator, SIGKILL);
}

static void notify_ready(struct source *source, uint32_t events)
{
    if (events & EPOLLIN)
        memory_answer(source->fd, keeper->memory_fd);
    else
        source_close(source); /* nobody is left who could ask */
}

static void confine(void)
{
    if (seccomp_install() < 0)
        launch_fail("installing the filter of the keeper");
}

/* Before the commit, the host may hand over what resumes the guest. */
static void control_ready(struct source *source, uint32_t events)
{
    char text[LINE_DATA_MAX + 1];
    (void)events;
    ssize_t size = recv(source->fd, text, sizeof text, 0);
    if (size <= 0)
        _exit(1); /* a host that died or gave up: so is the box */
    if (text[0] == 'V') {
        tell_guest(LINE_RESUME, 0, text + 1, (size_t)size - 1);
    } else if (text[0] == 'G') {
        if (keeper->notify_fd >= 0) { /* the emulator has opened its memory, and nothing else of it is looked into */
            source_close(&notify);
            confine();
        }
        committed = true;
        source_watch(&listener, EPOLLIN);
        source_close(source);
    }
}

static bool all_taken(void)
{
    list_each(it, &clients)
        if (entry(it, struct client, link)->out_size > 0)
            return false;
    return true;
}

_Noreturn void keeper_run(const struct keeper *given)
{
    struct stat status;
    keeper = given;
    if (loop_open() < 0)
        launch_fail("event loop");
    if (keeper->notify_fd < 0)
        confine();
    mainlog_open(keeper->log_fd, keeper->exit_fd);
    console_size = fstat(keeper->console_fd, &status) == 0 ? status.st_size : 0;
    timer_init(&patience, patience_over);
    source_init(&control, launch_control, control_ready);
    source_init(&listener, keeper->listen_fd, accept_ready);
    source_init(&line, keeper->line_fd, line_ready);
    source_init(&output, keeper->output_fd, output_ready);
    source_init(&notify, keeper->notify_fd, notify_ready);
    source_init(&emulator, (int)syscall(SYS_pidfd_open, keeper->emulator, 0), emulator_ready);
    if (emulator.fd < 0)
        launch_fail("watching the emulator");
    source_watch(&control, EPOLLIN);
    source_watch(&line, EPOLLIN);
    source_watch(&output, EPOLLIN);
    source_watch(&notify, EPOLLIN);
    source_watch(&emulator, EPOLLIN);
    bool full = false;
    do {
        loop_turn(-1);
        if (line.fd >= 0)
            flush_line();
        if (full != (out_size >= OUT_FULL)) {
            full = !full;
            list_each(it, &clients)
                watch_client(entry(it, struct client, link));
            if (committed)
                source_watch(&listener, full ? 0 : EPOLLIN);
        }
        loop_clean();
    } while (!ended || !(expired || all_taken()));
    _exit(0);
}
