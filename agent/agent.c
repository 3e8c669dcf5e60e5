#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "conn.h"
#include "exec.h"
#include "loop.h"
#include "mainlog.h"
#include "port.h"
#include "power.h"

enum { ENDING_MS = 1 };

static struct source child_signal;

/* SIGCHLD only says "look": anyone in the box may send it, and several merge into one. */
static void child_ready(struct source *source, uint32_t events)
{
    struct signalfd_siginfo info;
    (void)events;
    if (read(source->fd, &info, sizeof info) > 0)
        exec_reap();
}

static int take_signals(void)
{
    sigset_t mask;
    for (int number = 1; number < NSIG; number++)
        /* A command inherits what is ignored. Not by signal(): it refuses the numbers that the C library keeps for itself. */
        syscall(SYS_rt_sigaction, number, (unsigned long[4]){0}, NULL, 8);
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    if (sigprocmask(SIG_SETMASK, &mask, NULL) < 0)
        return -1;
    return signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
}

static int fail(const char *step)
{
    fprintf(stderr, "box-agent: %s: %s\n", step, strerror(errno));
    return 1;
}

int agent_run(const struct agent_options *options)
{
    prctl(PR_SET_DUMPABLE, 0);
    if (getpid() != 1)
        prctl(PR_SET_CHILD_SUBREAPER, 1);
    /* Descriptors 0 to 2 are the children's: none of ours may land there. */
    for (int fd = 0; fd >= 0 && fd <= 2;)
        if ((fd = open("/dev/null", O_RDWR | O_CLOEXEC)) > 2)
            close(fd);
    int signals = take_signals();
    if (signals < 0 || loop_open() < 0)
        return fail("event loop");
    int flags = port_used() ? 0 : fcntl(options->listen_fd, F_GETFL);
    if (flags < 0 || (!port_used() && fcntl(options->listen_fd, F_SETFL, flags | O_NONBLOCK) < 0))
        return fail("listening socket");
    if (exec_start_init() < 0)
        return fail("/dev/null");
    power_init();
    mainlog_open(options->log_fd, options->exit_fd);
    source_init(&child_signal, signals, child_ready);
    source_watch(&child_signal, EPOLLIN);
    if (port_used())
        port_serve();
    else
        conn_listen(options->listen_fd);
    if (options->ready_fd >= 0)
        close(options->ready_fd);
    do {
        loop_turn(-1);
        /* Nearly always its end follows within microseconds, and what is said of it then travels as one message. */
        if (exec_ending())
            loop_turn(ENDING_MS);
        exec_retain();
        conn_flush_all();
        loop_clean();
    } while (!power_over());
    return 0;
}

static int descriptor(const char *text)
{
    char *end;
    long number = strtol(text, &end, 10);
    if (end == text || *end || number < 3 || number > 1 << 20 || fcntl((int)number, F_SETFD, FD_CLOEXEC) < 0)
        return -1;
    return (int)number;
}

static int usage(void)
{
    fprintf(stderr, "usage: box-agent agent --listen-fd N [--ready-fd N] [--log-fds A,B] [--exit-fd N] [--hold-ms N]\n");
    return 2;
}

int cmd_agent(int argc, char **argv)
{
    struct agent_options options = {-1, -1, {-1, -1}, -1};
    for (int i = 1; i + 1 < argc; i += 2) {
        char *value = argv[i + 1], *comma = strchr(value, ',');
        if (strcmp(argv[i], "--log-fds") == 0 && comma) {
            *comma = 0;
            options.log_fd[0] = descriptor(value);
            options.log_fd[1] = descriptor(comma + 1);
        } else if (strcmp(argv[i], "--listen-fd") == 0) {
            options.listen_fd = descriptor(value);
        } else if (strcmp(argv[i], "--ready-fd") == 0) {
            options.ready_fd = descriptor(value);
        } else if (strcmp(argv[i], "--exit-fd") == 0) {
            options.exit_fd = descriptor(value);
        } else if (strcmp(argv[i], "--hold-ms") == 0) {
            stream_hold_ms = strtoull(value, NULL, 10);
        } else {
            return usage();
        }
    }
    return argc % 2 == 0 || options.listen_fd < 0 ? usage() : agent_run(&options);
}
