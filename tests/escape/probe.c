/* Attempts to leave a box, or to hurt its host. `probe NAME [ARGUMENT]` makes one attempt; the same attempt is made on the host as a
 * control, in a form that changes nothing there. Exit status: 0 the attempt had its effect, 1 it was refused (the cause on stdout).
 * An attempt of which only the refusal matters counts as effective when the kernel got as far as looking at its (senseless) arguments. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/io_uring.h>
#include <linux/perf_event.h>
#include <linux/sched.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static const char *argument;

static int refused(void)
{
    printf("refused: %s\n", strerror(errno));
    return 1;
}

static int done(long result)
{
    return result >= 0 ? 0 : refused();
}

/* For calls with senseless arguments: any other error means that permission was not the obstacle. */
static int reached(long result)
{
    return result >= 0 || (errno != EPERM && errno != EACCES && errno != ENOSYS) ? 0 : refused();
}

/* On the host, changes to mounts stay in a namespace of this process; in a box this fails like everything else. */
static void own_mounts(void)
{
    if (unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        exit(refused());
}

static int open_as(int flags)
{
    return done(open(argument, flags | O_NONBLOCK | O_CLOEXEC));
}

static pid_t target(void)
{
    return atoi(argument);
}

static int proc_file(const char *name, int flags)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/%s", argument, name);
    return done(open(path, flags | O_CLOEXEC));
}

static int try_mount(void) { own_mounts(); return done(mount("none", "/tmp", "tmpfs", 0, NULL)); }
static int try_fsopen(void) { return done(syscall(SYS_fsopen, "tmpfs", 0)); }
static int try_open_tree(void) { return done(syscall(SYS_open_tree, AT_FDCWD, "/", 1 /* OPEN_TREE_CLONE */)); }
static int try_remount(void)
{
    own_mounts();
    mount("/proc/sys", "/proc/sys", NULL, MS_BIND, NULL);
    return done(mount(NULL, "/proc/sys", NULL, MS_BIND | MS_REMOUNT, NULL));
}
static int try_umount(void) { own_mounts(); return reached(umount2("/proc", MNT_DETACH)); }
static int try_pivot_root(void) { own_mounts(); return reached(syscall(SYS_pivot_root, "/nowhere", "/nowhere")); }
static int try_cgroup_mount(void)
{
    own_mounts();
    if (mount("none", "/tmp", "cgroup2", 0, NULL) == 0)
        return 0;
    return done(mount("none", "/tmp", "cgroup", 0, "memory"));
}
static int try_unshare_mount(void) { return done(unshare(CLONE_NEWNS)); }
static int try_unshare_user(void) { return done(unshare(CLONE_NEWUSER)); }
static int try_setns(void)
{
    int fd = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    return fd < 0 ? refused() : done(setns(fd, 0));
}
static int try_clone_user(void)
{
    long pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0)
        _exit(0);
    return done(pid);
}
static int try_clone3_user(void)
{
    struct clone_args args = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0)
        _exit(0);
    return done(pid);
}

static int try_ptrace(void)
{
    if (ptrace(PTRACE_ATTACH, target(), NULL, NULL) < 0)
        return refused();
    waitpid(target(), NULL, __WALL);
    ptrace(PTRACE_DETACH, target(), NULL, NULL);
    return 0;
}
static int try_proc_mem(void) { return proc_file("mem", O_RDONLY); }
static int try_proc_maps(void) { return proc_file("maps", O_RDONLY); }
static int try_proc_environ(void) { return proc_file("environ", O_RDONLY); }
static int try_proc_root(void) { return proc_file("root", O_RDONLY); }
static int try_proc_cwd(void) { return proc_file("cwd", O_RDONLY); }
static int try_proc_exe(void) { return proc_file("exe", O_RDONLY); }
static int try_proc_fd(void) { return proc_file("fd", O_RDONLY | O_DIRECTORY); }
static int try_proc_ns(void) { return proc_file("ns/mnt", O_RDONLY); }
static int try_vm_read(void)
{
    char byte;
    struct iovec here = {&byte, 1}, there = {(void *)0x1000, 1};
    return reached(syscall(SYS_process_vm_readv, (long)target(), &here, 1L, &there, 1L, 0L));
}
static int try_pidfd_getfd(void)
{
    int fd = (int)syscall(SYS_pidfd_open, target(), 0);
    return fd < 0 ? refused() : done(syscall(SYS_pidfd_getfd, fd, 0, 0));
}
static int try_signal(void) { return done(kill(target(), 0)); }

