#include "loop.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64 };

static int epoll_fd = -1;
static uint64_t now;
static uint64_t next_due = UINT64_MAX; /* no timer is due before; may be too early after a timer was moved */
static struct link timers = {&timers, &timers};
static struct link graves = {&graves, &graves};

static void read_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    now = (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000 + 1;
}

int loop_open(void)
{
    read_clock();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    return epoll_fd < 0 ? -1 : 0;
}

uint64_t loop_now(void) { return now; }

void source_init(struct source *source, int fd, void (*ready)(struct source *, uint32_t))
{
    *source = (struct source){.fd = fd, .ready = ready};
}

bool source_watch(struct source *source, uint32_t events)
{
    if (source->fd < 0 || source->events == events)
        return true;
    int op = !events ? EPOLL_CTL_DEL : source->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    struct epoll_event event = {.events = events, .data.ptr = source};
    if (epoll_ctl(epoll_fd, op, source->fd, &event) < 0)
        return false;
    source->events = events;
    return true;
}

void source_close(struct source *source)
{
    if (source->fd < 0)
        return;
    /* Not left to close(): a child that has not executed yet holds the same open file. */
    source_watch(source, 0);
    close(source->fd);
    source->fd = -1;
}

void timer_init(struct timer *timer, void (*fire)(struct timer *))
{
    list_init(&timer->link);
    timer->at = 0;
    timer->fire = fire;
}

void timer_set(struct timer *timer, uint64_t at)
{
    if (at == UINT64_MAX) {
        timer_clear(timer);
        return;
    }
    if (!timer->at)
        list_append(&timers, &timer->link);
    if (at <= now)
        at = now + 1;
    timer->at = at;
    if (at < next_due)
        next_due = at;
}

void timer_clear(struct timer *timer)
{
    if (!timer->at)
        return;
    timer->at = 0;
    list_remove(&timer->link);
}

static void run_timers(void)
{
    if (next_due > now)
        return;
    /* One due timer at a time from a fresh start: a handler may set or clear any other. */
    for (bool fired = true; fired;) {
        fired = false;
        next_due = UINT64_MAX;
        list_each(it, &timers) {
            struct timer *timer = entry(it, struct timer, link);
            if (timer->at <= now) {
                timer_clear(timer);
                timer->fire(timer);
                fired = true;
                break;
            }
            if (timer->at < next_due)
                next_due = timer->at;
        }
    }
}

void loop_free(struct link *object) { list_append(&graves, object); }

void loop_clean(void)
{
    list_each(it, &graves)
        free(it);
    list_init(&graves);
}

void loop_turn(int most_ms)
{
    int timeout = -1;
    if (next_due != UINT64_MAX) {
        read_clock();
        timeout = next_due <= now ? 0 : next_due - now > INT_MAX ? INT_MAX : (int)(next_due - now);
    }
    if (most_ms >= 0 && (timeout < 0 || timeout > most_ms))
        timeout = most_ms;
    struct epoll_event events[BATCH];
    int count = epoll_wait(epoll_fd, events, BATCH, timeout);
    read_clock();
    for (int i = 0; i < count; i++) {
        struct source *source = events[i].data.ptr;
        if (source->fd >= 0 && source->events)
            source->ready(source, events[i].events);
    }
    run_timers();
}
