/* Finding the place of a member below the root, making its parents, clearing what is in the way. */
#include "tar_extract.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

/* From linux/openat2.h, which musl's headers do not have. */
struct open_how {
    uint64_t flags, mode, resolve;
};
enum {
    RESOLVE_NO_XDEV = 0x01,
    RESOLVE_NO_MAGICLINKS = 0x02,
    RESOLVE_NO_SYMLINKS = 0x04,
    RESOLVE_BENEATH = 0x08,
    RESOLVE_IN_ROOT = 0x10,
};

enum { REMOVE_DEPTH = 512, RACES = 64 };

static int open_below(int directory, const char *path, int flags, uint64_t resolve) {
    struct open_how how = {.flags = (uint64_t)flags | O_CLOEXEC, .resolve = resolve | RESOLVE_NO_MAGICLINKS};
    long fd = -1;
    /* EAGAIN: a rename somewhere in the system met a ".." of a symlink. */
    for (int i = 0; i < RACES && (i == 0 || (fd < 0 && (errno == EAGAIN || errno == EINTR))); i++)
        fd = syscall(SYS_openat2, directory, path, &how, sizeof how);
    return (int)fd;
}

int tar_resolve(const struct tar_extract *x, const char *path, int flags) {
    return open_below(x->root, *path ? path : ".", flags,
                      x->options->put ? RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS : RESOLVE_IN_ROOT);
}

bool tar_is_whiteout(const struct tar_extract *x, const struct stat *info) {
    return x->options->layer && S_ISCHR(info->st_mode) && info->st_rdev == makedev(0, 0);
}

int tar_set_opaque(struct tar_extract *x, int fd) {
    const char *name = x->options->userxattr ? "user.overlay.opaque" : "trusted.overlay.opaque";
    if (fsetxattr(fd, name, "y", 1, 0) < 0)
        return tar_fail(x->error, "cannot set %s: %s", name, strerror(errno));
    return 0;
}

void tar_keep_parent(struct tar_extract *x, const char *path, int fd) {
    if (x->parent >= 0)
        close(x->parent);
    x->parent = fd;
    x->stale = false;
    memcpy(x->parent_path, path, strlen(path) + 1);
}

static int remove_tree(int parent, const char *name, int depth) {
    if (depth == REMOVE_DEPTH) {
        errno = ELOOP;
        return -1;
    }
    int fd = open_below(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW,
                        RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV);
    if (fd < 0)
        return -1;
    DIR *directory = fdopendir(fd);
    if (!directory) {
        close(fd);
        return -1;
    }
    int result = 0;
    for (struct dirent *entry; result == 0 && (entry = readdir(directory));) {
        const char *child = entry->d_name;
        if (strcmp(child, ".") == 0 || strcmp(child, "..") == 0)
            continue;
        result = unlinkat(fd, child, 0);
        if (result < 0 && errno == EISDIR)
            result = remove_tree(fd, child, depth + 1);
    }
    int error = errno;
    closedir(directory);
    errno = error;
    return result < 0 ? -1 : unlinkat(parent, name, AT_REMOVEDIR);
}

int tar_clear(struct tar_extract *x, int parent, const char *name) {
    x->stale = true; /* the way to the kept directory may have led through it */
    if (unlinkat(parent, name, 0) == 0 || (errno == EISDIR && remove_tree(parent, name, 0) == 0))
        return 0;
    return tar_fail_errno(x->error, "cannot replace what is there");
}

/* Make one directory that members lie in but the archive does not name. */
static int make_parent(struct tar_extract *x, int above, const char *name) {
    struct stat there;
    if (x->result->entries + x->made >= x->options->max_entries)
        return tar_fail(x->error, "archive has more than %llu entries", (unsigned long long)x->options->max_entries);
    x->made++;
    if (mkdirat(above, name, 0755) == 0)
        return 0;
    if (errno != EEXIST || fstatat(above, name, &there, AT_SYMLINK_NOFOLLOW) < 0)
        return tar_fail_errno(x->error, "cannot create the parent directory");
    if (S_ISLNK(there.st_mode))
        return tar_fail(x->error, "a parent is a symlink that leads nowhere");
    if (!tar_is_whiteout(x, &there))
        return tar_fail(x->error, "a parent is not a directory");
    if (tar_clear(x, above, name) < 0)
        return -1;
    if (mkdirat(above, name, 0755) < 0)
        return tar_fail_errno(x->error, "cannot create the parent directory");
    int fd = openat(above, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int result = fd < 0 ? tar_fail_errno(x->error, "cannot open the parent directory") : tar_set_opaque(x, fd);
    if (fd >= 0)
        close(fd);
    return result;
}

static int make_parents(struct tar_extract *x, char *path) {
    int above = tar_resolve(x, "", O_PATH | O_DIRECTORY);
    for (char *name = path; above >= 0;) {
        char *slash = strchr(name, '/');
        if (slash)
            *slash = 0;
        int fd = tar_resolve(x, path, O_PATH | O_DIRECTORY);
        if (fd < 0 && (errno == ENOENT || errno == ENOTDIR)) {
            if (make_parent(x, above, name) < 0) {
                close(above);
                return -1;
            }
            fd = tar_resolve(x, path, O_PATH | O_DIRECTORY);
        }
        close(above);
        above = fd;
        if (!slash)
            break;
        *slash = '/';
        name = slash + 1;
    }
    return above < 0 ? tar_fail_errno(x->error, "cannot open the parent directory") : above;
}

int tar_parent(struct tar_extract *x, const char *name) {
    char path[TAR_PATH_MAX + 1];
    const char *slash = strrchr(name, '/');
    size_t length = slash ? (size_t)(slash - name) : 0;
    if (x->parent >= 0 && !x->stale && strlen(x->parent_path) == length && memcmp(x->parent_path, name, length) == 0)
        return x->parent;
    memcpy(path, name, length);
    path[length] = 0;
    int fd = tar_resolve(x, path, O_PATH | O_DIRECTORY);
    if (fd < 0 && !x->options->put && (errno == ENOENT || errno == ENOTDIR))
        fd = make_parents(x, path);
    else if (fd < 0)
        tar_error_set(x->error, "cannot open the parent directory: %s",
                      errno == ELOOP ? "there is a symlink in its path" : strerror(errno));
    if (fd >= 0)
        tar_keep_parent(x, path, fd);
    return fd;
}
