/* box-agent launch [UID_MAP GID_MAP]: make a box and become its PID 1.
 *
 * The maps are those of the outer user namespace that an ordinary user's boxes are prepared in.
 *
 * Standard input is a SOCK_SEQPACKET socket to the host. The host sends the configuration with its descriptors; the launcher answers
 *
 *     P<pid> with a pidfd     PID 1 exists (it waits for the launcher)
 *     E<text>                 a step failed; both processes end
 *     R                       the box is complete; PID 1 waits for the host's commit
 *
 * and the host, once it has recorded the process, commits with one byte. The end of the socket before the commit, from a host that
 * died or gave up, ends the box. The agent then closes the socket when it accepts connections.
 *
 *     launcher (outer user namespace)            PID 1 (the box's user namespace)
 *     join cgroups, private mount namespace
 *     clone3(user, pid, time) ------------------> network, host name and IPC namespaces
 *     id maps, shifted layers, overlay, binds
 *     "go", exit ------------------------------> become root, own mount namespace, pivot_root, drop everything, agent */
#define _GNU_SOURCE
#include "launch.h"
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif

int launch_control = -1;
void (*launch_failed)(const char *text, size_t length);

void launch_tell(const char *text, size_t length, int fd)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } space = {.bytes = {0}};
    struct iovec part = {(void *)text, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

    if (fd >= 0) {
        message.msg_control = &space;
        message.msg_controllen = sizeof space;
        space.header.cmsg_level = SOL_SOCKET;
        space.header.cmsg_type = SCM_RIGHTS;
        space.header.cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(&space.header), &fd, sizeof fd);
    }
    if (sendmsg(launch_control, &message, MSG_NOSIGNAL) < 0)
        _exit(1); /* the host is gone: so is the box */
}

_Noreturn void launch_fail_about(const char *step, const char *about)
{
    int cause = errno;
    char text[1024];
    int length = snprintf(text, sizeof text, "E%s%s%.400s%s%s", step, *about ? " " : "", about, cause ? ": " : "",
                          cause ? strerror(cause) : "");

    if (length >= (int)sizeof text)
        length = sizeof text - 1;
    if (launch_failed)
        launch_failed(text + 1, (size_t)length - 1);
    launch_tell(text, (size_t)length, -1);
    _exit(1);
}

_Noreturn void launch_fail(const char *step)
{
    launch_fail_about(step, "");
}

static void write_proc(pid_t pid, const char *name, const char *text)
{
    char path[64];
    int fd;

    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
        launch_fail_about("writing the id map", path);
    close(fd);
}

void write_id_maps(pid_t pid, const char *uid_map, const char *gid_map)
{
    write_proc(pid, "uid_map", uid_map);
    write_proc(pid, "gid_map", gid_map);
}

void join_cgroups(const char *const doors[], size_t count)
{
    for (size_t i = 0; i < count; i++) {
        int fd = open(doors[i], O_WRONLY | O_CLOEXEC);
        if (fd < 0 || write(fd, "0", 1) != 1)
            launch_fail_about("joining the cgroup", doors[i]);
        close(fd);
    }
}

/* Without cgroups: the limit at the birth of a user namespace bounds all processes in it together (Linux 5.14, UCOUNT_RLIMIT_NPROC).
 * It does not bind the host's root, so it is of use to ordinary users only. */
static void limit_processes(const char *limit)
{
    rlim_t count = strtoul(limit, NULL, 10);
    struct rlimit processes = {count, count};

    if (setrlimit(RLIMIT_NPROC, &processes) < 0)
        launch_fail_about("limiting processes to", limit);
}

static int compare_ints(const void *a, const void *b)
{
    return *(const int *)a - *(const int *)b;
}

/* Close everything but standard input, output and error, the box's descriptors and the two sockets. */
static void close_the_rest(const struct config *config, int go)
{
    int kept[FD_COUNT + 2];
    unsigned from = 3;

    memcpy(kept, config->fds, sizeof config->fds);
    kept[FD_COUNT] = go;
    kept[FD_COUNT + 1] = launch_control;
    qsort(kept, FD_COUNT + 2, sizeof *kept, compare_ints);
    for (size_t i = 0; i < FD_COUNT + 2; i++) {
        if ((unsigned)kept[i] > from && syscall(SYS_close_range, from, (unsigned)kept[i] - 1, 0) < 0)
            launch_fail("closing descriptors");
        from = (unsigned)kept[i] + 1;
    }
    if (syscall(SYS_close_range, from, ~0u, 0) < 0)
        launch_fail("closing descriptors");
}