static int try_read(void) { return open_as(O_RDONLY); }
static int try_write(void) { return open_as(O_WRONLY); }
static int try_content(void)
{
    char byte;
    int fd = open(argument, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return refused();
    return read(fd, &byte, 1) == 1 ? 0 : (puts("empty"), 1);
}
static int try_mknod(void)
{
    char path[] = "/tmp/probe-device";
    int result, fd;
    unlink(path);
    if (mknod(path, S_IFCHR | 0666, makedev(1, 3)) < 0)
        return refused();
    fd = open(path, O_RDONLY);
    result = done(fd);
    unlink(path);
    return result;
}
static int try_handle(void)
{
    union {
        struct file_handle header;
        char space[sizeof(struct file_handle) + MAX_HANDLE_SZ];
    } handle;
    int mount_id, fd = open("/", O_RDONLY);
    handle.header.handle_bytes = MAX_HANDLE_SZ;
    if (name_to_handle_at(AT_FDCWD, "/etc", &handle.header, &mount_id, 0) < 0)
        handle.header.handle_bytes = 8; /* overlays need not give handles; the call must be refused all the same */
    return reached(open_by_handle_at(fd, &handle.header, O_RDONLY));
}

static int try_add_key(void) { return done(syscall(SYS_add_key, "user", "probe", "x", 1L, -2L /* process keyring */)); }
static int try_keyctl(void) { return done(syscall(SYS_keyctl, 0L /* GET_KEYRING_ID */, -2L, 1L)); }
static int try_bpf(void)
{
    union bpf_attr attributes = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
    return done(syscall(SYS_bpf, BPF_MAP_CREATE, &attributes, sizeof attributes));
}
static int try_userfaultfd(void) { return done(syscall(SYS_userfaultfd, O_CLOEXEC)); }
static int try_perf(void)
{
    struct perf_event_attr attributes = {.type = PERF_TYPE_SOFTWARE, .size = sizeof attributes, .config = PERF_COUNT_SW_CPU_CLOCK};
    return done(syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0));
}
static int try_io_uring(void)
{
    struct io_uring_params parameters = {0};
    return done(syscall(SYS_io_uring_setup, 1, &parameters));
}
static int try_fanotify(void) { return done(syscall(SYS_fanotify_init, 0, O_RDONLY)); }
static int try_kexec(void) { return reached(syscall(SYS_kexec_load, 0L, 1L << 20, NULL, 0L)); }
static int try_init_module(void) { return reached(syscall(SYS_init_module, "x", 1L, "")); }
static int try_finit_module(void) { return reached(syscall(SYS_finit_module, -1, "", 0)); }
static int try_reboot(void) { return reached(syscall(SYS_reboot, 1, 2, 3, NULL)); }
static int try_swapon(void) { return reached(syscall(SYS_swapon, "/nowhere", 0)); }
static int try_acct(void) { return reached(syscall(SYS_acct, "/nowhere")); }
static int try_quotactl(void) { return reached(syscall(SYS_quotactl, 0x800007 << 8, "/nowhere", 0, NULL)); }
static int try_clock(void)
{
    struct timespec senseless = {0, -1};
    return reached(syscall(SYS_clock_settime, CLOCK_REALTIME, &senseless));
}
static int try_syslog(void) { return done(syscall(SYS_syslog, 10, NULL, 0)); }
static int try_ioperm(void)
{
    if (syscall(SYS_ioperm, 0x80L, 1L, 1) < 0)
        return refused();
    return done(syscall(SYS_ioperm, 0x80L, 1L, 0));
}
static int try_hostname(void)
{
    char name[65];
    unshare(CLONE_NEWUTS);
    gethostname(name, sizeof name);
    return done(sethostname(name, strlen(name)));
}
static int try_personality(void) { return done(personality(0x0400000 /* READ_IMPLIES_EXEC */)); }
static int try_capset(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    syscall(SYS_capget, &header, data);
    data[0].effective |= 1u << CAP_SYS_ADMIN;
    data[0].permitted |= 1u << CAP_SYS_ADMIN;
    return done(syscall(SYS_capset, &header, data));
}
static int try_nice(void) { return done(setpriority(PRIO_PROCESS, 0, -1)); }
static int try_realtime(void)
{
    struct sched_param parameters = {.sched_priority = 1};
    long result = syscall(SYS_sched_setscheduler, 0, SCHED_FIFO, &parameters);
    return done(result);
}
/* A core limit of 0 lets the kernel pipe a dump into the host's core handler; 1 does not. */
static int try_core_limit(void)
{
    struct rlimit none = {0, 0}, now;
    if (setrlimit(RLIMIT_CORE, &none) < 0 || getrlimit(RLIMIT_CORE, &now) < 0)
        return refused();
    return now.rlim_cur == 0 ? 0 : (puts("refused: no effect"), 1);
}
static int try_effective_root(void) { return geteuid() == 0 ? 0 : (puts("not root"), 1); }

