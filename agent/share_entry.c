#include "share_serve.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/fs.h>

int open_directory(struct node *node, struct statx *status)
{
    return node ? node_open(node, O_PATH | O_DIRECTORY, status) : -1;
}

static int put_entry(struct node *parent, int directory, const char *label)
{
    struct fuse_entry_out *answer = (void *)share_answer.bytes;
    struct statx status;
    if (file_status(directory, label, &status) < 0)
        return -1;
    struct node *node = node_enter(parent, label, &status);
    if (!node)
        return -1;
    *answer = (struct fuse_entry_out){.nodeid = node->id};
    put_attributes(&answer->attr, &status);
    return sizeof *answer;
}

int share_lookup(struct request *request)
{
    struct statx status;
    struct node *parent = request_node(request);
    const char *label = request_name(request);
    int directory = label ? open_directory(parent, &status) : -1;
    int size = directory < 0 ? -1 : put_entry(parent, directory, label);
    shut(directory);
    return size;
}

/* A new file is the server's: give it to its maker, unless the directory says whose group it is. */
static int give(const struct request *request, int directory, const struct statx *parent, const char *label, mode_t mode)
{
    gid_t gid = parent->stx_mode & S_ISGID ? (gid_t)-1 : request->head->gid;
    if (fchownat(directory, label, request->head->uid, gid, AT_SYMLINK_NOFOLLOW) == 0) {
        if (!(mode & (S_ISUID | S_ISGID)) || S_ISDIR(mode) || fchmodat(directory, label, mode & 07777, 0) == 0)
            return 0;
    }
    int cause = errno == EINVAL ? EOVERFLOW : errno; /* an id that the host has none for */
    unlinkat(directory, label, S_ISDIR(mode) ? AT_REMOVEDIR : 0);
    errno = cause;
    return -1;
}

/* The tail of all that makes an entry; `made`: how that went. */
static int made_entry(const struct request *request, struct node *parent, int directory, const struct statx *status, const char *label,
                      mode_t mode, int made)
{
    int size = made < 0 || give(request, directory, status, label, mode) < 0 ? -1 : put_entry(parent, directory, label);
    shut(directory);
    return size;
}

int share_mknod(struct request *request)
{
    struct statx status;
    const struct fuse_mknod_in *wanted = request_part(request, sizeof *wanted);
    const char *label = wanted ? request_name(request) : NULL;
    if (!label)
        return -1;
    if (!S_ISREG(wanted->mode) && !S_ISFIFO(wanted->mode) && !S_ISSOCK(wanted->mode)) {
        errno = EPERM;
        return -1;
    }
    struct node *parent = request_node(request);
    int directory = open_directory(parent, &status);
    int made = directory < 0 ? -1 : mknodat(directory, label, wanted->mode, 0);
    return made_entry(request, parent, directory, &status, label, wanted->mode, made);
}

int share_mkdir(struct request *request)
{
    struct statx status;
    const struct fuse_mkdir_in *wanted = request_part(request, sizeof *wanted);
    const char *label = wanted ? request_name(request) : NULL;
    struct node *parent = request_node(request);
    int directory = label ? open_directory(parent, &status) : -1;
    int made = directory < 0 ? -1 : mkdirat(directory, label, wanted->mode & 07777);
    return made_entry(request, parent, directory, &status, label, S_IFDIR | (wanted ? wanted->mode & 01777 : 0), made);
}

int share_symlink(struct request *request)
{
    struct statx status;
    const char *label = request_name(request);
    const char *target = label ? request_text(request) : NULL;
    struct node *parent = request_node(request);
    int directory = target ? open_directory(parent, &status) : -1;
    int made = directory < 0 ? -1 : symlinkat(target, directory, label);
    return made_entry(request, parent, directory, &status, label, S_IFLNK, made);
}

static int remove_entry(struct request *request, int flags)
{
    struct statx status;
    const char *label = request_name(request);
    int directory = label ? open_directory(request_node(request), &status) : -1;
    int result = directory < 0 ? -1 : unlinkat(directory, label, flags);
    shut(directory);
    return result;
}

