/* The stage: a private tmpfs, seen by nobody else, on which the launcher gathers under short names what the box's root is made from.
 *
 *     l0 l1 ...   the read-only layers, topmost first (id-mapped mounts, or symlinks)
 *     disk        the file system of a box whose disk is limited
 *     upper work  symlinks to the writable layer
 *     b0 b1 ...   the host paths to bind
 *     etc/...     the three files that every box gets from its host
 *     root        the overlay
 *
 * It is made in the outer user namespace. The box's mount namespace is a copy that belongs to the inner one, so the kernel locks
 * every mount of the stage together with its flags (mount_namespaces(7)): the box could not undo a read-only bind even with
 * CAP_SYS_ADMIN in its own namespace. */
#define _GNU_SOURCE
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LOWER_MAX = 500 };

static void make_directory(const char *name)
{
    if (mkdir(name, 0755) < 0)
        launch_fail_about("making a directory of the stage", name);
}

static void make_link(const char *target, const char *name)
{
    if (symlink(target, name) < 0)
        launch_fail_about("making a link of the stage", name);
}

/* Mount the tree on a new directory (or file) of the stage. */
static void place(int tree, const char *name, bool directory)
{
    int target;

    if (directory)
        make_directory(name);
    else if (mknod(name, S_IFREG | 0644, 0) < 0)
        launch_fail_about("making a file of the stage", name);
    target = open(name, O_PATH | O_CLOEXEC);
    if (target < 0 || mount_attach(tree, target) < 0)
        launch_fail_about("mounting on the stage", name);
    close(target);
    close(tree);
}

static bool is_directory(int tree)
{
    struct stat status;

    if (fstat(tree, &status) < 0)
        launch_fail("looking at a mount");
    return S_ISDIR(status.st_mode);
}

/* The ids, in the outer namespace, of the box's root. */
static void give_to_box(const struct config *config, const char *path)
{
    unsigned uid, gid;

    errno = EINVAL;
    if (sscanf(config->uid_map, "0 %u", &uid) != 1 || sscanf(config->gid_map, "0 %u", &gid) != 1
        || chown(path, uid, gid) < 0)
        launch_fail_about("giving to the box's root", path);
}

void stage_open(const struct config *config)
{
    if (unshare(CLONE_NEWNS) < 0)
        launch_fail("making the launcher's mount namespace");
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        launch_fail("making the launcher's mounts private");
    if (mount("tmpfs", config->stage, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m") < 0 || chdir(config->stage) < 0)
        launch_fail("mounting the stage");
    if (config->disk) { /* before the box's control groups, which may forbid block devices */
        make_directory("disk");
        if (disk_mount(config->disk, "disk") < 0)
            launch_fail_about("mounting the disk", config->disk);
    }
}

static void place_lowers(const struct config *config, int userns)
{
    char name[24];

    errno = 0;
    if (config->lower_count > LOWER_MAX)
        launch_fail("more layers than an overlay can have (500)");
    for (size_t i = 0; i < config->lower_count; i++) {
        const struct lower *lower = &config->lowers[i];
        snprintf(name, sizeof name, "l%zu", i);
        if (!lower->shift) {
            make_link(lower->path, name);
            continue;
        }
        int tree = mount_clone(lower->path, false, "opening the layer");
        mount_set(tree, false, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV, userns,
                  "id-mapping a layer (the file system of the image store must support id-mapped mounts)");
        place(tree, name, true);
    }
}

/* Without symlinks followed, redirects or metadata-only copies: a hostile layer cannot point into another, and the upper layer can
 * be used as a lower one later. */
static void mount_overlay(const struct config *config)
{
    size_t size = config->lower_count * 8 + 160;
    char *options = malloc(size);
    char *end = options;

    if (!options)
        launch_fail("memory for the overlay's options");
    end += sprintf(end, "lowerdir=");
    for (size_t i = 0; i < config->lower_count; i++)
        end += sprintf(end, "%sl%zu", i ? ":" : "", i);
    end += sprintf(end, ",upperdir=upper,workdir=work,redirect_dir=nofollow,metacopy=off,index=off,xino=off%s",
                   config->rootless ? ",userxattr" : "");
    make_directory("root");
    if (mount("overlay", "root", "overlay", MS_NODEV, options) < 0)
        launch_fail("mounting the overlay");
    free(options);
}

int stage_tree(const struct bind *bind, int userns)
{
    uint64_t flags = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (bind->read_only ? MOUNT_ATTR_RDONLY : 0);
    int tree = mount_clone(bind->source, true, "opening the mount's source");

    mount_set(tree, true, flags, userns, "id-mapping a mount (its file system must support id-mapped mounts)");
    return tree;
}

void stage_place(int tree, const char *prefix, size_t number)
{
    char name[24];

    snprintf(name, sizeof name, "%s%zu", prefix, number);
    place(tree, name, is_directory(tree));
}

/* The box may edit these files; the size of the stage bounds them. */
static void write_file(const struct config *config, const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    size_t length = strlen(text);

    if (fd < 0 || write(fd, text, length) != (ssize_t)length)
        launch_fail_about("writing a file of the stage", path);
    close(fd);
    give_to_box(config, path);
}

/* `userns` is the box's user namespace where mounts must be shifted into it, -1 where ids on disk are its own already. */
void stage_fill(const struct config *config, int userns)
{
    place_lowers(config, userns);
    make_link(config->upper, "upper");
    make_link(config->work, "work");
    mount_overlay(config);
    for (size_t i = 0; i < config->bind_count; i++)
        stage_place(stage_tree(&config->binds[i], userns), "b", i);
    make_directory("etc");
    write_file(config, "etc/hostname", config->hostname);
    write_file(config, "etc/hosts", config->hosts);
    write_file(config, "etc/resolv.conf", config->resolv);
}
