#include <errno.h>
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "exec.h"
#include "mainlog.h"
#include "watch.h"

enum {
    READ_SIZE = 128 * 1024,  /* one read: large enough for speed, small enough that the host copies while we read on */
    TURN_SIZE = 512 * 1024,  /* one stream in one turn of the loop */
    BUSY_SIZE = 256 * 1024,  /* output after which a pipe is worth widening */
    PIPE_SIZE = 1024 * 1024,
    RETRY_MS = 50,           /* how often a terminal that nobody holds is looked at while its command runs */
};

uint64_t stream_hold_ms = 10000;

static void stream_read(struct stream *stream);

static size_t room(const struct stream *stream)
{
    uint64_t floor = stream->floor;
    if (stream->watchers)
        floor = watch_acked(stream);
    else if (!stream->held)
        return WINDOW_SIZE;
    return WINDOW_SIZE - (size_t)(stream->window.head - floor);
}

static void ready(struct source *source, uint32_t events)
{
    (void)events;
    stream_read(entry(source, struct stream, source));
}

static void hold_over(struct timer *timer) { stream_unread(entry(timer, struct stream, hold)); }

static void linger_over(struct timer *timer)
{
    struct stream *stream = entry(timer, struct stream, linger);
    uint64_t before = stream->window.head;
    bool exited = stream->exec->state == EXEC_EXITED;
    stream_read(stream);
    if (exited && stream->open && room(stream) > 0 && stream->window.head == before)
        stream_give_up(stream);
}

void stream_init(struct stream *stream, struct exec *exec, uint8_t number, int fd)
{
    *stream = (struct stream){.exec = exec, .number = number, .open = fd >= 0};
    source_init(&stream->source, fd, ready);
    window_init(&stream->window);
    timer_init(&stream->hold, hold_over);
    timer_init(&stream->linger, linger_over);
}

void stream_free(struct stream *stream)
{
    source_close(&stream->source);
    timer_clear(&stream->hold);
    timer_clear(&stream->linger);
    window_free(&stream->window);
}

static void quiet_from_now(struct stream *stream)
{
    timer_set(&stream->linger, saturate(loop_now(), stream->exec->linger_ms));
}

static void end(struct stream *stream)
{
    source_close(&stream->source);
    timer_clear(&stream->hold);
    timer_clear(&stream->linger);
    stream->open = false;
    watch_output(stream);
    exec_check_done(stream->exec);
}

void stream_give_up(struct stream *stream)
{
    stream->given_up = true;
    end(stream);
}

static void account(struct stream *stream, const struct iovec *place, int pieces, size_t size)
{
    if (stream->exec->main)
        mainlog_write(stream->number, stream->window.head, place, pieces, size);
    window_add(&stream->window, size);
    exec_counts.output_bytes += size;
    if (!stream->widened && stream->window.head > BUSY_SIZE) {
        stream->widened = true;
        if (fcntl(stream->source.fd, F_SETPIPE_SZ, PIPE_SIZE) < 0)
            errno = 0; /* a terminal, or the user's pipe quota is used up: it stays as it is */
    }
}

/* Read what may be read: after the reap until the pipe is empty, otherwise until a read comes short; the loop calls again. */
static void stream_read(struct stream *stream)
{
    bool exited = stream->exec->state == EXEC_EXITED;
    size_t turn = 0, wanted;
    ssize_t size = 0;
    do {
        struct iovec place[2];
        wanted = room(stream) < READ_SIZE ? room(stream) : READ_SIZE;
        if (wanted == 0)
            break;
        int pieces = window_room(&stream->window, wanted, place);
        size = pieces < 0 ? -1 : readv(stream->source.fd, place, pieces);
        if (size > 0) {
            account(stream, place, pieces, (size_t)size);
            turn += (size_t)size;
        }
    } while (turn < TURN_SIZE && size > 0 && (exited || (size_t)size == wanted));
    bool hung_up = size < 0 && errno == EIO; /* a terminal that nobody holds: its session may open it again by name */

    if (turn > 0) {
        watch_output(stream);
        if (exited)
            quiet_from_now(stream);
    }
    if (wanted > 0 && (size == 0 || (hung_up && exited))) {
        end(stream);
    } else if (hung_up) {
        source_watch(&stream->source, 0);
        timer_set(&stream->linger, loop_now() + RETRY_MS);
    } else {
        stream_update(stream);
    }
}

void stream_update(struct stream *stream)
{
    if (!stream->open || stream->exec->state == EXEC_STARTING)
        return;
    if (room(stream) > 0) {
        if (!source_watch(&stream->source, EPOLLIN))
            timer_set(&stream->linger, loop_now() + RETRY_MS);
        else if (stream->exec->state == EXEC_EXITED && !stream->linger.at)
            quiet_from_now(stream);
    } else {
        source_watch(&stream->source, 0);
        timer_clear(&stream->linger);
    }
}

void stream_exited(struct stream *stream)
{
    timer_clear(&stream->linger);
    stream_read(stream);
}

void stream_hold(struct stream *stream, uint64_t floor, unsigned times)
{
    if (!stream->open)
        return;
    stream->held = true;
    stream->floor = floor;
    timer_set(&stream->hold, loop_now() + times * stream_hold_ms);
    stream_update(stream);
}

void stream_unread(struct stream *stream)
{
    stream->held = false;
    timer_clear(&stream->hold);
    stream_update(stream);
}
