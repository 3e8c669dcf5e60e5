/* The first program of a VM: what is due before the agent runs, and after it.
 *
 * It loads the modules, finds the port, says that it is ready, and waits: here a template is saved, so nothing before may depend on a
 * box. Then the host resumes it with what makes the box: entropy, time, names; only now the driver takes the disks. */
#define _GNU_SOURCE
#include "agent.h"
#include "cut.h"
#include "hold.h"
#include "launch.h"
#include "mainlog.h"
#include "nic.h"
#include "port.h"
#include "share.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#define ROOT_DEVICE "/dev/vda"
#define MOUNTS "/mounts"

enum { PORT_WAIT_MS = 20000, ENTROPY_MAX = 64, PIDS_LEAST = 32, DISK = 2 };

static const char DRIVERS[] = "/sys/bus/virtio";
static unsigned long kernel_threads;
static struct bind *mounts;
static size_t mount_count;
static bool settled; /* in the root of the box */

static void report(const char *text, size_t length)
{
    if (port_used())
        port_tell(LINE_FAILED, 0, text, length);
    dprintf(2, "box-agent: %.*s\n", (int)length, text);
    for (;;)
        pause(); /* the host ends us; the end of PID 1 would only add a panic to what it shows */
}

static void mount_or_fail(const char *type, const char *target, unsigned long flags, const char *options)
{
    if (mkdir(target, 0755) < 0 && errno != EEXIST)
        launch_fail_about("making", target);
    if (mount(type, target, type, flags, options) < 0)
        launch_fail_about("mounting", target);
}

static void write_text(const char *path, const char *text, bool required)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if ((fd < 0 || write(fd, text, strlen(text)) < 0) && required)
        launch_fail_about("writing", path);
    if (fd >= 0)
        close(fd);
}

static void mount_system(void)
{
    static const char *const links[][2] = {{"/proc/self/fd", "/dev/fd"},         {"/proc/self/fd/0", "/dev/stdin"},
                                           {"/proc/self/fd/1", "/dev/stdout"},   {"/proc/self/fd/2", "/dev/stderr"}};
    mount_or_fail("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
    mount_or_fail("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_or_fail("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_or_fail("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666");
    mount_or_fail("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_or_fail("mqueue", "/dev/mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL); /* a kernel of the user's own may lack it */
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        symlink(links[i][0], links[i][1]);
}

static void load_module(const char *name)
{
    char path[160];
    snprintf(path, sizeof path, "/modules/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST && errno != ENODEV)) /* for another processor */
        launch_fail_about("loading the module", name);
    close(fd);
    unlink(path); /* a template keeps every page */
}

/* `list` holds names in the order of loading. */
static void load_modules(const char *list)
{
    char line[128];
    FILE *names = fopen(list, "re");
    while (names && fgets(line, sizeof line, names)) {
        line[strcspn(line, "\n")] = 0;
        if (*line)
            load_module(line);
    }
    if (names)
        fclose(names);
}

/* `number`: 1 is the line, 2 carries the files of mounts. */
static int find_port(unsigned number)
{
    char path[300] = "";
    unsigned found;
    for (int waited = 0; waited < PORT_WAIT_MS; waited += 5) {
        DIR *devices = opendir("/dev");
        for (struct dirent *entry; devices && (entry = readdir(devices));)
            if (sscanf(entry->d_name, "vport%*up%u", &found) == 1 && found == number)
                snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        if (devices)
            closedir(devices);
        int fd = *path ? open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC) : -1;
        if (fd >= 0)
            return fd;
        usleep(5000);
    }
    return -1;
}

/* The drivers take no devices by themselves: a template must not have touched a disk. */
void guest_bind(unsigned kind, const char *driver, bool required)
{
    char path[320], value[16];
    snprintf(path, sizeof path, "%s/devices", DRIVERS);
    struct dirent **names = NULL;
    int count = scandir(path, &names, NULL, versionsort);
    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/devices/%s/device", DRIVERS, names[i]->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t size = fd < 0 ? -1 : read(fd, value, sizeof value - 1);
        if (fd >= 0)
            close(fd);
        if (size > 0 && strtoul(value, NULL, 16) == kind) {
            snprintf(path, sizeof path, "%s/drivers/%s/bind", DRIVERS, driver);
            write_text(path, names[i]->d_name, required);
        }
        free(names[i]);
    }
    free(names);
}

static unsigned hex(const char *digits)
{
    char pair[3] = {digits[0], digits[1], 0};
    return (unsigned)strtoul(pair, NULL, 16);
}

/* Every box restored from one template would draw the same numbers. */
static void seed(const char *digits)
{
    struct {
        struct rand_pool_info info;
        uint8_t bytes[ENTROPY_MAX];
    } pool = {.info = {0}};
    int size = 0;
    for (; digits[2 * size] && digits[2 * size + 1] && size < ENTROPY_MAX; size++)
        pool.bytes[size] = (uint8_t)hex(digits + 2 * size);
    pool.info.buf_size = size;
    pool.info.entropy_count = 8 * size;
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0)
        launch_fail("seeding the random number generator");
    close(fd);
    explicit_bzero(&pool, sizeof pool);
}