static int terminal_ioctl(unsigned long request, void *value)
{
    int controller = posix_openpt(O_RDWR | O_NOCTTY), terminal;
    if (controller < 0 || grantpt(controller) < 0 || unlockpt(controller) < 0)
        return refused();
    setsid();
    terminal = open(ptsname(controller), O_RDWR);
    if (terminal < 0)
        return refused();
    ioctl(terminal, TIOCSCTTY, 0);
    return done(ioctl(terminal, request, value));
}
static int try_tiocsti(void) { return terminal_ioctl(TIOCSTI, "x"); }
static int try_tiocsti_high(void) { return terminal_ioctl(TIOCSTI | 1ul << 32, "x"); }
static int try_line_discipline(void)
{
    int tty = 0;
    return terminal_ioctl(TIOCSETD, &tty);
}

static int try_packet_socket(void) { return done(socket(AF_PACKET, SOCK_RAW, 0)); }
static int try_packet_socket_of_ipv4(void) { return done(socket(AF_INET, SOCK_PACKET, 0)); }
static int try_dccp(void) { return done(socket(AF_INET, SOCK_DCCP, 0)); }
static int try_vsock(void) { return done(socket(AF_VSOCK, SOCK_STREAM, 0)); }
static int try_alg(void) { return done(socket(AF_ALG, SOCK_SEQPACKET, 0)); }
static int try_netlink_generic(void) { return done(socket(AF_NETLINK, SOCK_RAW, 16)); }
static int try_netlink_uevent(void) { return done(socket(AF_NETLINK, SOCK_RAW, 15)); }
static int try_abstract(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    size_t length = strlen(argument);
    memcpy(address.sun_path + 1, argument, length);
    return done(connect(fd, (struct sockaddr *)&address, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length)));
}
static int try_unix(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", argument);
    return done(connect(fd, (struct sockaddr *)&address, sizeof address));
}
static int try_loopback(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argument)), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    return done(connect(socket(AF_INET, SOCK_STREAM, 0), (struct sockaddr *)&address, sizeof address));
}
static int try_shared_segment(void) { return done(shmget(atoi(argument), 0, 0)); }

/* Inside a chroot: open a way back, chroot deeper, climb out, and look whether the file is there. */
static int try_chroot(void)
{
    int way_back;
    if (access(argument, F_OK) == 0) { /* the control: begin in a chroot of our own */
        char cell[] = "/tmp/probe-cell-XXXXXX";
        if (!mkdtemp(cell) || chroot(cell) < 0 || chdir("/") < 0)
            return refused();
    }
    mkdir("deeper", 0755);
    way_back = open(".", O_RDONLY | O_DIRECTORY);
    if (way_back < 0 || chroot("deeper") < 0 || fchdir(way_back) < 0)
        return refused();
    rmdir("deeper");
    for (int i = 0; i < 64; i++)
        if (chdir("..") < 0)
            return refused();
    if (chroot(".") < 0)
        return refused();
    return done(access(argument, F_OK));
}

static int try_int80(void)
{
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(20L /* getpid */) : "memory", "r8", "r9", "r10", "r11");
    return result == getpid() ? 0 : (puts("no 32-bit calls"), 1);
}
static int try_x32(void) { return done(syscall(SYS_getpid | 0x40000000)); }

/* The way of CVE-2019-5736: hold the executable of a process, end the process, open the file for writing. */
static int try_overwrite(void)
{
    char path[64], again[64];
    int held, writable;
    snprintf(path, sizeof path, "/proc/%s/exe", argument);
    held = open(path, O_RDONLY | O_CLOEXEC);
    if (held < 0)
        return refused();
    kill(target(), SIGKILL);
    snprintf(again, sizeof again, "/proc/self/fd/%d", held);
    for (int i = 0; i < 60; i++) {
        writable = open(again, O_WRONLY | O_CLOEXEC);
        if (writable >= 0 || errno != ETXTBSY)
            break;
        usleep(5000);
    }
    return writable < 0 ? refused() : done(write(writable, "x", 1) == 1 ? 0 : -1);
}

