/* box-agent vm [UID_MAP GID_MAP]: start a VM and become its keeper.
 *
 * As `launch`: the configuration comes on standard input, a SOCK_SEQPACKET socket, with the descriptors LISTEN, LOG0, LOG1, EXIT and
 * CONSOLE, then the memory's if there is a `memory` record, then the emulator's, which it finds from 10 on in their order (3 is the
 * line, once the guard has moved it there; 4 the files of the mounts if there are any). Answers: P<pid> with a pidfd, E<text>, F<text> (the guest has failed), B (the guest has booted and waits), R (the box is up); the host sends V<records> to
 * resume the guest, and commits with G.
 *
 *     launcher                          keeper, PID 1                   emulator
 *     join cgroups
 *     mount, net, ipc, uts namespaces
 *     a root of the host's programs
 *     clone3(pid) ------------------->  pivot_root, drop everything
 *     exit                              fork ------------------------>  filter, exec
 *                                       serve                                             */
#define _GNU_SOURCE
#include "agent.h"
#include "guard/guard.h"
#include "keeper.h"
#include "launch.h"
#include "share.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/mount.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { VM_LISTEN, VM_LOG0, VM_LOG1, VM_EXIT, VM_CONSOLE, VM_FIXED, VM_ROOM = 200, EMULATOR_FIRST = 10, EMULATOR_FD_MAX = 8192 };

#define GUARD_PATH "/guard.so"

struct machine {
    const char *stage;
    const char **binds; /* of the host, read-only, at their own places */
    size_t bind_count;
    char **argv; /* NULL-terminated by the array's zeroed end */
    size_t argc;
    const char **cgroups;
    size_t cgroup_count;
    unsigned uid, gid, group; /* as root: who runs it, and the one further group (for /dev/kvm) */
    bool switch_user, memory;
    rlim_t file_max; /* how large a file the emulator may make */
    const char *uid_map, *gid_map; /* of the mounts' user namespace */
    struct bind *mounts;
    size_t mount_count;
    struct share share;
    int fds[VM_ROOM];
    size_t fd_count;
};

static void add(const char ***list, size_t *count, const char *value)
{
    *list = config_grow(*list, *count, sizeof **list);
    (*list)[(*count)++] = value;
}

static void add_mount(struct machine *machine, const char *source, bool read_only)
{
    machine->mounts = config_grow(machine->mounts, machine->mount_count, sizeof *machine->mounts);
    machine->mounts[machine->mount_count++] = (struct bind){source, NULL, read_only};
}

static void take_record(struct machine *machine, const char *key, const char *value)
{
    if (!strcmp(key, "stage"))
        machine->stage = value;
    else if (!strcmp(key, "bind"))
        add(&machine->binds, &machine->bind_count, value);
    else if (!strcmp(key, "argument"))
        add((const char ***)&machine->argv, &machine->argc, value);
    else if (!strcmp(key, "cgroup"))
        add(&machine->cgroups, &machine->cgroup_count, value);
    else if (!strcmp(key, "user"))
        machine->switch_user = sscanf(value, "%u:%u:%u", &machine->uid, &machine->gid, &machine->group) == 3;
    else if (!strcmp(key, "memory"))
        machine->memory = true;
    else if (!strcmp(key, "file_max"))
        machine->file_max = strtoull(value, NULL, 10);
    else if (!strcmp(key, "uid_map"))
        machine->uid_map = value;
    else if (!strcmp(key, "gid_map"))
        machine->gid_map = value;
    else if (!strcmp(key, "mount_rw") || !strcmp(key, "mount_ro"))
        add_mount(machine, value, !strcmp(key, "mount_ro"));
    else
        launch_fail_about("unknown configuration key", key);
}

static void receive_config(struct machine *machine)
{
    size_t length;
    const char *key, *value;
    char *rest = config_message(launch_control, machine->fds, VM_ROOM, &machine->fd_count, &length), *end = rest + length;

    while (config_next(&rest, end, &key, &value))
        take_record(machine, key, value);
    add((const char ***)&machine->argv, &machine->argc, NULL);
    errno = 0;
    if (!machine->stage || machine->argc < 2 || machine->fd_count < VM_FIXED + (size_t)machine->memory)
        launch_fail("incomplete configuration");
}

