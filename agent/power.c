#include "power.h"

#include <ctype.h>
#include <dirent.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "conn.h"
#include "exec.h"
#include "mainlog.h"

enum { FLUSH_MS = 2000, MAIN_FLUSH_MS = 10000 };

static enum { ON, STOPPING, KILLED } phase;
static uint64_t started_ms;
static struct timer clock_timer; /* STOPPING: end of the grace time; KILLED: end of the patience with watchers */
static bool expired;

uint64_t power_uptime_ms(void) { return loop_now() - started_ms; }

bool power_stopping(void) { return phase != ON; }

/* As PID 1: every process of the box, apart from the session `spared`. As an ordinary process, in tests: the executions' groups. */
static void signal_all(int number, pid_t spared)
{
    if (getpid() == 1 && spared == 0) {
        kill(-1, number);
        return;
    }
    DIR *directory = getpid() == 1 ? opendir("/proc") : NULL;
    for (struct dirent *file; directory && (file = readdir(directory));) {
        pid_t pid = isdigit((unsigned char)file->d_name[0]) ? (pid_t)atol(file->d_name) : 0;
        if (pid > 1 && getsid(pid) != spared)
            kill(pid, number);
    }
    if (directory) {
        closedir(directory);
        return;
    }
    list_each(it, &exec_running) {
        struct exec *exec = entry(it, struct exec, link);
        if (exec->pid != spared && kill(-exec->pid, number) < 0)
            kill(exec->pid, number); /* it has not made its session yet */
    }
}

static void kill_all(void)
{
    phase = KILLED;
    signal_all(SIGKILL, 0);
    list_each(it, &exec_running) { /* nobody is going to come for what is held back */
        struct exec *exec = entry(it, struct exec, link);
        for (int i = 0; i < 2; i++)
            if (exec->out[i].held)
                stream_unread(&exec->out[i]);
    }
    timer_set(&clock_timer, loop_now() + FLUSH_MS);
}

static void clock_over(struct timer *timer)
{
    (void)timer;
    if (phase == STOPPING)
        kill_all();
    else
        expired = phase == KILLED;
}

void power_init(void)
{
    started_ms = loop_now() - 1;
    timer_init(&clock_timer, clock_over);
}

void power_off(uint32_t grace_ms, int stop_signal)
{
    if (phase == KILLED)
        return;
    if (grace_ms == 0) {
        kill_all();
        return;
    }
    struct exec *main = exec_main();
    bool special = main && main->state == EXEC_RUNNING && stop_signal && stop_signal != SIGTERM;
    signal_all(SIGTERM, special ? main->pid : 0);
    if (special)
        exec_signal(main, stop_signal);
    if (phase == ON || loop_now() + grace_ms < clock_timer.at)
        timer_set(&clock_timer, loop_now() + grace_ms);
    phase = STOPPING;
}

/* The main command's end is the box's end, once its watchers have everything. */
static void check_main(void)
{
    struct exec *main = exec_main();
    if (!main || !main->done)
        return;
    if (list_empty(&main->watchers) || loop_now() - main->done_ms >= MAIN_FLUSH_MS)
        kill_all();
    else if (!clock_timer.at)
        timer_set(&clock_timer, main->done_ms + MAIN_FLUSH_MS);
}

static bool all_told(void)
{
    list_each(it, &exec_finished)
        if (!list_empty(&entry(it, struct exec, link)->watchers))
            return false;
    return list_empty(&exec_running) && conn_all_sent();
}

bool power_over(void)
{
    if (phase == ON)
        check_main();
    if (phase == STOPPING && !exec_children_left())
        kill_all();
    if (phase != KILLED || !(expired || (all_told() && !exec_children_left())))
        return false;
    struct exec *main = exec_main();
    if (main && main->state == EXEC_EXITED)
        mainlog_exit(main->status, main->timed_out, main->ended_ns);
    return true;
}
