#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "exec.h"
#include "watch.h"

struct chunk {
    struct link link;
    struct watcher *from; /* who gets the credit back; NULL: orphaned */
    size_t size, offset;
    uint8_t bytes[];
};

/* A pipe is always watched: EPOLLERR tells that its reader is gone. A terminal only for room, as it may hang up for a while. */
static void update(struct exec *exec)
{
    uint32_t events = exec->tty ? 0 : EPOLLERR;
    source_watch(&exec->in.source, list_empty(&exec->in.chunks) ? events : EPOLLOUT);
}

static void took(struct exec *exec, struct watcher *from, size_t size, uint8_t last)
{
    exec->in.last = last;
    exec_counts.input_bytes += size;
    if (from)
        watch_credit(from, (uint32_t)size);
}

static void drop_chunks(struct exec *exec)
{
    list_each(it, &exec->in.chunks) {
        list_remove(it);
        free(entry(it, struct chunk, link));
    }
}

void input_close(struct exec *exec)
{
    source_close(&exec->in.source);
    drop_chunks(exec);
}

static bool append(struct exec *exec, struct watcher *from, const uint8_t *bytes, size_t size)
{
    struct chunk *chunk = malloc(sizeof *chunk + size);
    if (!chunk)
        return false;
    *chunk = (struct chunk){.from = from, .size = size};
    memcpy(chunk->bytes, bytes, size);
    list_append(&exec->in.chunks, &chunk->link);
    return true;
}

/* The end of a terminal's input is a character. Behind an unfinished line the first one only hands over that line. */
static void append_end_of_file(struct exec *exec, uint8_t last)
{
    struct termios modes;
    if (tcgetattr(exec->in.source.fd, &modes) < 0)
        return;
    uint8_t character = modes.c_cc[VEOF];
    size_t count = (modes.c_lflag & ICANON) && last != '\n' && last != character ? 2 : 1;
    append(exec, NULL, (uint8_t[]){character, character}, count);
}

/* Write what the command takes; true if it took everything. */
static bool flush(struct exec *exec)
{
    struct input *in = &exec->in;
    while (!list_empty(&in->chunks)) {
        struct chunk *chunk = entry(in->chunks.next, struct chunk, link);
        ssize_t size = write(in->source.fd, chunk->bytes + chunk->offset, chunk->size - chunk->offset);
        if (size < 0 && errno == EAGAIN)
            break;
        if (size < 0) {
            input_close(exec);
            watch_input_closed(exec);
            return false;
        }
        chunk->offset += (size_t)size;
        took(exec, chunk->from, (size_t)size, chunk->bytes[chunk->offset - 1]);
        if (chunk->offset < chunk->size)
            break;
        list_remove(&chunk->link);
        free(chunk);
    }
    if (list_empty(&in->chunks) && in->end) {
        if (!exec->tty) {
            input_close(exec);
            return true;
        }
        if (!in->end_written) {
            in->end_written = true;
            append_end_of_file(exec, in->last);
            return flush(exec);
        }
    }
    update(exec);
    return list_empty(&in->chunks);
}

static void ready(struct source *source, uint32_t events)
{
    struct exec *exec = entry(source, struct exec, in.source);
    if (!exec->tty && (events & EPOLLERR)) {
        input_close(exec);
        watch_input_closed(exec);
        return;
    }
    flush(exec);
}

void input_init(struct exec *exec, int fd)
{
    exec->in = (struct input){.last = '\n'};
    list_init(&exec->in.chunks);
    source_init(&exec->in.source, fd, ready);
    if (fd >= 0)
        update(exec);
}

void input_write(struct exec *exec, struct watcher *from, const uint8_t *bytes, size_t size)
{
    if (!append(exec, from, bytes, size)) {
        input_close(exec); /* a hole in the input would be worse than its end */
        watch_input_closed(exec);
        return;
    }
    exec->in.accepted += size;
    flush(exec);
}

void input_end(struct exec *exec)
{
    if (exec->in.source.fd < 0 || exec->in.end)
        return;
    exec->in.end = true;
    flush(exec);
}

void input_orphan(struct exec *exec, struct watcher *from)
{
    list_each(it, &exec->in.chunks) {
        struct chunk *chunk = entry(it, struct chunk, link);
        if (chunk->from == from)
            chunk->from = NULL;
    }
}

uint32_t input_adopt(struct exec *exec, struct watcher *to)
{
    uint32_t credit = INPUT_CREDIT;
    if (exec->in.source.fd < 0 || exec->in.end)
        return 0;
    list_each(it, &exec->in.chunks) {
        struct chunk *chunk = entry(it, struct chunk, link);
        size_t size = chunk->size - chunk->offset;
        if (!chunk->from && size <= credit) {
            chunk->from = to;
            credit -= (uint32_t)size;
        }
    }
    return credit;
}
