#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include "child.h"
#include "conn.h"
#include "exec.h"
#include "mainlog.h"
#include "power.h"
#include "watch.h"

static int null_fd = -1;

int exec_start_init(void)
{
    null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    return null_fd < 0 ? -1 : 0;
}

/* The descriptors of a start. Ours end up in the execution, the child's are closed after the fork. */
struct ends {
    int in, out, err, report;                 /* ours */
    int child_in, child_out, child_err, child_report;
};

static void close_ends(int *ends, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (ends[i] >= 0 && ends[i] != null_fd)
            close(ends[i]);
}

static bool make_pipe(int *ours, int *theirs, bool we_read)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        return false;
    *ours = ends[we_read ? 0 : 1];
    *theirs = ends[we_read ? 1 : 0];
    return fcntl(*ours, F_SETFL, O_NONBLOCK) == 0;
}

/* The slave is opened through the master, not by a name that the box could have replaced. */
static bool make_terminal(struct ends *ends, const struct start_request *request)
{
    struct winsize size = {.ws_row = request->rows, .ws_col = request->cols};
    int unlock = 0;
    ends->out = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    return ends->out >= 0 && ioctl(ends->out, TIOCSPTLCK, &unlock) == 0 && ioctl(ends->out, TIOCSWINSZ, &size) == 0 &&
           (ends->child_in = ioctl(ends->out, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) >= 0 &&
           (!(request->flags & START_STDIN) || (ends->in = fcntl(ends->out, F_DUPFD_CLOEXEC, 3)) >= 0);
}

static bool make_ends(struct ends *ends, const struct start_request *request)
{
    *ends = (struct ends){-1, -1, -1, -1, -1, -1, -1, -1};
    if (!make_pipe(&ends->report, &ends->child_report, true))
        return false;
    if (request->tty)
        return make_terminal(ends, request);
    if (!(request->flags & START_STDIN))
        ends->child_in = null_fd;
    else if (!make_pipe(&ends->in, &ends->child_in, false))
        return false;
    return make_pipe(&ends->out, &ends->child_out, true) && make_pipe(&ends->err, &ends->child_err, true);
}

/* Commands are to be killed before the agent when memory runs out. From here, because the child may not open its own file: a copy of
 * the agent is not dumpable. */
static void prefer_as_victim(pid_t pid)
{
    char path[48];
    snprintf(path, sizeof path, "/proc/%d/oom_score_adj", (int)pid);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    if (write(fd, "500", 3) < 0)
        errno = 0;
    close(fd);
}

static void report_ready(struct source *source, uint32_t events)
{
    struct exec *exec = entry(source, struct exec, report);
    struct child_report report;
    (void)events;
    ssize_t size = read(source->fd, &report, sizeof report);
    if (size < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    source_close(source);
    if (size == sizeof report) {
        report.message[sizeof report.message - 1] = 0;
        watch_failed(exec, report.code, report.error, report.message);
        exec_drop(exec);
        return;
    }
    prefer_as_victim(exec->pid);
    exec_begin(exec);
}

static void fill(struct exec *exec, const struct frame *frame, const struct start_request *request,
                 const struct ends *ends)
{
    memcpy(exec->id, frame->id, ID_SIZE);
    exec->tty = request->tty;
    exec->has_stdin = (request->flags & START_STDIN) != 0;
    exec->main = (request->flags & START_MAIN) != 0;
    exec->transfer = request->file_op != 0;
    exec->timeout_ms = request->timeout_ms;
    exec->kill_after_ms = request->kill_after_ms;
    exec->linger_ms = request->linger_ms;
    exec->started_ns = unix_now_ns();
    list_init(&exec->link);
    list_init(&exec->watchers);
    stream_init(&exec->out[0], exec, 1, ends->out);
    stream_init(&exec->out[1], exec, 2, ends->err);
    input_init(exec, ends->in);
    source_init(&exec->report, ends->report, report_ready);
    timer_init(&exec->deadline, NULL);
}

/* NULL, or what stands against this start before anything was made. */
static const char *refuse(const struct frame *frame, const struct start_request *request, enum failure *code)
{
    *code = F_INVALID;
    if (!frame->id[0])
        return "no execution id";
    if (request->tty && (!request->rows || !request->cols))
        return "a terminal size of zero";
    if (request->flags & ~(uint32_t)(START_STDIN | START_MAIN | START_WATCH))
        return "unknown flag";
    *code = F_EXISTS;
    if (exec_find(frame->id) || exec_evicted(frame->id))
        return "an execution with this id exists";
    if ((request->flags & START_MAIN) && exec_main())
        return "the box has a main command";
    *code = F_BUSY;
    return power_stopping() ? "the box is shutting down" : NULL;
}

static void start(struct conn *conn, const struct frame *frame, struct start_request *request)
{
    enum failure code;
    const char *refusal = refuse(frame, request, &code);
    if (refusal) {
        conn_fail(conn, frame->req, frame->id, (uint16_t)code, 0, refusal);
        return;
    }
    struct ends ends;
    struct exec *exec = NULL;
    pid_t pid = -1;
    if (make_ends(&ends, request) && (exec = calloc(1, sizeof *exec))) {
        struct child_plan plan = {.request = request, .in = ends.child_in, .out = ends.child_out, .err = ends.child_err,
                                  .null = null_fd, .tty = request->tty, .report = ends.child_report};
        if (request->tty)
            plan.out = plan.err = ends.child_in;
        pid = fork();
        if (pid == 0)
            child_run(&plan);
    }
    int error = errno;
    close_ends(&ends.child_in, 4);
    if (pid < 0) {
        close_ends(&ends.in, 4);
        free(exec);
        exec_counts.failed++;
        conn_fail(conn, frame->req, frame->id, F_RESOURCE, (uint16_t)error, strerror(error));
        return;
    }
    exec->pid = pid;
    fill(exec, frame, request, &ends);
    exec_insert(exec);
    /* It may run by now, so there is no way back: a host that cannot be told learns it by asking again. */
    if (!watch_starter(exec, conn, frame->req, (request->flags & START_WATCH) != 0))
        conn_close(conn);
    if (!source_watch(&exec->report, EPOLLIN))
        kill(pid, SIGKILL); /* its end brings the report as well */
}

void exec_start(struct conn *conn, const struct frame *frame)
{
    struct start_request request;
    const char *wrong = start_parse(frame->payload, frame->length, &request);
    if (wrong) {
        conn_fail(conn, frame->req, frame->id, F_INVALID, 0, wrong);
        return;
    }
    start(conn, frame, &request);
    start_free(&request);
}
