/* The event loop: descriptors, timers, and memory that is freed at the end of a turn. */
#ifndef HUTCH_LOOP_H
#define HUTCH_LOOP_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>

#include "list.h"

struct source {
    int fd;          /* -1: closed */
    uint32_t events; /* what is waited for; 0: not in the set (so that a hang-up cannot spin) */
    void (*ready)(struct source *source, uint32_t events);
};

struct timer {
    struct link link;
    uint64_t at; /* ms on the loop's clock; 0: idle */
    void (*fire)(struct timer *timer);
};

int loop_open(void); /* 0, or -1 with errno */

void source_init(struct source *source, int fd, void (*ready)(struct source *, uint32_t));
bool source_watch(struct source *source, uint32_t events); /* false: the kernel refused (ENOMEM, ENOSPC) */
void source_close(struct source *source);

void timer_init(struct timer *timer, void (*fire)(struct timer *));
void timer_set(struct timer *timer, uint64_t at); /* a time that has passed fires in the next turn; UINT64_MAX never */
void timer_clear(struct timer *timer);

/* Milliseconds, monotonic, never 0; fixed during a turn. */
uint64_t loop_now(void);

/* `a + b` without wrapping. */
static inline uint64_t saturate(uint64_t a, uint64_t b) { return a + b < a ? UINT64_MAX : a + b; }

/* Free, at the end of the turn, an object whose first member is this unlinked link: events of this turn may still point into it. */
void loop_free(struct link *object);

/* Wait for events and timers once, for at most so many milliseconds (-1: as long as it takes), and handle them. */
void loop_turn(int most_ms);

/* The end of a turn: frees what loop_free was given. */
void loop_clean(void);

#endif