static void set_clock(const char *nanoseconds)
{
    unsigned long long now = strtoull(nanoseconds, NULL, 10);
    struct timespec time = {(time_t)(now / 1000000000u), (long)(now % 1000000000u)};
    if (clock_settime(CLOCK_REALTIME, &time) < 0)
        launch_fail("setting the clock");
}

/* The kernel's own threads count too. They are counted before a template is saved, for looking takes time. */
static void count_threads(void)
{
    DIR *directory = opendir("/proc");
    for (struct dirent *file; directory && (file = readdir(directory));)
        kernel_threads += file->d_name[0] >= '1' && file->d_name[0] <= '9';
    if (directory)
        closedir(directory);
}

static void limit_processes(const char *limit)
{
    char text[32];
    unsigned long count = strtoul(limit, NULL, 10) + kernel_threads + (mount_count > 0); /* what carries the mounts is a thread */
    snprintf(text, sizeof text, "%lu", count < PIDS_LEAST ? PIDS_LEAST : count);
    write_text("/proc/sys/kernel/threads-max", text, false);
}

static void add_mount(const char *target, bool read_only)
{
    mounts = config_grow(mounts, mount_count, sizeof *mounts);
    mounts[mount_count++] = (struct bind){NULL, target, read_only};
}

/* The host serves one file system, with a name for each mount; whether one is read-only it decides for itself. */
static void mount_shares(void)
{
    if (!mount_count)
        return;
    int port = find_port(2);
    if (port < 0)
        launch_fail("finding the port for mounts");
    mkdir(MOUNTS, 0755);
    share_mount(MOUNTS, port);
}

static void bind_shares(int root)
{
    char from[32];
    for (size_t i = 0; i < mount_count; i++) {
        snprintf(from, sizeof from, MOUNTS "/%zu", i);
        if (mounts[i].read_only
            && (mount(from, from, NULL, MS_BIND, NULL) < 0
                || mount(NULL, from, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) < 0))
            launch_fail_about("making a mount read-only at", mounts[i].target);
        bind_into(root, from, mounts[i].target, true);
    }
}