/* A host path at the same place below the stage: a directory, a file or a device, read-only; a symlink as it is. */
static void place(const char *path)
{
    struct stat status;
    char target[512], part[512];

    if (lstat(path, &status) < 0)
        return; /* what this host lacks, its programs do without */
    snprintf(target, sizeof target, ".%s", path);
    for (char *slash = strchr(target + 2, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(target, 0755);
        *slash = '/';
    }
    if (S_ISLNK(status.st_mode)) {
        ssize_t size = readlink(path, part, sizeof part - 1);
        part[size < 0 ? 0 : size] = 0;
        if (symlink(part, target) < 0)
            launch_fail_about("making a link of the stage", target);
        return;
    }
    if ((S_ISDIR(status.st_mode) ? mkdir(target, 0755) : mknod(target, S_IFREG | 0644, 0)) < 0)
        launch_fail_about("making a part of the stage", target);
    int tree = mount_clone(path, false, "opening a part of the host"), fd = open(target, O_PATH | O_CLOEXEC);
    bool device = S_ISCHR(status.st_mode);
    mount_set(tree, false, MOUNT_ATTR_NOSUID | (device ? 0 : MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV), -1, "making a part of the stage read-only");
    if (fd < 0 || mount_attach(tree, fd) < 0)
        launch_fail_about("mounting on the stage", target);
    close(tree);
    close(fd);
}

static void place_guard(void)
{
    int fd = open("." GUARD_PATH, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
    size_t size = (size_t)(guard_image_end - guard_image);
    if (fd < 0 || write(fd, guard_image, size) != (ssize_t)size || fchmod(fd, 0444) < 0)
        launch_fail("placing the guard of the emulator's network stack");
    close(fd);
}

static void build_root(struct machine *machine)
{
    if (unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS) < 0)
        launch_fail("making the machine's namespaces");
    loopback_up();
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        launch_fail("making the launcher's mounts private");
    if (mount("tmpfs", machine->stage, "tmpfs", MS_NOSUID, "mode=0755,size=1m") < 0 || chdir(machine->stage) < 0)
        launch_fail("mounting the stage");
    for (size_t i = 0; i < machine->bind_count; i++)
        place(machine->binds[i]);
    place_guard();
    if (machine->mount_count)
        share_prepare(&machine->share, machine->mounts, machine->mount_count, machine->uid_map, machine->gid_map, machine->switch_user);
    if (syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
        launch_fail("changing the root");
    if (mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID, NULL) < 0)
        launch_fail("making the root read-only");
}

static void drop_rights(const struct machine *machine)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {{0}, {0}};

    for (int capability = 0; capability < 64; capability++)
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 && errno != EINVAL)
            launch_fail("dropping capabilities from the bounding set");
    if (machine->switch_user) {
        gid_t group = machine->group;
        if (setgroups(1, &group) < 0 || setresgid(machine->gid, machine->gid, machine->gid) < 0
            || setresuid(machine->uid, machine->uid, machine->uid) < 0)
            launch_fail("becoming the machine's user");
    }
    if (syscall(SYS_capset, &header, none) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        launch_fail("dropping rights");
}

static void send_fd(int socket, int fd)
{
    int control = launch_control;
    launch_control = socket;
    launch_tell("", 0, fd);
    launch_control = control;
}

