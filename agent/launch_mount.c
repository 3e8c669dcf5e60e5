/* Thin wrappers over the descriptor-based mount calls (Linux 5.12): a mount is made detached and attached to an open target,
 * so no path is looked up twice and no symlink in the box can redirect one. */
#define _GNU_SOURCE
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif

int mount_clone(const char *path, bool recursive, const char *step)
{
    unsigned flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (recursive ? AT_RECURSIVE : 0u);
    int tree = (int)syscall(SYS_open_tree, AT_FDCWD, path, flags);

    if (tree < 0 && step)
        launch_fail_about(step, path);
    return tree;
}

void mount_set(int tree, bool recursive, uint64_t set, int userns, const char *step)
{
    struct mount_attr attributes = {.attr_set = set};

    if (userns >= 0) {
        attributes.attr_set |= MOUNT_ATTR_IDMAP;
        attributes.userns_fd = (uint64_t)userns;
    }
    if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0), &attributes, sizeof attributes) < 0)
        launch_fail(step);
}

int mount_attach(int tree, int target)
{
    return (int)syscall(SYS_move_mount, tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

/* Make a detached mount. `options` are pairs of name and value (NULL for a flag), ended by NULL. Returns -1 with errno. */
int mount_new(const char *type, const char *const options[], uint64_t attributes)
{
    int context = (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
    int tree = -1;
    int saved;

    if (context < 0)
        return -1;
    for (; *options; options += 2) {
        unsigned command = options[1] ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG;
        if (syscall(SYS_fsconfig, context, command, options[0], options[1], 0) < 0)
            goto out;
    }
    if (syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
        tree = (int)syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC, attributes);
out:
    saved = errno;
    close(context);
    errno = saved;
    return tree;
}

/* Open `path` as the box would see it: absolute symlinks and `..` stay below `root`. Magic links are refused. */
int open_in_root(int root, const char *path, uint64_t flags, unsigned mode)
{
    struct open_how how = {
        .flags = flags | O_CLOEXEC,
        .mode = mode,
        .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
    };
    int fd;

    do
        fd = (int)syscall(SYS_openat2, root, path, &how, sizeof how);
    while (fd < 0 && (errno == EINTR || errno == EAGAIN));
    return fd;
}
