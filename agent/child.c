#include "child.h"

#include <errno.h>
#include <grp.h>
#include <linux/close_range.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"
#include "user.h"

static const char default_path[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

static int report_fd;

__attribute__((format(printf, 3, 4))) static _Noreturn void fail(enum failure code, int error, const char *format, ...)
{
    struct child_report report = {.code = (uint16_t)code, .error = (uint16_t)error};
    if (error == EAGAIN || error == ENOMEM || error == EMFILE || error == ENFILE)
        report.code = F_RESOURCE;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(report.message, sizeof report.message, format, arguments);
    va_end(arguments);
    for (char *c = report.message; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
    ssize_t written = write(report_fd, &report, sizeof report); /* below PIPE_BUF: whole or not at all */
    _exit(written == sizeof report ? 127 : 126);
}

static void take_descriptors(const struct child_plan *plan)
{
    if (setsid() < 0 || dup2(plan->in, 0) < 0 || dup2(plan->out, 1) < 0 || dup2(plan->err, 2) < 0)
        fail(F_START_FAILED, errno, "descriptors: %s", strerror(errno));
    if (plan->tty && ioctl(0, TIOCSCTTY, 0) < 0)
        fail(F_START_FAILED, errno, "controlling terminal: %s", strerror(errno));
    /* All others are close-on-exec already; a file operation executes nothing and closes them by itself. */
    syscall(SYS_close_range, 3, ~0U, CLOSE_RANGE_CLOEXEC);
}

static void take_user(const struct child_plan *plan, struct user *user)
{
    const struct start_request *request = plan->request;
    const char *wrong = user_find(request->user, user);
    if (wrong)
        fail(F_BAD_USER, 0, "user '%.100s': %s", request->user, wrong);
    if (user->uid != geteuid()) {
        /* So that opening /dev/stdout or the terminal by name works for this user as well. */
        if (plan->in != plan->null && fchown(0, user->uid, (gid_t)-1) < 0)
            errno = 0;
        if (!plan->tty && (fchown(1, user->uid, (gid_t)-1) < 0 || fchown(2, user->uid, (gid_t)-1) < 0))
            errno = 0;
    }
    for (size_t i = 0; i < request->limit_count; i++) {
        const struct start_limit *limit = &request->limits[i];
        if (setrlimit((int)limit->resource, &(struct rlimit){limit->soft, limit->hard}) < 0)
            fail(F_START_FAILED, errno, "resource limit %u: %s", limit->resource, strerror(errno));
    }
    /* In a box with a single mapped user setgroups is refused, and there is nothing to change. */
    bool change = user->uid != geteuid() || user->gid != getegid() || user->group_count > 0;
    if ((setgroups(user->group_count, user->groups) < 0 && change) || setresgid(user->gid, user->gid, user->gid) < 0 ||
        setresuid(user->uid, user->uid, user->uid) < 0)
        fail(F_BAD_USER, errno, "user '%.100s' (uid %u, gid %u): %s", request->user, (unsigned)user->uid,
             (unsigned)user->gid, errno == EINVAL ? "not mapped in this box" : strerror(errno));
}

static const char *find_variable(char **env, const char *name)
{
    size_t length = strlen(name);
    for (; *env; env++)
        if (strncmp(*env, name, length) == 0 && (*env)[length] == '=')
            return *env + length + 1;
    return NULL;
}

static void add_home(struct start_request *request, const struct user *user)
{
    static char home[sizeof user->home + 8];
    if (find_variable(request->env, "HOME"))
        return;
    snprintf(home, sizeof home, "HOME=%s", user->home);
    request->env[request->env_count++] = home;
    request->env[request->env_count] = NULL;
}

/* Try one file. Returns only if the search may go on: false when there is no such file, true when it exists but may not be executed. */
static bool try_execute(const char *file, struct start_request *request)
{
    execve(file, request->argv, request->env);
    int error = errno;
    switch (error) {
    case ENOENT:
        if (access(file, F_OK) == 0)
            fail(F_NOT_EXECUTABLE, error, "cannot execute '%.200s': its interpreter is missing", file);
        return false;
    case ENOTDIR:
    case ELOOP:
    case ENAMETOOLONG: return false;
    case EACCES: return access(file, F_OK) == 0;
    case ENOEXEC: fail(F_NOT_EXECUTABLE, error, "cannot execute '%.200s': exec format error", file);
    default: fail(F_START_FAILED, error, "cannot execute '%.200s': %s", file, strerror(error));
    }
}

static _Noreturn void execute(struct start_request *request)
{
    const char *command = request->argv[0];
    bool forbidden = false;
    if (strchr(command, '/')) {
        forbidden = try_execute(command, request);
    } else if (*command) {
        const char *path = find_variable(request->env, "PATH");
        if (!path)
            path = default_path;
        for (;;) {
            char file[4096];
            size_t length = strcspn(path, ":");
            int size = snprintf(file, sizeof file, "%.*s%s%s", (int)length, path, length ? "/" : "", command);
            if (length < sizeof file && size < (int)sizeof file)
                forbidden |= try_execute(file, request);
            if (!path[length])
                break;
            path += length + 1;
        }
    }
    if (forbidden)
        fail(F_NOT_EXECUTABLE, EACCES, "cannot execute '%.200s': %s", command, strerror(EACCES));
    fail(F_COMMAND_NOT_FOUND, ENOENT, "command not found: '%.200s'", command);
}

static _Noreturn void serve_files(const struct start_request *request)
{
    signal(SIGPIPE, SIG_DFL);
    syscall(SYS_close_range, 3, ~0U, 0); /* the report pipe as well: started */
    int status = files_child(request->file_op, request->file_path);
    fflush(NULL);
    _exit(status);
}

_Noreturn void child_run(const struct child_plan *plan)
{
    static struct user user;
    struct start_request *request = plan->request;
    sigset_t none;
    report_fd = plan->report;
    take_descriptors(plan);
    signal(SIGPIPE, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    umask(022);
    take_user(plan, &user);
    if (chdir(request->cwd) < 0)
        fail(F_BAD_CWD, errno, "working directory '%.200s': %s", request->cwd, strerror(errno));
    if (request->file_op)
        serve_files(request);
    add_home(request, &user);
    execute(request);
}
