#include "exec.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "mainlog.h"
#include "oom.h"
#include "watch.h"

enum {
    BUCKETS = 1024,
    KEEP_MS = 5 * 60 * 1000,
    KEEP_COUNT = 1024,
    KEEP_BYTES = 16 << 20,
    KEEP_WATCHED = 4, /* so many times the limits for logs that a slow watcher still waits for */
    EVICTED_IDS = 4096,
    RECHECK_MS = 10000,
};

struct exec_counts exec_counts;
struct link exec_running = LIST_OF(exec_running);
struct link exec_finished = LIST_OF(exec_finished);

static struct exec *table[BUCKETS];
static struct exec *main_exec;
static char evicted[EVICTED_IDS][ID_SIZE];
static size_t evicted_next;
static size_t kept_count, kept_bytes;
static struct timer age;
static bool ending;

static struct exec **bucket(const char *id)
{
    uint32_t hash = 2166136261u;
    for (int i = 0; i < ID_SIZE; i++)
        hash = (hash ^ (uint8_t)id[i]) * 16777619u;
    return &table[hash % BUCKETS];
}

struct exec *exec_find(const char *id)
{
    struct exec *exec = *bucket(id);
    while (exec && memcmp(exec->id, id, ID_SIZE) != 0)
        exec = exec->chain;
    return exec;
}

bool exec_evicted(const char *id)
{
    for (size_t i = 0; i < EVICTED_IDS && evicted[i][0]; i++)
        if (memcmp(evicted[i], id, ID_SIZE) == 0)
            return true;
    return false;
}

struct exec *exec_main(void) { return main_exec; }

void exec_insert(struct exec *exec)
{
    struct exec **head = bucket(exec->id);
    exec->chain = *head;
    *head = exec;
    list_append(&exec_running, &exec->link);
    if (exec->main)
        main_exec = exec;
}

/* The group outlives its leader while it has members; a new leader with the same number means that it had none. */
static void kill_group(const struct exec *exec, int number)
{
    list_each(it, &exec_running) {
        const struct exec *other = entry(it, struct exec, link);
        if (exec->state == EXEC_EXITED && other != exec && other->pid == exec->pid && other->state != EXEC_EXITED)
            return;
    }
    kill(-exec->pid, number);
}

static void release(struct exec *exec)
{
    if (exec->timed_out && exec->deadline.at)
        kill_group(exec, SIGKILL); /* the SIGKILL that was still to come */
    struct exec **place = bucket(exec->id);
    while (*place != exec)
        place = &(*place)->chain;
    *place = exec->chain;
    for (int i = 0; i < 2; i++)
        stream_free(&exec->out[i]);
    input_close(exec);
    source_close(&exec->report);
    timer_clear(&exec->deadline);
    list_remove(&exec->link);
    loop_free(&exec->link);
}

void exec_drop(struct exec *exec)
{
    exec_counts.failed++;
    if (main_exec == exec)
        main_exec = NULL;
    release(exec);
}

static size_t memory(const struct exec *exec)
{
    return window_memory(&exec->out[0].window) + window_memory(&exec->out[1].window);
}

static void evict(struct exec *exec)
{
    memcpy(evicted[evicted_next], exec->id, ID_SIZE);
    evicted_next = (evicted_next + 1) % EVICTED_IDS;
    kept_count--;
    kept_bytes -= memory(exec);
    watch_dropped(exec);
    release(exec);
}

/* Only ends the wait: retention is applied in each turn. */
static void age_over(struct timer *timer) { (void)timer; }

void exec_retain(void)
{
    if (!age.fire)
        timer_init(&age, age_over);
    uint64_t next = UINT64_MAX;
    list_each(it, &exec_finished) {
        struct exec *exec = entry(it, struct exec, link);
        bool old = loop_now() - exec->done_ms >= KEEP_MS;
        bool many = kept_count > KEEP_COUNT || kept_bytes > KEEP_BYTES;
        bool far_too_many = kept_count > KEEP_WATCHED * KEEP_COUNT || kept_bytes > KEEP_WATCHED * (size_t)KEEP_BYTES;
        if (!old && !many) {
            next = exec->done_ms + KEEP_MS;
            break;
        }
        if (exec->main)
            continue;
        if (list_empty(&exec->watchers) || far_too_many)
            evict(exec);
        else if (old)
            next = loop_now() + RECHECK_MS;
    }
    timer_set(&age, next);
}

