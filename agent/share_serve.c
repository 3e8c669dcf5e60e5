#include "share.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <linux/fs.h>
#include <linux/fuse.h>

enum { HANDLE_MAX = 8192, DESCRIPTORS_KEPT = 32, MESSAGE_LEAST = sizeof(struct fuse_in_header) };

/* A file or directory that the guest has open. */
struct handle {
    int fd; /* -1: free */
    uint32_t salt;
    uint64_t node;
    bool append;
};

struct request {
    const struct fuse_in_header *head;
    const uint8_t *rest;
    size_t left;
};

static struct handle handles[HANDLE_MAX];
static unsigned handle_count, handle_next;
static uint32_t last_salt;
static union {
    uint64_t aligned;
    uint8_t bytes[SHARE_MESSAGE_MAX];
} in;
static struct {
    struct fuse_out_header head;
    uint8_t bytes[SHARE_IO_MAX];
} out;

/* For what may not be open, and without a change of errno. */
static void shut(int fd)
{
    int cause = errno;
    if (fd >= 0)
        close(fd);
    errno = cause;
}

/* What a message consists of; NULL with errno when it lacks something. */

static const void *part(struct request *request, size_t size)
{
    const void *at = request->rest;
    if (request->left < size) {
        errno = EINVAL;
        return NULL;
    }
    request->rest += size;
    request->left -= size;
    return at;
}

static const char *text(struct request *request)
{
    const char *at = (const char *)request->rest;
    const char *end = memchr(at, 0, request->left);
    if (!end) {
        errno = EINVAL;
        return NULL;
    }
    return part(request, (size_t)(end - at) + 1);
}

static const char *name(struct request *request)
{
    const char *at = text(request);
    if (at && (!*at || strchr(at, '/') || !strcmp(at, ".") || !strcmp(at, ".."))) {
        errno = EINVAL;
        return NULL;
    }
    if (at && strlen(at) > 255) {
        errno = ENAMETOOLONG;
        return NULL;
    }
    return at;
}

/* Handles. */

static struct handle *handle_find(uint64_t number)
{
    struct handle *handle = &handles[number % HANDLE_MAX];
    if (handle->fd >= 0 && handle->salt == number >> 32)
        return handle;
    errno = EBADF;
    return NULL;
}

/* Takes the descriptor, in any case. */
static int handle_enter(int fd, const struct node *node, bool append, uint64_t *number)
{
    if (handle_count == HANDLE_MAX) {
        shut(fd);
        errno = ENFILE;
        return -1;
    }
    while (handles[handle_next % HANDLE_MAX].fd >= 0)
        handle_next++;
    unsigned index = handle_next++ % HANDLE_MAX;
    handles[index] = (struct handle){fd, ++last_salt, node->id, append};
    handle_count++;
    *number = (uint64_t)handles[index].salt << 32 | index;
    return 0;
}

static void handle_drop(struct handle *handle)
{
    close(handle->fd);
    handle->fd = -1;
    handle_count--;
}

/* Nodes. */

static struct node *self(const struct request *request) { return node_find(request->head->nodeid); }

/* A file that has lost its name may still be open. */
static int open_or_borrow(struct node *node, struct statx *status)
{
    int fd = node_open(node, O_PATH, status);
    for (int i = 0; fd < 0 && errno == ESTALE && i < HANDLE_MAX; i++)
        if (handles[i].fd >= 0 && handles[i].node == node->id) {
            fd = fcntl(handles[i].fd, F_DUPFD_CLOEXEC, 0);
            return fd >= 0 && file_status(fd, "", status) == 0 ? fd : -1;
        }
    return fd;
}

static int open_directory(struct node *node, struct statx *status)
{
    return node ? node_open(node, O_PATH | O_DIRECTORY, status) : -1;
}

/* What is said of files. */

/* Mounts may show several file systems of the host, which the guest sees as one. */
static uint64_t inode_of(const struct statx *status)
{
    return status->stx_ino ^ (uint64_t)(status->stx_dev_major << 12 ^ status->stx_dev_minor) << 44;
}

