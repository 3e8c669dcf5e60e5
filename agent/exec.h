/* Executions: the table, and what happens to one from START to its removal. */
#ifndef HUTCH_EXEC_H
#define HUTCH_EXEC_H

#include <sys/types.h>

#include "loop.h"
#include "proto.h"
#include "window.h"

struct exec;
struct conn;

/* One output stream: the read end of a pipe, or the terminal. */
struct stream {
    struct source source;
    struct exec *exec;
    struct window window;
    uint8_t number;      /* 1 stdout, 2 stderr */
    bool open;           /* more may come */
    bool given_up;       /* closed while a process still held it */
    bool widened;        /* its pipe was made larger */
    bool held;           /* nobody watches, but nothing may be dropped yet */
    unsigned watchers;   /* connections attached to it */
    uint64_t floor;      /* held: the oldest byte that must stay */
    struct timer hold;   /* end of `held` */
    struct timer linger; /* quiet clock after the reap; on a hung-up terminal: when to look again */
};

/* stdin of a command: what the pipe or the terminal did not take yet. */
struct input {
    struct source source; /* fd -1: closed or never there */
    struct link chunks;
    bool end;         /* STDIN_EOF was received */
    bool end_written; /* terminal: VEOF has been queued */
    uint8_t last;     /* last byte that was taken */
    uint64_t accepted; /* bytes received from all connections */
};

enum exec_state { EXEC_STARTING, EXEC_RUNNING, EXEC_EXITED };

struct exec {
    struct link link;   /* in the list of running or of finished ones */
    struct exec *chain; /* hash chain */
    char id[ID_SIZE];
    enum exec_state state;
    bool tty, has_stdin, main, transfer /* of files, or to a port */, timed_out, core_dumped, memory_ran_out;
    bool done; /* exited and both streams at their end */
    pid_t pid;
    int32_t status;
    uint64_t started_ns, ended_ns, done_ms;
    uint64_t user_us, system_us, max_rss;
    uint64_t oom_kills; /* in the guest, when it began */
    uint64_t timeout_ms, kill_after_ms, linger_ms;
    struct source report; /* where the child says why it could not start */
    struct timer deadline;
    struct stream out[2];
    struct input in;
    struct link watchers;
};

struct exec_counts {
    uint64_t started, failed, output_bytes, input_bytes;
};

extern struct exec_counts exec_counts;

/* Lists: for iteration. */
extern struct link exec_running;  /* starting, running, or exited with open streams */
extern struct link exec_finished; /* done; oldest first */

struct exec *exec_find(const char *id);
bool exec_evicted(const char *id); /* it existed and its log is gone */
struct exec *exec_main(void);

/* exec_start.c. To be called before anything runs in the box: opens its /dev/null. Returns 0, or -1 with errno. */
int exec_start_init(void);

/* Start what the frame asks for; the reply comes when the outcome is known. */
void exec_start(struct conn *conn, const struct frame *frame);

/* exec.c */
void exec_insert(struct exec *exec);
void exec_drop(struct exec *exec);        /* a start that failed: as if it had never been */
void exec_begin(struct exec *exec);       /* the command runs */
void exec_check_done(struct exec *exec);  /* a stream has ended */
bool exec_ending(void);                    /* whether the outputs of a command have ended since the last call, and it has not */
void exec_forget(struct exec *exec);      /* release a finished execution; watchers that lack bytes are told by GAP */
void exec_reap(void);                     /* collect ended children */
bool exec_signal(struct exec *exec, int signal); /* to the whole process group */
void exec_retain(void);                   /* once per turn: apply the limits of retention */
bool exec_children_left(void);            /* any child, known or not */

/* stream.c */
void stream_init(struct stream *stream, struct exec *exec, uint8_t number, int fd);
void stream_hold(struct stream *stream, uint64_t floor, unsigned times); /* keep what is above `floor` for so many hold times */
void stream_unread(struct stream *stream);               /* nobody is going to read: drop from now on */
void stream_update(struct stream *stream);               /* watchers, acknowledgements or the exit changed what may be read */
void stream_exited(struct stream *stream);               /* the process was reaped: drain */
void stream_give_up(struct stream *stream);
void stream_free(struct stream *stream);
extern uint64_t stream_hold_ms;

/* input.c */
struct watcher;
void input_init(struct exec *exec, int fd);
/* Only while it is open. */
void input_write(struct exec *exec, struct watcher *from, const uint8_t *bytes, size_t size);
void input_end(struct exec *exec);
void input_close(struct exec *exec);
void input_orphan(struct exec *exec, struct watcher *from); /* the watcher goes; its bytes stay */
uint32_t input_adopt(struct exec *exec, struct watcher *to); /* take over orphaned bytes; returns the credit that is left */

#endif
