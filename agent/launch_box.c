/* What PID 1 does between its birth and the agent: namespaces, root, /proc, /sys, /dev, privileges. Every path of the image is
 * hostile, so targets are opened relative to the root's descriptor and mounts are attached to descriptors. */
#define _GNU_SOURCE
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/mount.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static const uint64_t SPECIAL = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;

void loopback_up(void)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
        launch_fail("bringing up the loopback interface");
    close(fd);
}

/* The namespaces that need no identity yet: made while the launcher still prepares the root. */
void box_namespaces(const struct config *config)
{
    if (unshare(CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC) < 0)
        launch_fail("making the network, host name and IPC namespaces");
    if (sethostname(config->hostname, strlen(config->hostname)) < 0)
        launch_fail("setting the host name");
    loopback_up();
}

/* Open a directory of the root that must be one, making it when absent. A symlink here is an image that lies about its layout. */
int base_directory(int root, const char *name)
{
    int fd;

    if (mkdirat(root, name, 0755) < 0 && errno != EEXIST)
        launch_fail_about("making a directory in the root", name);
    fd = openat(root, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        launch_fail_about("the image has something else in the place of the directory", name);
    return fd;
}

static void attach_or_fail(int tree, int target, const char *name)
{
    if (tree < 0 || mount_attach(tree, target) < 0)
        launch_fail_about("mounting", name);
}

/* Mount the tree, which stays open, on a directory of `parent`. */
static void attach_at(int tree, int parent, const char *name)
{
    int target = base_directory(parent, name);

    attach_or_fail(tree, target, name);
    close(target);
}

/* Hide a file behind /dev/null, a directory behind an empty one; a path that is absent needs no mask. */
static void mask(int base, const char *path)
{
    static const char *const none[] = {NULL};
    struct stat status;
    int tree;
    int target = open_in_root(base, path, O_PATH, 0);

    if (target < 0)
        return;
    if (fstat(target, &status) < 0)
        launch_fail_about("masking", path);
    if (S_ISDIR(status.st_mode))
        tree = mount_new("tmpfs", none, SPECIAL | MOUNT_ATTR_RDONLY);
    else
        tree = mount_clone("/dev/null", false, NULL);
    attach_or_fail(tree, target, path);
    close(tree);
    close(target);
}

static void make_read_only(int base, const char *path)
{
    int target = open_in_root(base, path, O_PATH, 0);
    int tree;

    if (target < 0)
        return;
    tree = (int)syscall(SYS_open_tree, target, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    if (tree < 0)
        launch_fail_about("making read-only", path);
    mount_set(tree, false, SPECIAL | MOUNT_ATTR_RDONLY, -1, "making a part of /proc read-only");
    attach_or_fail(tree, target, path);
    close(tree);
    close(target);
}

static void mount_proc(int root)
{
    static const char *const options[] = {NULL};
    static const char *const masked[] = {"acpi",      "asound",     "interrupts",  "kcore", "keys",           "kmsg", "latency_stats",
                                         "sched_debug", "scsi", "timer_list", "timer_stats"};
    static const char *const fixed[] = {"bus", "fs", "irq", "sys", "sysrq-trigger"};
    int tree = mount_new("proc", options, SPECIAL);

    attach_at(tree, root, "proc");
    for (size_t i = 0; i < sizeof masked / sizeof *masked; i++)
        mask(tree, masked[i]);
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++)
        make_read_only(tree, fixed[i]);
    close(tree);
}

/* A kernel that refuses sysfs here (its own is partly covered, as in a container) gives the box an empty one. */
static void mount_sys(int root)
{
    static const char *const options[] = {NULL};
    static const char *const masked[] = {"firmware", "devices/virtual/block", "devices/virtual/powercap", "kernel/debug", "kernel/tracing", "fs/cgroup"};
    int tree = mount_new("sysfs", options, SPECIAL | MOUNT_ATTR_RDONLY);

    if (tree < 0)
        tree = mount_new("tmpfs", options, SPECIAL | MOUNT_ATTR_RDONLY);
    attach_at(tree, root, "sys");
    for (size_t i = 0; i < sizeof masked / sizeof *masked; i++)
        mask(tree, masked[i]);
    close(tree);
}

/* Device nodes cannot be made in a user namespace, so the host's are bound. */
static void bind_device(int dev, const char *name)
{
    char path[32];
    int tree, target;

    snprintf(path, sizeof path, "/dev/%s", name);
    tree = mount_clone(path, false, "opening a device");
    if (mknodat(dev, name, S_IFREG | 0666, 0) < 0)
        launch_fail_about("making a device", name);
    target = openat(dev, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    attach_or_fail(tree, target, path);
    close(tree);
    close(target);
}

static void mount_below(int dev, const char *name, const char *type, const char *const options[], uint64_t attributes)
{
    int tree = mount_new(type, options, attributes);

    attach_at(tree, dev, name);
    close(tree);
}

static void mount_dev(const struct config *config, int root)
{
    static const char *const dev_options[] = {"mode", "0755", "size", "1m", "nr_inodes", "1k", NULL};
    static const char *const pts_options[] = {"newinstance", NULL, "ptmxmode", "0666", "mode", "0620", NULL, NULL, NULL};
    static const char *const pts_gid_options[] = {"newinstance", NULL, "ptmxmode", "0666", "mode", "0620", "gid", "5", NULL};
    static const char *const shm_options[] = {"mode", "1777", "size", "64m", "nr_inodes", "64k", NULL};
    static const char *const no_options[] = {NULL};
    static const char *const devices[] = {"full", "null", "random", "tty", "urandom", "zero"};
    static const char *const links[][2] = {{"/proc/self/fd", "fd"},       {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
                                           {"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"}};
    int dev = mount_new("tmpfs", dev_options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);

    attach_at(dev, root, "dev");
    for (size_t i = 0; i < sizeof devices / sizeof *devices; i++)
        bind_device(dev, devices[i]);
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (symlinkat(links[i][0], dev, links[i][1]) < 0)
            launch_fail_about("making a link in /dev", links[i][1]);
    mount_below(dev, "pts", "devpts", config->all_ids ? pts_gid_options : pts_options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
    mount_below(dev, "shm", "tmpfs", shm_options, SPECIAL);
    mount_below(dev, "mqueue", "mqueue", no_options, SPECIAL);
    close(dev);
}

/* Open the target of a bind below the root, making it (and the directories above it) when it is absent. Returns -1 with errno. */
static int open_target(int root, const char *target, bool directory)
{
    char path[4096];
    size_t length = strlen(target);
    int fd = open_in_root(root, target, O_PATH, 0);

    if (fd >= 0 || errno != ENOENT)
        return fd;
    if (length >= sizeof path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(path, target, length + 1);
    for (char *slash = path; slash; slash = strchr(slash + 1, '/')) {
        int parent;
        char *name = slash + strspn(slash, "/");
        char *end = strchr(name, '/');
        char kept = *slash;

        if (!*name || (!end && !directory))
            break;
        *slash = '\0';
        parent = open_in_root(root, *path ? path : ".", O_PATH | O_DIRECTORY, 0);
        *slash = kept;
        if (parent < 0)
            return -1;
        if (end)
            *end = '\0';
        if (mkdirat(parent, name, 0755) < 0 && errno != EEXIST) {
            close(parent);
            return -1;
        }
        if (end)
            *end = '/';
        close(parent);
    }
    if (!directory) { /* follows a dangling symlink, as far as the root */
        fd = open_in_root(root, target, O_WRONLY | O_CREAT | O_NONBLOCK | O_NOCTTY, 0644);
        if (fd < 0)
            return -1;
        close(fd);
    }
    return open_in_root(root, target, O_PATH, 0);
}

void bind_into(int root, const char *source, const char *target, bool required)
{
    int tree = mount_clone(source, true, "opening the stage's mount");
    struct stat status;
    int fd;

    if (fstat(tree, &status) < 0)
        launch_fail_about("looking at the stage's mount", source);
    fd = open_target(root, target, S_ISDIR(status.st_mode));
    if ((fd < 0 || mount_attach(tree, fd) < 0) && required)
        launch_fail_about("mounting in the box at", target);
    if (fd >= 0)
        close(fd);
    close(tree);
}

/* Called with the stage as the working directory; afterwards nothing of the host's file system is in reach. */
void box_root(const struct config *config)
{
    char name[24];
    int root, tree;

    if (unshare(CLONE_NEWNS | CLONE_NEWCGROUP) < 0)
        launch_fail("making the box's mount and cgroup namespaces");
    tree = mount_clone("root", true, "opening the root"); /* the locked original cannot become a root directory */
    root = open("root", O_PATH | O_DIRECTORY | O_CLOEXEC);
    attach_or_fail(tree, root, "the root");
    close(tree);
    close(root);
    root = open("root", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        launch_fail("opening the root");

    mount_proc(root);
    mount_sys(root);
    mount_dev(config, root);
    /* An image in which these cannot be mounted (a directory, a loop of links) harms only itself. */
    bind_into(root, "etc/hostname", "/etc/hostname", false);
    bind_into(root, "etc/hosts", "/etc/hosts", false);
    bind_into(root, "etc/resolv.conf", "/etc/resolv.conf", false);
    for (size_t i = 0; i < config->bind_count; i++) {
        snprintf(name, sizeof name, "b%zu", i);
        bind_into(root, name, config->binds[i].target, true);
    }

    if (fchdir(root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
        launch_fail("changing the root");
    close(root);
}

static void limit_resources(void)
{
    const struct rlimit no_core = {1, 1}; /* see seccomp.c */
    struct rlimit files;

    if (setrlimit(RLIMIT_CORE, &no_core) < 0 || getrlimit(RLIMIT_NOFILE, &files) < 0)
        launch_fail("setting resource limits");
    if (files.rlim_max > 1048576)
        files.rlim_max = 1048576;
    files.rlim_cur = files.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &files) < 0)
        launch_fail("limiting open files");
}

/* Docker's default set: enough for package managers and servers, nothing that administers the kernel. */
static const unsigned char kept_capabilities[] = {
    CAP_CHOWN,      CAP_DAC_OVERRIDE, CAP_FOWNER,           CAP_FSETID,     CAP_KILL,  CAP_SETGID,      CAP_SETUID,
    CAP_SETPCAP,    CAP_NET_BIND_SERVICE, CAP_NET_RAW,      CAP_SYS_CHROOT, CAP_MKNOD, CAP_AUDIT_WRITE, CAP_SETFCAP,
};

static void limit_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0}, {0}};
    uint64_t kept = 0;

    for (size_t i = 0; i < sizeof kept_capabilities; i++)
        kept |= (uint64_t)1 << kept_capabilities[i];
    for (int capability = 0; capability < 64; capability++)
        if (!(kept >> capability & 1) && prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 && errno != EINVAL)
            launch_fail("dropping capabilities from the bounding set");
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
        launch_fail("clearing the ambient capabilities");
    data[0].effective = data[0].permitted = (uint32_t)kept;
    data[1].effective = data[1].permitted = (uint32_t)(kept >> 32);
    if (syscall(SYS_capset, &header, data) < 0)
        launch_fail("setting the capabilities");
}

/* The last step: from here on PID 1 has no more rights than what it starts. */
void box_confine(void)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
        launch_fail("opening /dev/null in the box");
    if (null > 2)
        close(null);
    umask(022);
    limit_resources();
    limit_capabilities();
    /* Nobody in the box may trace PID 1 or look into its /proc files: its memory and its executable are the host's. */
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        launch_fail("setting no_new_privs");
    if (seccomp_install() < 0)
        launch_fail("installing the system call filter");
}