static void put_attributes(struct fuse_attr *to, const struct statx *s)
{
    *to = (struct fuse_attr){
        .ino = inode_of(s),
        .size = s->stx_size,
        .blocks = s->stx_blocks,
        .atime = (uint64_t)s->stx_atime.tv_sec,
        .mtime = (uint64_t)s->stx_mtime.tv_sec,
        .ctime = (uint64_t)s->stx_ctime.tv_sec,
        .atimensec = s->stx_atime.tv_nsec,
        .mtimensec = s->stx_mtime.tv_nsec,
        .ctimensec = s->stx_ctime.tv_nsec,
        .mode = s->stx_mode,
        .nlink = s->stx_nlink,
        .uid = s->stx_uid,
        .gid = s->stx_gid,
        .rdev = (s->stx_rdev_minor & 0xff) | s->stx_rdev_major << 8 | (s->stx_rdev_minor & ~0xffu) << 12,
        .blksize = 4096,
    };
}

/* Everything is valid for no time at all: the host, and other boxes, change the same files. */
static int put_status(const struct statx *status)
{
    struct fuse_attr_out *answer = (void *)out.bytes;
    *answer = (struct fuse_attr_out){0};
    put_attributes(&answer->attr, status);
    return sizeof *answer;
}

static int put_entry(struct node *parent, int directory, const char *label)
{
    struct fuse_entry_out *answer = (void *)out.bytes;
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

/* Requests: the size of the answer, or -1 with errno. */

static int do_init(struct request *request)
{
    const struct fuse_init_in *wanted = (const void *)request->rest; /* older kernels send less of it */
    struct fuse_init_out *answer = (void *)out.bytes;
    if (request->left < offsetof(struct fuse_init_in, flags2) || wanted->major != FUSE_KERNEL_VERSION || wanted->minor < 23) {
        errno = EPROTO;
        return -1;
    }
    *answer = (struct fuse_init_out){
        .major = FUSE_KERNEL_VERSION,
        .minor = 31,
        .max_readahead = SHARE_IO_MAX,
        .flags = wanted->flags & (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_AUTO_INVAL_DATA | FUSE_MAX_PAGES),
        .max_background = 16,
        .congestion_threshold = 12,
        .max_write = wanted->flags & FUSE_MAX_PAGES ? SHARE_IO_MAX : 32 * 4096,
        .time_gran = 1,
        .max_pages = SHARE_IO_MAX / 4096,
    };
    return sizeof *answer;
}

static int do_lookup(struct request *request)
{
    struct statx status;
    struct node *parent = self(request);
    const char *label = name(request);
    int directory = label ? open_directory(parent, &status) : -1;
    int size = directory < 0 ? -1 : put_entry(parent, directory, label);
    shut(directory);
    return size;
}

static int do_getattr(struct request *request)
{
    struct statx status;
    const struct fuse_getattr_in *wanted = part(request, sizeof *wanted);
    struct node *node = self(request);
    if (!wanted || !node)
        return -1;
    if (wanted->getattr_flags & FUSE_GETATTR_FH) {
        struct handle *handle = handle_find(wanted->fh);
        return handle && file_status(handle->fd, "", &status) == 0 ? put_status(&status) : -1;
    }
    int fd = open_or_borrow(node, &status);
    shut(fd);
    return fd < 0 ? -1 : put_status(&status);
}

/* No call changes the mode of a file that is only held. By name, then; whoever swaps it meanwhile changes another file of the same mount at worst. */
static int set_mode(struct node *node, mode_t mode)
{
    struct statx status;
    if (node_find(node->id)->parent) {
        int directory = open_directory(node->parent, &status);
        bool found = directory >= 0 && file_status(directory, node->name, &status) == 0 && node_is(node, &status) && !S_ISLNK(status.stx_mode);
        int result = found ? fchmodat(directory, node->name, mode, 0) : -1;
        shut(directory);
        if (found)
            return result;
    }
    for (int i = 0; i < HANDLE_MAX; i++)
        if (handles[i].fd >= 0 && handles[i].node == node->id)
            return fchmod(handles[i].fd, mode);
    errno = ESTALE;
    return -1;
}

static int set_size(struct node *node, const struct fuse_setattr_in *wanted)
{
    struct statx status;
    struct handle *handle = wanted->valid & FATTR_FH ? handle_find(wanted->fh) : NULL;
    if (handle)
        return ftruncate(handle->fd, (off_t)wanted->size);
    int fd = node_open(node, O_WRONLY, &status);
    int result = fd < 0 ? -1 : ftruncate(fd, (off_t)wanted->size);
    shut(fd);
    return result;
}

static struct timespec time_wanted(const struct fuse_setattr_in *wanted, uint32_t set, uint32_t now, uint64_t seconds, uint32_t ns)
{
    if (!(wanted->valid & set))
        return (struct timespec){.tv_nsec = UTIME_OMIT};
    return wanted->valid & now ? (struct timespec){.tv_nsec = UTIME_NOW} : (struct timespec){(time_t)seconds, ns};
}

static int change(struct node *node, int fd, const struct fuse_setattr_in *wanted)
{
    if (wanted->valid & (FATTR_UID | FATTR_GID)) {
        uid_t uid = wanted->valid & FATTR_UID ? wanted->uid : (uid_t)-1;
        gid_t gid = wanted->valid & FATTR_GID ? wanted->gid : (gid_t)-1;
        if (fchownat(fd, "", uid, gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) < 0)
            return -1;
    }
    if ((wanted->valid & FATTR_MODE) && set_mode(node, wanted->mode & 07777) < 0) /* behind the owner, whose change clears bits */
        return -1;
    if ((wanted->valid & FATTR_SIZE) && set_size(node, wanted) < 0)
        return -1;
    if (wanted->valid & (FATTR_ATIME | FATTR_MTIME)) {
        const struct timespec times[2] = {
            time_wanted(wanted, FATTR_ATIME, FATTR_ATIME_NOW, wanted->atime, wanted->atimensec),
            time_wanted(wanted, FATTR_MTIME, FATTR_MTIME_NOW, wanted->mtime, wanted->mtimensec),
        };
        return utimensat(fd, "", times, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW);
    }
    return 0;
}

static int do_setattr(struct request *request)
{
    struct statx status;
    const struct fuse_setattr_in *wanted = part(request, sizeof *wanted);
    struct node *node = self(request);
    int fd = wanted && node ? open_or_borrow(node, &status) : -1;
    bool done = fd >= 0 && change(node, fd, wanted) == 0 && file_status(fd, "", &status) == 0;
    shut(fd);
    return done ? put_status(&status) : -1;
}

static int do_readlink(struct request *request)
{
    struct statx status;
    struct node *node = self(request);
    int fd = node ? node_open(node, O_PATH, &status) : -1;
    ssize_t size = fd < 0 ? -1 : readlinkat(fd, "", (char *)out.bytes, 4096);
    shut(fd);
    return (int)size;
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

static int do_mknod(struct request *request)
{
    struct statx status;
    const struct fuse_mknod_in *wanted = part(request, sizeof *wanted);
    const char *label = wanted ? name(request) : NULL;
    if (!label)
        return -1;
    if (!S_ISREG(wanted->mode) && !S_ISFIFO(wanted->mode) && !S_ISSOCK(wanted->mode)) {
        errno = EPERM;
        return -1;
    }
    struct node *parent = self(request);
    int directory = open_directory(parent, &status);
    int made = directory < 0 ? -1 : mknodat(directory, label, wanted->mode, 0);
    return made_entry(request, parent, directory, &status, label, wanted->mode, made);
}

static int do_mkdir(struct request *request)
{
    struct statx status;
    const struct fuse_mkdir_in *wanted = part(request, sizeof *wanted);
    const char *label = wanted ? name(request) : NULL;
    struct node *parent = self(request);
    int directory = label ? open_directory(parent, &status) : -1;
    int made = directory < 0 ? -1 : mkdirat(directory, label, wanted->mode & 07777);
    return made_entry(request, parent, directory, &status, label, S_IFDIR | (wanted ? wanted->mode & 01777 : 0), made);
}

static int do_symlink(struct request *request)
{
    struct statx status;
    const char *label = name(request);
    const char *target = label ? text(request) : NULL;
    struct node *parent = self(request);
    int directory = target ? open_directory(parent, &status) : -1;
    int made = directory < 0 ? -1 : symlinkat(target, directory, label);
    return made_entry(request, parent, directory, &status, label, S_IFLNK, made);
}

static int remove_entry(struct request *request, int flags)
{
    struct statx status;
    const char *label = name(request);
    int directory = label ? open_directory(self(request), &status) : -1;
    int result = directory < 0 ? -1 : unlinkat(directory, label, flags);
    shut(directory);
    return result;
}

static int do_unlink(struct request *request) { return remove_entry(request, 0); }

static int do_rmdir(struct request *request) { return remove_entry(request, AT_REMOVEDIR); }

static int move_entry(struct request *request, uint64_t target, uint32_t flags)
{
    struct statx status;
    const char *from = name(request), *to = from ? name(request) : NULL;
    struct node *source = self(request), *destination = node_find(target);
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

static int do_rename(struct request *request)
{
    const struct fuse_rename_in *wanted = part(request, sizeof *wanted);
    return wanted ? move_entry(request, wanted->newdir, 0) : -1;
}

static int do_rename2(struct request *request)
{
    const struct fuse_rename2_in *wanted = part(request, sizeof *wanted);
    return wanted ? move_entry(request, wanted->newdir, wanted->flags) : -1;
}

static int do_link(struct request *request)
{
    struct statx status;
    const struct fuse_link_in *wanted = part(request, sizeof *wanted);
    const char *label = wanted ? name(request) : NULL;
    struct node *parent = self(request), *node = label ? node_find(wanted->oldnodeid) : NULL;
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

static int put_open(uint64_t handle, size_t at)
{
    *(struct fuse_open_out *)(void *)(out.bytes + at) = (struct fuse_open_out){.fh = handle};
    return (int)(at + sizeof(struct fuse_open_out));
}

static int keep_open(int fd, const struct node *node, uint32_t flags, size_t at)
{
    uint64_t handle;
    return handle_enter(fd, node, flags & O_APPEND, &handle) < 0 ? -1 : put_open(handle, at);
}

static uint64_t safe_flags(uint32_t flags) { return flags & (uint32_t)(O_ACCMODE | O_SYNC | O_DSYNC); }

static int do_open(struct request *request)
{
    struct statx status;
    const struct fuse_open_in *wanted = part(request, sizeof *wanted);
    struct node *node = self(request);
    int fd = wanted && node ? node_open(node, safe_flags(wanted->flags), &status) : -1;
    if (fd < 0)
        return -1;
    if (!S_ISREG(status.stx_mode)) {
        shut(fd);
        errno = EPERM;
        return -1;
    }
    return keep_open(fd, node, wanted->flags, 0);
}

static int do_opendir(struct request *request)
{
    struct statx status;
    struct node *node = self(request);
    int fd = node ? node_open(node, O_RDONLY | O_DIRECTORY, &status) : -1;
    return fd < 0 ? -1 : keep_open(fd, node, 0, 0);
}

/* Another one may have made the file since the guest looked: then it is opened. */
static int do_create(struct request *request)
{
    struct statx status;
    const struct fuse_create_in *wanted = part(request, sizeof *wanted);
    const char *label = wanted ? name(request) : NULL;
    struct node *parent = self(request);
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
    struct node *node = size < 0 ? NULL : node_find(((struct fuse_entry_out *)(void *)out.bytes)->nodeid);
    if (node && file_status(fd, "", &status) == 0 && node_is(node, &status) && S_ISREG(status.stx_mode)
        && (!(wanted->flags & O_TRUNC) || ftruncate(fd, 0) == 0))
        return keep_open(fd, node, wanted->flags, (size_t)size);
    if (size >= 0)
        errno = ESTALE;
    shut(fd);
    return -1;
}

static int do_read(struct request *request)
{
    const struct fuse_read_in *wanted = part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    size_t size = wanted && wanted->size < sizeof out.bytes ? wanted->size : sizeof out.bytes;
    return handle ? (int)pread(handle->fd, out.bytes, size, (off_t)wanted->offset) : -1;
}

/* What the guest's kernel writes of its own accord, for a mapping, belongs where it says, however the file was opened. */
static int do_write(struct request *request)
{
    const struct fuse_write_in *wanted = part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    const void *bytes = handle ? part(request, wanted->size) : NULL;
    if (!bytes)
        return -1;
    struct iovec piece = {(void *)bytes, wanted->size};
    bool append = handle->append && !(wanted->write_flags & FUSE_WRITE_CACHE);
    long size = syscall(SYS_pwritev2, handle->fd, &piece, 1, wanted->offset, 0, append ? RWF_APPEND : 0);
    if (size < 0)
        return -1;
    *(struct fuse_write_out *)(void *)out.bytes = (struct fuse_write_out){.size = (uint32_t)size};
    return sizeof(struct fuse_write_out);
}

static int do_release(struct request *request)
{
    const struct fuse_release_in *wanted = part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    if (!handle)
        return -1;
    handle_drop(handle);
    return 0;
}

static int do_fsync(struct request *request)
{
    const struct fuse_fsync_in *wanted = part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    if (!handle)
        return -1;
    return wanted->fsync_flags & FUSE_FSYNC_FDATASYNC ? fdatasync(handle->fd) : fsync(handle->fd);
}

struct host_entry {
    uint64_t inode;
    int64_t next;
    uint16_t size;
    uint8_t type;
    char name[];
};

static int do_readdir(struct request *request)
{
    static union {
        uint64_t aligned;
        char bytes[16 * 1024];
    } found;
    struct statx status;
    const struct fuse_read_in *wanted = part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    if (!handle || file_status(handle->fd, "", &status) < 0 || lseek(handle->fd, (off_t)wanted->offset, SEEK_SET) < 0)
        return -1;
    size_t most = wanted->size < sizeof out.bytes ? wanted->size : sizeof out.bytes, used = 0;
    long got = syscall(SYS_getdents64, handle->fd, found.bytes, sizeof found.bytes);
    if (got < 0)
        return -1;
    for (long at = 0; at < got;) {
        const struct host_entry *entry = (void *)(found.bytes + at);
        size_t length = strlen(entry->name), size = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + length);
        if (used + size > most)
            break;
        struct fuse_dirent *to = (void *)(out.bytes + used);
        memset(to, 0, size);
        status.stx_ino = entry->inode;
        *to = (struct fuse_dirent){inode_of(&status), (uint64_t)entry->next, (uint32_t)length, entry->type};
        memcpy(out.bytes + used + FUSE_NAME_OFFSET, entry->name, length);
        used += size;
        at += entry->size;
    }
    return (int)used;
}

static int do_statfs(struct request *request)
{
    struct statx status;
    struct statfs found;
    struct node *node = self(request);
    int fd = node ? open_or_borrow(node, &status) : -1;
    bool done = fd >= 0 && fstatfs(fd, &found) == 0;
    shut(fd);
    if (!done)
        return -1;
    *(struct fuse_statfs_out *)(void *)out.bytes = (struct fuse_statfs_out){.st = {
        .blocks = found.f_blocks, .bfree = found.f_bfree, .bavail = found.f_bavail, .files = found.f_files, .ffree = found.f_ffree,
        .bsize = (uint32_t)found.f_bsize, .namelen = (uint32_t)found.f_namelen, .frsize = (uint32_t)found.f_frsize}};
    return sizeof(struct fuse_statfs_out);
}

static int do_fallocate(struct request *request)
{
    const struct fuse_fallocate_in *wanted = part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    return handle ? (int)syscall(SYS_fallocate, handle->fd, wanted->mode, wanted->offset, wanted->length) : -1;
}

static int do_lseek(struct request *request)
{
    const struct fuse_lseek_in *wanted = part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    off_t place = handle ? lseek(handle->fd, (off_t)wanted->offset, (int)wanted->whence) : -1;
    if (place < 0)
        return -1;
    *(struct fuse_lseek_out *)(void *)out.bytes = (struct fuse_lseek_out){.offset = (uint64_t)place};
    return sizeof(struct fuse_lseek_out);
}

/* What is not here the guest's kernel does by itself, or tells its programs that it cannot be done. */
static int (*const acts[])(struct request *request) = {
    [FUSE_LOOKUP] = do_lookup,   [FUSE_GETATTR] = do_getattr,    [FUSE_SETATTR] = do_setattr,   [FUSE_READLINK] = do_readlink,
    [FUSE_SYMLINK] = do_symlink, [FUSE_MKNOD] = do_mknod,        [FUSE_MKDIR] = do_mkdir,       [FUSE_UNLINK] = do_unlink,
    [FUSE_RMDIR] = do_rmdir,     [FUSE_RENAME] = do_rename,      [FUSE_RENAME2] = do_rename2,   [FUSE_LINK] = do_link,
    [FUSE_OPEN] = do_open,       [FUSE_READ] = do_read,          [FUSE_WRITE] = do_write,       [FUSE_STATFS] = do_statfs,
    [FUSE_RELEASE] = do_release, [FUSE_RELEASEDIR] = do_release, [FUSE_FSYNC] = do_fsync,       [FUSE_FSYNCDIR] = do_fsync,
    [FUSE_INIT] = do_init,       [FUSE_OPENDIR] = do_opendir,    [FUSE_READDIR] = do_readdir,   [FUSE_CREATE] = do_create,
    [FUSE_FALLOCATE] = do_fallocate, [FUSE_LSEEK] = do_lseek,
};

static void forget(struct request *request)
{
    if (request->head->opcode == FUSE_FORGET) {
        const struct fuse_forget_in *one = part(request, sizeof *one);
        if (one)
            node_forget(request->head->nodeid, one->nlookup);
        return;
    }
    const struct fuse_batch_forget_in *batch = part(request, sizeof *batch);
    const struct fuse_forget_one *one;
    for (uint32_t i = 0; batch && i < batch->count && (one = part(request, sizeof *one)); i++)
        node_forget(one->nodeid, one->nlookup);
}

static bool send_all(int channel, size_t size)
{
    for (const uint8_t *at = (const uint8_t *)&out; size > 0;) {
        ssize_t sent = send(channel, at, size, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR)
            return false;
        at += sent < 0 ? 0 : sent;
        size -= sent < 0 ? 0 : (size_t)sent;
    }
    return true;
}

/* Of nothing recv(2) would wait for something. */
static bool receive(int channel, void *to, size_t size) { return size == 0 || recv(channel, to, size, MSG_WAITALL) == (ssize_t)size; }

static bool answer(int channel, struct request *request)
{
    uint32_t opcode = request->head->opcode;
    if (opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET || opcode == FUSE_INTERRUPT) {
        if (opcode != FUSE_INTERRUPT)
            forget(request);
        return true;
    }
    errno = ENOSYS;
    int size = opcode < sizeof acts / sizeof *acts && acts[opcode] ? acts[opcode](request) : -1;
    out.head = (struct fuse_out_header){.error = size < 0 ? -errno : 0, .unique = request->head->unique};
    out.head.len = (uint32_t)(sizeof out.head + (size < 0 ? 0 : (size_t)size));
    return send_all(channel, out.head.len);
}

static void bound_handles(void)
{
    struct rlimit files;
    for (int i = 0; i < HANDLE_MAX; i++)
        handles[i].fd = -1;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
        files.rlim_cur = files.rlim_max < HANDLE_MAX + DESCRIPTORS_KEPT ? files.rlim_max : HANDLE_MAX + DESCRIPTORS_KEPT;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

_Noreturn void share_serve(int channel, int root)
{
    if (nodes_open(root) < 0)
        launch_fail("looking at the mounts");
    bound_handles();
    for (;;) {
        struct fuse_in_header *head = (void *)in.bytes;
        if (!receive(channel, head, sizeof *head) || head->len < sizeof *head || head->len > sizeof in.bytes
            || !receive(channel, in.bytes + sizeof *head, head->len - sizeof *head))
            _exit(0); /* the machine has ended, or whoever rules its kernel sends rubbish */
        struct request request = {head, in.bytes + sizeof *head, head->len - sizeof *head};
        if (!answer(channel, &request))
            _exit(0);
    }
}
