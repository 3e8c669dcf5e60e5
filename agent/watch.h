/* Watchers: the tie between a connection and an execution, with its place in each stream. */
#ifndef HUTCH_WATCH_H
#define HUTCH_WATCH_H

#include "exec.h"

enum { INPUT_CREDIT = 65536 };

struct cursor {
    uint64_t next;  /* first byte not sent */
    uint64_t acked; /* bytes before it may be overwritten */
    bool attached, ended, shared;
};

struct watcher {
    struct link of_exec, of_conn, of_ready;
    struct exec *exec;
    struct conn *conn;
    struct cursor at[2];
    unsigned turn;         /* stream whose turn it is */
    bool starter, attaching; /* waits for the outcome of the start, with `req` to answer */
    uint32_t req;
    bool told;             /* EXITED was sent */
    bool granted;          /* stdin credit was given */
    uint32_t credit;       /* stdin bytes that the host may still send */
    uint32_t owed;         /* credit not yet given back */
};

struct watcher *watch_find(struct exec *exec, struct conn *conn);

/* The connection that starts; `all`: attached to both streams. NULL without memory. */
struct watcher *watch_starter(struct exec *exec, struct conn *conn, uint32_t req, bool all);
void watch_started(struct exec *exec);
void watch_failed(struct exec *exec, uint16_t code, uint16_t error, const char *message);

void watch_attach(struct conn *conn, const struct frame *frame);
void watch_detach(struct conn *conn, const struct frame *frame);
void watch_ack(struct conn *conn, const struct frame *frame);
void watch_share(struct conn *conn, const struct frame *frame);

void watch_exited(struct exec *exec);
void watch_output(struct stream *stream); /* there are more bytes, or the end */
void watch_dropped(struct exec *exec);    /* the log goes: tell who lacks bytes */
void watch_input_closed(struct exec *exec);
void watch_credit(struct watcher *watcher, uint32_t size); /* so much of its input was taken */
uint64_t watch_acked(const struct stream *stream);         /* lowest acknowledged position of all watchers */

void watch_remove(struct watcher *watcher); /* its connection broke, or it has everything */

/* Queue the next data frame of one of the streams; false when the watcher has nothing to send. */
bool watch_produce(struct watcher *watcher);

#endif