int share_unlink(struct request *request) { return remove_entry(request, 0); }

int share_rmdir(struct request *request) { return remove_entry(request, AT_REMOVEDIR); }

static int move_entry(struct request *request, uint64_t target, uint32_t flags)
{
    struct statx status;
    const char *from = request_name(request), *to = from ? request_name(request) : NULL;
    struct node *source = request_node(request), *destination = node_find(target);
    if (flags & ~(uint32_t)(RENAME_NOREPLACE | RENAME_EXCHANGE)) {
        errno = EINVAL;
        return -1;
    }
    int old = to ? open_directory(source, &status) : -1;
    int new = old < 0 ? -1 : open_directory(destination, &status);
    int result = new < 0 ? -1 : (int)syscall(SYS_renameat2, old, from, new, to, flags);
    if (result == 0 && file_status(new, to, &status) == 0)
        node_moved(destination, to, &status);
    if (result == 0 && (flags & RENAME_EXCHANGE) && file_status(old, from, &status) == 0)
        node_moved(source, from, &status);
    shut(old);
    shut(new);
    return result;
}

int share_rename(struct request *request)
{
    const struct fuse_rename_in *wanted = request_part(request, sizeof *wanted);
    return wanted ? move_entry(request, wanted->newdir, 0) : -1;
}

int share_rename2(struct request *request)
{
    const struct fuse_rename2_in *wanted = request_part(request, sizeof *wanted);
    return wanted ? move_entry(request, wanted->newdir, wanted->flags) : -1;
}

int share_link(struct request *request)
{
    struct statx status;
    const struct fuse_link_in *wanted = request_part(request, sizeof *wanted);
    const char *label = wanted ? request_name(request) : NULL;
    struct node *parent = request_node(request), *node = label ? node_find(wanted->oldnodeid) : NULL;
    if (!parent || !node || !node->parent) {
        errno = !parent || !node ? errno : EPERM;
        return -1;
    }
    int old = open_directory(node->parent, &status), new = old < 0 ? -1 : open_directory(parent, &status);
    int size = -1;
    bool found = new >= 0 && file_status(old, node->name, &status) == 0 && node_is(node, &status);
    if (!found && new >= 0)
        errno = ESTALE;
    if (found && linkat(old, node->name, new, label, 0) == 0)
        size = put_entry(parent, new, label);
    shut(old);
    shut(new);
    return size;
}

/* Another one may have made the file since the guest looked: then it is opened. */
int share_create(struct request *request)
{
    struct statx status;
    const struct fuse_create_in *wanted = request_part(request, sizeof *wanted);
    const char *label = wanted ? request_name(request) : NULL;
    struct node *parent = request_node(request);
    int directory = label ? open_directory(parent, &status) : -1;
    if (directory < 0)
        return -1;
    int flags = (int)safe_flags(wanted->flags) | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
    int fd = openat(directory, label, flags | O_CREAT | O_EXCL, wanted->mode & 07777), size;
    if (fd < 0 && errno == EEXIST && !(wanted->flags & O_EXCL)) {
        fd = openat(directory, label, flags);
        size = fd < 0 ? -1 : put_entry(parent, directory, label);
        shut(directory);
    } else {
        size = made_entry(request, parent, directory, &status, label, S_IFREG | (wanted->mode & 07777), fd);
    }
    struct node *node = size < 0 ? NULL : node_find(((struct fuse_entry_out *)(void *)share_answer.bytes)->nodeid);
    if (node && file_status(fd, "", &status) == 0 && node_is(node, &status) && S_ISREG(status.stx_mode)
        && (!(wanted->flags & O_TRUNC) || ftruncate(fd, 0) == 0))
        return keep_open(fd, node, wanted->flags, (size_t)size);
    if (size >= 0)
        errno = ESTALE;
    shut(fd);
    return -1;
}