void await_byte(int fd)
{
    char byte;
    ssize_t got;

    do
        got = read(fd, &byte, 1);
    while (got < 0 && errno == EINTR);
    if (got != 1)
        _exit(1); /* the other side ended before this box was complete */
}

static void become_root(const struct config *config)
{
    if (config->all_ids && setgroups(0, NULL) < 0)
        launch_fail("dropping supplementary groups");
    if (setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0)
        launch_fail("becoming the box's root");
}

static _Noreturn void run_box(struct config *config, int go)
{
    struct agent_options options;

    close_the_rest(config, go);
    setsid();
    box_namespaces(config);
    await_byte(go);
    close(go);
    become_root(config);
    box_root(config);
    box_confine();
    launch_tell("R", 1, -1);
    await_byte(launch_control);

    options = (struct agent_options){
        .listen_fd = config->fds[FD_LISTEN],
        .ready_fd = launch_control,
        .log_fd = {config->fds[FD_LOG0], config->fds[FD_LOG1]},
        .exit_fd = config->fds[FD_EXIT],
    };
    free(config->lowers);
    free(config->binds);
    free(config->cgroups);
    free(config->text);
    _exit(agent_run(&options));
}

static pid_t clone_box(int *pidfd)
{
    struct clone_args args = {
        .flags = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWTIME | CLONE_PIDFD,
        .pidfd = (uint64_t)(uintptr_t)pidfd,
        .exit_signal = SIGCHLD,
    };
    long pid = syscall(SYS_clone3, &args, sizeof args);

    if (pid < 0 && errno == EINVAL) { /* a kernel without time namespaces */
        args.flags &= ~(uint64_t)CLONE_NEWTIME;
        pid = syscall(SYS_clone3, &args, sizeof args);
    }
    return (pid_t)pid;
}

int open_user_namespace(pid_t pid)
{
    char path[64];
    int fd;

    snprintf(path, sizeof path, "/proc/%d/ns/user", (int)pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        launch_fail("opening the box's user namespace");
    return fd;
}

void take_control(void)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    launch_control = fcntl(0, F_DUPFD_CLOEXEC, 3);
    if (launch_control < 0 || null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
        _exit(1);
    prctl(PR_SET_NAME, "box-agent", 0, 0, 0);
}

/* Start over in the outer user namespace. The new program belongs to it: so its owner, the user on the host, may look at PID 1 (its
 * namespaces, above all), although nobody in the box may. */
_Noreturn void enter_outer(const char *mode, const char *uid_map, const char *gid_map)
{
    char *const again[] = {"box-agent", (char *)mode, NULL};

    launch_control = 0;
    if (mapped_enter(uid_map, gid_map) < 0)
        launch_fail("making the user namespace (are newuidmap and newgidmap installed, and /etc/subuid and /etc/subgid filled?)");
    execv("/proc/self/exe", again);
    launch_fail("starting over in the user namespace");
}

int cmd_launch(int argc, char **argv)
{
    struct config config;
    char text[16];
    int go[2], pidfd = -1;
    pid_t pid;

    if (argc == 3)
        enter_outer("launch", argv[1], argv[2]);
    take_control();
    config_receive(launch_control, &config);
    if (config.pids)
        limit_processes(config.pids);
    stage_open(&config);
    join_cgroups(config.cgroups, config.cgroup_count);
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, go) < 0)
        launch_fail("making a socket pair");
    pid = clone_box(&pidfd);
    if (pid < 0)
        launch_fail("making the box's user, process and time namespaces");
    if (pid == 0)
        run_box(&config, go[1]);
    close(go[1]);
    launch_tell(text, (size_t)snprintf(text, sizeof text, "P%d", (int)pid), pidfd);
    write_id_maps(pid, config.uid_map, config.gid_map);
    stage_fill(&config, config.rootless ? -1 : open_user_namespace(pid));
    if (send(go[0], "g", 1, MSG_NOSIGNAL) != 1) /* PID 1 has told why it ended */
        return 1;
    return 0;
}
