#include "share_serve.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <linux/fs.h>

static int open_or_borrow(struct node *node, uint64_t flags, struct statx *status)
{
    int fd = node_open(node, flags, status);
    if (fd >= 0 || errno != ESTALE)
        return fd;
    fd = handle_borrow(node, flags);
    if (fd >= 0 && file_status(fd, "", status) == 0)
        return fd;
    shut(fd);
    return -1;
}

/* Mounts may show several file systems of the host, which the guest sees as one. */
static uint64_t inode_of(const struct statx *status)
{
    return status->stx_ino ^ (uint64_t)(status->stx_dev_major << 12 ^ status->stx_dev_minor) << 44;
}

void put_attributes(struct fuse_attr *to, const struct statx *s)
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
    struct fuse_attr_out *answer = (void *)share_answer.bytes;
    *answer = (struct fuse_attr_out){0};
    put_attributes(&answer->attr, status);
    return sizeof *answer;
}

int share_getattr(struct request *request)
{
    struct statx status;
    const struct fuse_getattr_in *wanted = request_part(request, sizeof *wanted);
    struct node *node = request_node(request);
    if (!wanted || !node)
        return -1;
    if (wanted->getattr_flags & FUSE_GETATTR_FH) {
        struct handle *handle = handle_find(wanted->fh);
        return handle && file_status(handle->fd, "", &status) == 0 ? put_status(&status) : -1;
    }
    int fd = open_or_borrow(node, O_PATH, &status);
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
    int fd = handle_borrow(node, O_PATH), result = fd < 0 ? -1 : fchmod(fd, mode);
    shut(fd);
    return result;
}