static int count_up_to(int limit, int (*one)(int))
{
    int count = 0;
    while (count < limit && one(count) == 0)
        count++;
    printf("%d\n", count);
    return count == limit ? 0 : 1;
}
static int one_process(int number)
{
    pid_t parent = getpid();
    pid_t pid = fork();
    (void)number;
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() == parent)
            pause();
        _exit(0);
    }
    return pid < 0;
}
static int one_descriptor(int number)
{
    (void)number;
    return dup(0) < 0;
}
static int one_file(int number)
{
    char path[64];
    int fd;
    snprintf(path, sizeof path, "/dev/probe-%d", number);
    fd = open(path, O_WRONLY | O_CREAT, 0600);
    if (fd < 0)
        return 1;
    close(fd);
    return 0;
}
static int try_processes(void) { return count_up_to(atoi(argument), one_process); }
static int try_descriptors(void) { return count_up_to(atoi(argument), one_descriptor); }
static int try_inodes(void)
{
    own_mounts();
    mount("none", "/dev", "tmpfs", 0, NULL); /* the control's own; a box keeps the one it has */
    return count_up_to(atoi(argument), one_file);
}

#define ATTEMPT(name) {#name, try_##name}
static const struct {
    const char *name;
    int (*attempt)(void);
} attempts[] = {
    ATTEMPT(mount), ATTEMPT(fsopen), ATTEMPT(open_tree), ATTEMPT(remount), ATTEMPT(umount), ATTEMPT(pivot_root), ATTEMPT(cgroup_mount),
    ATTEMPT(unshare_mount), ATTEMPT(unshare_user), ATTEMPT(setns), ATTEMPT(clone_user), ATTEMPT(clone3_user), ATTEMPT(ptrace),
    ATTEMPT(proc_mem), ATTEMPT(proc_maps), ATTEMPT(proc_environ), ATTEMPT(proc_root), ATTEMPT(proc_cwd), ATTEMPT(proc_exe),
    ATTEMPT(proc_fd), ATTEMPT(proc_ns), ATTEMPT(vm_read), ATTEMPT(pidfd_getfd), ATTEMPT(signal), ATTEMPT(read), ATTEMPT(write),
    ATTEMPT(content), ATTEMPT(mknod), ATTEMPT(handle), ATTEMPT(add_key), ATTEMPT(keyctl), ATTEMPT(bpf), ATTEMPT(userfaultfd),
    ATTEMPT(perf), ATTEMPT(io_uring), ATTEMPT(fanotify), ATTEMPT(kexec), ATTEMPT(init_module), ATTEMPT(finit_module), ATTEMPT(reboot),
    ATTEMPT(swapon), ATTEMPT(acct), ATTEMPT(quotactl), ATTEMPT(clock), ATTEMPT(syslog), ATTEMPT(ioperm), ATTEMPT(hostname),
    ATTEMPT(personality), ATTEMPT(capset), ATTEMPT(nice), ATTEMPT(realtime), ATTEMPT(core_limit), ATTEMPT(effective_root), ATTEMPT(tiocsti),
    ATTEMPT(tiocsti_high), ATTEMPT(line_discipline), ATTEMPT(packet_socket), ATTEMPT(packet_socket_of_ipv4), ATTEMPT(dccp),
    ATTEMPT(vsock), ATTEMPT(alg), ATTEMPT(netlink_generic), ATTEMPT(netlink_uevent), ATTEMPT(abstract), ATTEMPT(unix), ATTEMPT(loopback), ATTEMPT(shared_segment), ATTEMPT(chroot),
    ATTEMPT(int80), ATTEMPT(x32), ATTEMPT(overwrite), ATTEMPT(processes), ATTEMPT(descriptors), ATTEMPT(inodes),
};

int main(int argc, char **argv)
{
    argument = argc > 2 ? argv[2] : "";
    for (size_t i = 0; argc > 1 && i < sizeof attempts / sizeof *attempts; i++)
        if (!strcmp(argv[1], attempts[i].name))
            return attempts[i].attempt();
    fprintf(stderr, "no such attempt\n");
    return 2;
}
