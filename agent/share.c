#define _GNU_SOURCE
#include "share.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROOT "/share"

enum { CHANNEL, ROOT_FD, FIRST_FREE };

/* Whose fault it is when a mount cannot be made: neither the machine's nor its template's. */
static void report(const char *text, size_t length)
{
    char message[1024];
    launch_tell(message, (size_t)snprintf(message, sizeof message, "F%.*s", (int)length, text), -1);
    _exit(1);
}

/* As a container's: its ids are those of the box. A process is needed to make it, and not for longer. */
static int make_user_namespace(const char *uid_map, const char *gid_map)
{
    struct clone_args args = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
    int hold[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, hold) < 0)
        launch_fail("making a socket pair");
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid < 0)
        launch_fail("making the user namespace of the mounts");
    if (pid == 0) {
        close(hold[0]);
        await_byte(hold[1]); /* which never comes */
        _exit(0);
    }
    close(hold[1]);
    write_id_maps((pid_t)pid, uid_map, gid_map);
    int userns = open_user_namespace((pid_t)pid);
    close(hold[0]);
    waitpid((pid_t)pid, NULL, 0);
    return userns;
}

void share_prepare(struct share *share, const struct bind *binds, size_t count, const char *uid_map, const char *gid_map, bool shift)
{
    launch_failed = report;
    errno = 0;
    if (count > SHARE_MOUNT_MAX)
        launch_fail("more mounts than a machine can have (64)");
    share->userns = make_user_namespace(uid_map, gid_map);
    for (share->count = 0; share->count < count; share->count++)
        share->trees[share->count] = stage_tree(&binds[share->count], shift ? share->userns : -1);
    if (mkdir("." ROOT, 0755) < 0)
        launch_fail("making a directory of the stage");
    launch_failed = NULL;
}

/* A root with the mounts, in a mount namespace that the server has no rights over. */
static void take_root(const struct share *share)
{
    if (unshare(CLONE_NEWNS) < 0 || mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m") < 0 || chdir(ROOT) < 0)
        launch_fail("mounting the root of the mounts");
    for (size_t i = 0; i < share->count; i++)
        stage_place(share->trees[i], "", i);
    if (mount(NULL, ROOT, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) < 0
        || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
        launch_fail("changing the root to the mounts");
}

/* As much of root as files need. */
static void drop_rights(int userns)
{
    const uint32_t kept = 1u << CAP_CHOWN | 1u << CAP_DAC_OVERRIDE | 1u << CAP_FOWNER | 1u << CAP_FSETID;
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{.effective = kept, .permitted = kept}};

    if (setns(userns, CLONE_NEWUSER) < 0)
        launch_fail("entering the user namespace of the mounts");
    if (setgroups(0, NULL) < 0 && errno != EPERM) /* EPERM: an ordinary user has no ids but its own */
        launch_fail("dropping supplementary groups");
    if (setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0)
        launch_fail("becoming the root of the mounts");
    if (syscall(SYS_capset, &header, data) < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        launch_fail("dropping rights");
}

static void filter(void)
{
    static const int allowed[] = {
        SYS_brk, SYS_clock_gettime, SYS_close, SYS_exit, SYS_exit_group, SYS_fallocate, SYS_fchmod, SYS_fchmodat, SYS_fchownat, SYS_fcntl,
        SYS_fdatasync, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_getdents64, SYS_getrandom, SYS_linkat, SYS_lseek, SYS_madvise,
        SYS_mkdirat, SYS_mknodat, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_openat, SYS_openat2, SYS_pread64, SYS_prlimit64, SYS_pwritev2,
        SYS_readlinkat, SYS_recvfrom, SYS_renameat2, SYS_sendto, SYS_statx, SYS_symlinkat, SYS_unlinkat, SYS_utimensat,
    };
    enum { COUNT = sizeof allowed / sizeof *allowed };
    struct sock_filter code[COUNT + 6] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        [COUNT + 4] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        [COUNT + 5] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {COUNT + 6, code};

    for (unsigned i = 0; i < COUNT; i++)
        code[4 + i] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)allowed[i], (unsigned char)(COUNT - i), 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0)
        launch_fail("installing the filter of the mounts");
}

static _Noreturn void run_server(const struct share *share, int channel)
{
    launch_failed = report;
    prctl(PR_SET_NAME, "box-files", 0, 0, 0);
    take_root(share);
    drop_rights(share->userns);
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        launch_fail("opening the root of the mounts");
    channel = fcntl(channel, F_DUPFD_CLOEXEC, 512);
    root = fcntl(root, F_DUPFD_CLOEXEC, 512);
    if (channel < 0 || root < 0 || dup2(channel, CHANNEL) < 0 || dup2(root, ROOT_FD) < 0)
        launch_fail("handing over descriptors");
    launch_failed = NULL;
    syscall(SYS_close_range, FIRST_FREE, ~0u, 0);
    umask(0);
    filter();
    share_serve(CHANNEL, ROOT_FD);
}

int share_start(const struct share *share)
{
    int channel[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel) < 0)
        launch_fail("making the channel of the mounts");
    pid_t pid = fork();
    if (pid < 0)
        launch_fail("starting the server of the mounts");
    if (pid == 0)
        run_server(share, channel[0]);
    close(channel[0]);
    close(share->userns);
    for (size_t i = 0; i < share->count; i++)
        close(share->trees[i]);
    return channel[1];
}