static int set_size(struct node *node, const struct fuse_setattr_in *wanted)
{
    struct statx status;
    struct handle *handle = wanted->valid & FATTR_FH ? handle_find(wanted->fh) : NULL;
    if (handle)
        return ftruncate(handle->fd, (off_t)wanted->size);
    int fd = open_or_borrow(node, O_WRONLY, &status);
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

int share_setattr(struct request *request)
{
    struct statx status;
    const struct fuse_setattr_in *wanted = request_part(request, sizeof *wanted);
    struct node *node = request_node(request);
    int fd = wanted && node ? open_or_borrow(node, O_PATH, &status) : -1;
    bool done = fd >= 0 && change(node, fd, wanted) == 0 && file_status(fd, "", &status) == 0;
    shut(fd);
    return done ? put_status(&status) : -1;
}

int share_readlink(struct request *request)
{
    struct statx status;
    struct node *node = request_node(request);
    int fd = node ? node_open(node, O_PATH, &status) : -1;
    ssize_t size = fd < 0 ? -1 : readlinkat(fd, "", (char *)share_answer.bytes, 4096);
    shut(fd);
    return (int)size;
}

uint64_t safe_flags(uint32_t flags) { return flags & (uint32_t)(O_ACCMODE | O_SYNC | O_DSYNC); }

int share_open(struct request *request)
{
    struct statx status;
    const struct fuse_open_in *wanted = request_part(request, sizeof *wanted);
    struct node *node = request_node(request);
    int fd = wanted && node ? open_or_borrow(node, safe_flags(wanted->flags), &status) : -1;
    if (fd < 0)
        return -1;
    if (!S_ISREG(status.stx_mode)) {
        shut(fd);
        errno = EPERM;
        return -1;
    }
    return keep_open(fd, node, wanted->flags, 0);
}

int share_opendir(struct request *request)
{
    struct statx status;
    struct node *node = request_node(request);
    int fd = node ? node_open(node, O_RDONLY | O_DIRECTORY, &status) : -1;
    return fd < 0 ? -1 : keep_open(fd, node, 0, 0);
}

int share_read(struct request *request)
{
    const struct fuse_read_in *wanted = request_part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    size_t size = wanted && wanted->size < sizeof share_answer.bytes ? wanted->size : sizeof share_answer.bytes;
    return handle ? (int)pread(handle->fd, share_answer.bytes, size, (off_t)wanted->offset) : -1;
}

/* What the guest's kernel writes of its own accord, for a mapping, belongs where it says, however the file was opened. */
int share_write(struct request *request)
{
    const struct fuse_write_in *wanted = request_part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    const void *bytes = handle ? request_part(request, wanted->size) : NULL;
    if (!bytes)
        return -1;
    struct iovec piece = {(void *)bytes, wanted->size};
    bool append = handle->append && !(wanted->write_flags & FUSE_WRITE_CACHE);
    long size = syscall(SYS_pwritev2, handle->fd, &piece, 1, wanted->offset, 0, append ? RWF_APPEND : 0);
    if (size < 0)
        return -1;
    *(struct fuse_write_out *)(void *)share_answer.bytes = (struct fuse_write_out){.size = (uint32_t)size};
    return sizeof(struct fuse_write_out);
}

int share_release(struct request *request)
{
    const struct fuse_release_in *wanted = request_part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    if (!handle)
        return -1;
    handle_drop(handle);
    return 0;
}

int share_fsync(struct request *request)
{
    const struct fuse_fsync_in *wanted = request_part(request, sizeof *wanted);
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

int share_readdir(struct request *request)
{
    static union {
        uint64_t aligned;
        char bytes[16 * 1024];
    } found;
    struct statx status;
    const struct fuse_read_in *wanted = request_part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    if (!handle || file_status(handle->fd, "", &status) < 0 || lseek(handle->fd, (off_t)wanted->offset, SEEK_SET) < 0)
        return -1;
    size_t most = wanted->size < sizeof share_answer.bytes ? wanted->size : sizeof share_answer.bytes, used = 0;
    long got = syscall(SYS_getdents64, handle->fd, found.bytes, sizeof found.bytes);
    if (got < 0)
        return -1;
    for (long at = 0; at < got;) {
        const struct host_entry *entry = (void *)(found.bytes + at);
        size_t length = strlen(entry->name), size = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + length);
        if (used + size > most)
            break;
        struct fuse_dirent *to = (void *)(share_answer.bytes + used);
        memset(to, 0, size);
        status.stx_ino = entry->inode;
        *to = (struct fuse_dirent){inode_of(&status), (uint64_t)entry->next, (uint32_t)length, entry->type};
        memcpy(share_answer.bytes + used + FUSE_NAME_OFFSET, entry->name, length);
        used += size;
        at += entry->size;
    }
    return (int)used;
}

int share_statfs(struct request *request)
{
    struct statx status;
    struct statfs found;
    struct node *node = request_node(request);
    int fd = node ? open_or_borrow(node, O_PATH, &status) : -1;
    bool done = fd >= 0 && fstatfs(fd, &found) == 0;
    shut(fd);
    if (!done)
        return -1;
    *(struct fuse_statfs_out *)(void *)share_answer.bytes = (struct fuse_statfs_out){.st = {
        .blocks = found.f_blocks, .bfree = found.f_bfree, .bavail = found.f_bavail, .files = found.f_files, .ffree = found.f_ffree,
        .bsize = (uint32_t)found.f_bsize, .namelen = (uint32_t)found.f_namelen, .frsize = (uint32_t)found.f_frsize}};
    return sizeof(struct fuse_statfs_out);
}

int share_fallocate(struct request *request)
{
    const struct fuse_fallocate_in *wanted = request_part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    return handle ? (int)syscall(SYS_fallocate, handle->fd, wanted->mode, wanted->offset, wanted->length) : -1;
}

int share_lseek(struct request *request)
{
    const struct fuse_lseek_in *wanted = request_part(request, sizeof *wanted);
    struct handle *handle = wanted ? handle_find(wanted->fh) : NULL;
    off_t place = handle ? lseek(handle->fd, (off_t)wanted->offset, (int)wanted->whence) : -1;
    if (place < 0)
        return -1;
    *(struct fuse_lseek_out *)(void *)share_answer.bytes = (struct fuse_lseek_out){.offset = (uint64_t)place};
    return sizeof(struct fuse_lseek_out);
}