void exec_forget(struct exec *exec)
{
    for (int i = 0; i < 2; i++)
        if (exec->out[i].open)
            stream_give_up(&exec->out[i]);
    evict(exec);
}

static void deadline_over(struct timer *timer)
{
    struct exec *exec = entry(timer, struct exec, deadline);
    if (exec->timed_out) {
        kill_group(exec, SIGKILL);
        return;
    }
    exec->timed_out = true;
    kill_group(exec, SIGTERM);
    timer_set(&exec->deadline, saturate(loop_now(), exec->kill_after_ms));
}

void exec_begin(struct exec *exec)
{
    exec_counts.started++;
    exec->state = EXEC_RUNNING;
    exec->oom_kills = oom_kills();
    timer_init(&exec->deadline, deadline_over);
    if (exec->timeout_ms)
        timer_set(&exec->deadline, saturate(loop_now(), exec->timeout_ms));
    watch_started(exec);
    for (int i = 0; i < 2; i++) {
        if (!exec->out[i].watchers)
            stream_hold(&exec->out[i], 0, 1);
        stream_update(&exec->out[i]);
    }
}

bool exec_signal(struct exec *exec, int number) { return kill(-exec->pid, number) == 0; }

static void exited(struct exec *exec, int status, const struct rusage *usage)
{
    exec->state = EXEC_EXITED;
    exec->status = WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
    exec->core_dumped = WIFSIGNALED(status) && WCOREDUMP(status);
    exec->memory_ran_out = status != 0 && oom_kills() > exec->oom_kills;
    exec->ended_ns = unix_now_ns();
    exec->user_us = (uint64_t)usage->ru_utime.tv_sec * 1000000 + (uint64_t)usage->ru_utime.tv_usec;
    exec->system_us = (uint64_t)usage->ru_stime.tv_sec * 1000000 + (uint64_t)usage->ru_stime.tv_usec;
    exec->max_rss = (uint64_t)usage->ru_maxrss * 1024;
    if (!exec->timed_out)
        timer_clear(&exec->deadline);
    watch_exited(exec);
    for (int i = 0; i < 2; i++)
        stream_exited(&exec->out[i]);
    exec_check_done(exec);
}

void exec_reap(void)
{
    int status;
    struct rusage usage;
    for (pid_t pid; (pid = wait4(-1, &status, WNOHANG, &usage)) > 0;)
        list_each(it, &exec_running) {
            struct exec *exec = entry(it, struct exec, link);
            if (exec->pid != pid || exec->state == EXEC_EXITED)
                continue;
            /* Its report, if it made one, is in the pipe. */
            if (exec->state == EXEC_STARTING)
                exec->report.ready(&exec->report, EPOLLIN);
            if (exec->state == EXEC_RUNNING)
                exited(exec, status, &usage);
            break;
        }
}

bool exec_children_left(void)
{
    siginfo_t info;
    exec_reap();
    return waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0;
}

bool exec_ending(void)
{
    bool was = ending;
    ending = false;
    return was;
}

void exec_check_done(struct exec *exec)
{
    if (exec->done || exec->out[0].open || exec->out[1].open)
        return;
    ending = exec->state == EXEC_RUNNING;
    if (exec->state != EXEC_EXITED)
        return;
    exec->done = true;
    exec->done_ms = loop_now();
    input_close(exec);
    for (int i = 0; i < 2; i++)
        window_compact(&exec->out[i].window);
    if (exec->main)
        mainlog_exit(exec->status, exec->timed_out, exec->ended_ns);
    list_remove(&exec->link);
    list_append(&exec_finished, &exec->link);
    kept_count++;
    kept_bytes += memory(exec);
}