/* In the child: descriptors to their places, the filter, the program. `memory`: where its listener goes. -1: there is none. */
static _Noreturn void run_emulator(struct machine *machine, int line, int files, int output, int memory)
{
    const struct rlimit no_core = {1, 1}, file_size = {machine->file_max, machine->file_max};
    struct rlimit open_files;
    size_t first = VM_FIXED + (size_t)machine->memory, count = machine->fd_count - first;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC), high[VM_ROOM];

    /* By way of high numbers: none may land on one that is still to be moved. */
    line = fcntl(line, F_DUPFD_CLOEXEC, 512);
    output = fcntl(output, F_DUPFD_CLOEXEC, 512);
    files = files < 0 ? -1 : fcntl(files, F_DUPFD_CLOEXEC, 512);
    memory = memory < 0 ? -1 : fcntl(memory, F_DUPFD_CLOEXEC, 512);
    launch_control = fcntl(launch_control, F_DUPFD_CLOEXEC, 512);
    for (size_t i = 0; i < count; i++)
        high[i] = fcntl(machine->fds[first + i], F_DUPFD_CLOEXEC, 512);
    for (size_t i = 0; i < count; i++)
        if (dup2(high[i], EMULATOR_FIRST + (int)i) < 0)
            launch_fail("handing over descriptors");
    if (dup2(line, GUARD_LINE) < 0 || dup2(null, EMULATOR_LINE) < 0 || (files >= 0 && dup2(files, EMULATOR_FILES) < 0) || dup2(null, 0) < 0 || dup2(output, 1) < 0 || dup2(output, 2) < 0)
        launch_fail("handing over descriptors");
    setrlimit(RLIMIT_CORE, &no_core); /* see seccomp.c */
    setrlimit(RLIMIT_FSIZE, &file_size);
    signal(SIGXFSZ, SIG_IGN); /* an error of its disk then */
    if (getrlimit(RLIMIT_NOFILE, &open_files) == 0) { /* each connection of the guest is one */
        open_files.rlim_cur = open_files.rlim_max = open_files.rlim_max < EMULATOR_FD_MAX ? open_files.rlim_max : EMULATOR_FD_MAX;
        setrlimit(RLIMIT_NOFILE, &open_files);
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (memory >= 0) {
        int listener = memory_filter();
        if (listener < 0)
            launch_fail("installing the filter for the memory");
        send_fd(memory, listener);
    }
    if (seccomp_install() < 0) /* its own filter, by -sandbox, comes on top */
        launch_fail("installing the filter of system calls");
    execve(machine->argv[0], machine->argv, (char *[]){"LD_PRELOAD=" GUARD_PATH, NULL});
    launch_fail_about("running", machine->argv[0]);
}

static int receive_fd(int socket)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } space;
    char byte;
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &space, .msg_controllen = sizeof space};
    int fd = -1;

    if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) < 0 || !CMSG_FIRSTHDR(&message))
        _exit(1); /* the child has told why */
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

static _Noreturn void run_machine(struct machine *machine)
{
    int line[2], output[2], memory[2] = {-1, -1};
    struct keeper keeper = {
        .listen_fd = machine->fds[VM_LISTEN],
        .log_fd = {machine->fds[VM_LOG0], machine->fds[VM_LOG1]},
        .exit_fd = machine->fds[VM_EXIT],
        .console_fd = machine->fds[VM_CONSOLE],
        .notify_fd = -1,
        .memory_fd = machine->memory ? machine->fds[VM_FIXED] : -1,
    };

    setsid();
    int files = machine->mount_count ? share_start(&machine->share) : -1;
    drop_rights(machine);
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, line) < 0 || pipe2(output, O_CLOEXEC) < 0
        || (machine->memory && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, memory) < 0))
        launch_fail("making the machine's channels");
    fcntl(output[0], F_SETFL, O_NONBLOCK);
    keeper.line_fd = line[0];
    keeper.output_fd = output[0];
    keeper.emulator = fork();
    if (keeper.emulator < 0)
        launch_fail("starting the emulator");
    if (keeper.emulator == 0)
        run_emulator(machine, line[1], files, output[1], memory[1]);
    prctl(PR_SET_DUMPABLE, 0); /* the emulator has the same user, and must not reach into its keeper */
    signal(SIGPIPE, SIG_IGN);
    close(line[1]);
    close(output[1]);
    if (files >= 0)
        close(files);
    if (machine->memory) {
        close(memory[1]);
        keeper.notify_fd = receive_fd(memory[0]);
        close(memory[0]);
    }
    for (size_t i = VM_FIXED + (size_t)machine->memory; i < machine->fd_count; i++)
        close(machine->fds[i]);
    keeper_run(&keeper);
}

int cmd_vm(int argc, char **argv)
{
    static struct machine machine;
    struct clone_args args = {.flags = CLONE_NEWPID | CLONE_PIDFD, .exit_signal = SIGCHLD};
    int pidfd = -1;
    char text[16];

    if (argc == 3)
        enter_outer("vm", argv[1], argv[2]);
    take_control();
    if (syscall(SYS_close_range, 3, launch_control - 1, 0) < 0 || syscall(SYS_close_range, launch_control + 1, ~0u, 0) < 0)
        launch_fail("closing descriptors");
    receive_config(&machine);
    join_cgroups(machine.cgroups, machine.cgroup_count);
    build_root(&machine);
    args.pidfd = (uint64_t)(uintptr_t)&pidfd;
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid < 0)
        launch_fail("making the machine's process namespace");
    if (pid == 0)
        run_machine(&machine);
    launch_tell(text, (size_t)snprintf(text, sizeof text, "P%ld", pid), pidfd);
    return 0;
}