/* The image may lie about its layout, but it harms only itself: nothing of the host is in here. */
static void mount_root(void)
{
    mkdir("/root", 0755);
    if (mount(ROOT_DEVICE, "/root", "ext4", MS_NOATIME, "discard,noinit_itable,errors=remount-ro") < 0)
        launch_fail("mounting the disk (it may be damaged; restore a snapshot)");
    int root = open("/root", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (const char *const *name = (const char *const[]){"dev", "proc", "sys", NULL}; *name; name++) {
        char from[8], to[64];
        int target = base_directory(root, *name);
        snprintf(from, sizeof from, "/%s", *name);
        snprintf(to, sizeof to, "/proc/self/fd/%d", target);
        int tree = (int)syscall(SYS_open_tree, AT_FDCWD, from, O_CLOEXEC);
        if (tree < 0 || mount_attach(tree, target) < 0)
            launch_fail_about("moving into the root", from);
        close(tree);
        close(target);
    }
    for (const char *const *name = (const char *const[]){"hostname", "hosts", "resolv.conf", "machine-id", NULL}; *name; name++) {
        char from[32], to[32];
        snprintf(from, sizeof from, "/etc/%s", *name);
        snprintf(to, sizeof to, "/etc/%s", *name);
        bind_into(root, from, to, false);
    }
    bind_shares(root);
    if (fchdir(root) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        launch_fail("changing the root");
    close(root);
}

static void take_record(const char *key, const char *value)
{
    if (!strcmp(key, "entropy")) {
        seed(value);
    } else if (!strcmp(key, "time")) {
        set_clock(value);
    } else if (!strcmp(key, "hostname")) {
        if (sethostname(value, strlen(value)) < 0)
            launch_fail("setting the host name");
    } else if (!strcmp(key, "pids")) {
        limit_processes(value);
    } else if (!strcmp(key, "mount_rw") || !strcmp(key, "mount_ro")) {
        if (!settled) /* a fork has them */
            add_mount(value, !strcmp(key, "mount_ro"));
    } else if (!strncmp(key, "etc/", 4)) {
        char path[64];
        snprintf(path, sizeof path, "/etc/%.40s", key + 4);
        write_text(path, value, !settled); /* later the box may have done to it what it likes */
    } else {
        errno = 0;
        launch_fail_about("unknown configuration key", key);
    }
}

void guest_become(char *records, size_t length)
{
    const char *key, *value;
    char *end = records + length;
    void (*before)(const char *text, size_t length) = launch_failed;
    launch_failed = report;
    errno = 0;
    if (length == 0 || end[-1] != 0)
        launch_fail("receiving the configuration");
    while (config_next(&records, end, &key, &value))
        take_record(key, value);
    if (settled && !share_go_on(true))
        launch_fail("taking the mounts along");
    launch_failed = before;
}

static void resume(void)
{
    struct line_frame frame;
    do
        port_read(&frame);
    while (frame.type != LINE_RESUME);
    mkdir("/etc", 0755);
    guest_become((char *)frame.payload, frame.length);
    guest_bind(DISK, "virtio_blk", true);
    mount_shares(); /* while the devices are still here */
    mount_root();
    settled = true;
}

/* What was written must be on the disk before the host ends the machine, which it does at once. */
static _Noreturn void power_down(void)
{
    sync();
    mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
    port_tell(LINE_OFF, 0, NULL, 0);
    for (;;)
        pause();
}

int cmd_init(int argc, char **argv)
{
    const struct rlimit files = {1048576, 1048576};
    const struct agent_options options = {-1, -1, {-1, -1}, -1};
    char path[64];

    (void)argc;
    (void)argv;
    launch_failed = report;
    umask(022);
    mount_system();
    hold_prepare();
    cut_prepare();
    load_modules("/modules/first");
    int fd = find_port(1);
    if (fd < 0)
        launch_fail("finding the port to the host");
    port_open(fd);
    snprintf(path, sizeof path, "%s/drivers_autoprobe", DRIVERS);
    write_text(path, "0", true);
    load_modules("/modules/second");
    unlink("/init");
    setrlimit(RLIMIT_NOFILE, &files);
    loopback_up();
    count_threads();
    port_tell(LINE_READY, 0, NULL, 0);
    resume();
    mainlog_forward(port_log, port_exit);
    port_tell(LINE_UP, 0, NULL, 0);
    launch_failed = NULL;
    agent_run(&options);
    power_down();
}
