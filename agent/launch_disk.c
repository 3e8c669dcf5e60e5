/* The disk of a box with a limit: an ext4 file system in a file of the host, mounted by way of a loop device (loop(4)).
 *
 * Two devices on one file would be two writers that do not know of each other. So a device that has the file already is used
 * again: that of the running box, or of one that has just ended and whose mount is still being taken away. The caller sees to it that
 * nobody else attaches the same file meanwhile. The device is released with its last mount. */
#define _GNU_SOURCE
#include "agent.h"
#include "launch.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef LOOP_CONFIGURE /* Linux 5.8 */
#define LOOP_CONFIGURE 0x4C0A
struct loop_config {
    __u32 fd;
    __u32 block_size;
    struct loop_info64 info;
    __u64 reserved[8];
};
#endif

enum { ATTACH_ATTEMPTS = 2000 };

static void close_keeping_errno(int fd)
{
    int saved = errno;

    if (fd >= 0)
        close(fd);
    errno = saved;
}

static int open_device(const char *name, int flags)
{
    char path[288];

    snprintf(path, sizeof path, "/dev/%s", name);
    return open(path, flags | O_CLOEXEC);
}

/* Return a device that has the file, or -1. The descriptor keeps it from being released. */
static int find_attached(const struct stat *file)
{
    struct loop_info64 info;
    struct dirent *entry;
    int found = -1;
    DIR *devices = opendir("/sys/block");

    while (devices && found < 0 && (entry = readdir(devices))) {
        if (strncmp(entry->d_name, "loop", 4) != 0)
            continue;
        found = open_device(entry->d_name, O_RDONLY);
        if (found >= 0 && (ioctl(found, LOOP_GET_STATUS64, &info) < 0 || info.lo_device != file->st_dev || info.lo_inode != file->st_ino)) {
            close(found);
            found = -1;
        }
    }
    if (devices)
        closedir(devices);
    return found;
}

/* Others take free devices at the same time: what was free is tried, and the next one when it is not any more. */
static int attach(int file)
{
    struct loop_config config = {.fd = (__u32)file, .block_size = 4096, .info.lo_flags = LO_FLAGS_AUTOCLEAR};
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    int device = -1;

    if (control < 0)
        return -1;
    for (int attempt = 0; attempt < ATTACH_ATTEMPTS; attempt++) {
        char name[24];
        int number = ioctl(control, LOOP_CTL_GET_FREE);

        if (number < 0)
            break;
        snprintf(name, sizeof name, "loop%d", number);
        device = open_device(name, O_RDWR);
        if (device >= 0 && ioctl(device, LOOP_CONFIGURE, &config) == 0)
            break;
        close_keeping_errno(device);
        device = -1;
        if (errno != EBUSY && errno != ENXIO && errno != EAGAIN)
            break;
        usleep(1000);
    }
    close_keeping_errno(control);
    return device;
}

int disk_mount(const char *image, const char *point)
{
    char source[32];
    struct stat status;
    int result = -1, device = -1;
    int file = open(image, O_RDWR | O_NOFOLLOW | O_CLOEXEC);

    if (file >= 0 && fstat(file, &status) == 0) {
        device = find_attached(&status);
        if (device < 0)
            device = attach(file);
    }
    if (device >= 0) {
        snprintf(source, sizeof source, "/proc/self/fd/%d", device);
        /* The file is sparse and reads as zeros where nothing was written, so nobody need clear the inode tables; what the box
         * deletes becomes a hole again. */
        result = mount(source, point, "ext4", MS_NODEV, "discard,noinit_itable,errors=remount-ro");
    }
    close_keeping_errno(device);
    close_keeping_errno(file);
    return result;
}

/* box-agent disk IMAGE POINT -- COMMAND ...: run a command that sees the disk of a box at POINT, a directory, read-only. Nobody else
 * sees the mount, and it goes away with the command, which ends with the process that wanted it. */
int cmd_disk(int argc, char **argv)
{
    const unsigned long read_only = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NODEV | MS_NOSUID | MS_NOEXEC;

    if (argc < 5 || strcmp(argv[3], "--") != 0) {
        fprintf(stderr, "usage: box-agent disk IMAGE POINT -- COMMAND [ARGUMENT ...]\n");
        return 2;
    }
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0
        || disk_mount(argv[1], argv[2]) < 0 || mount(NULL, argv[2], NULL, read_only, NULL) < 0) {
        fprintf(stderr, "cannot mount the disk %s: %s\n", argv[1], strerror(errno));
        return 125;
    }
    execvp(argv[4], argv + 4);
    fprintf(stderr, "cannot run %s: %s\n", argv[4], strerror(errno));
    return errno == ENOENT ? 127 : 126;
}
