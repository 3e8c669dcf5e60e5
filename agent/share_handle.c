#include "share_serve.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HANDLE_MAX = 8192, DESCRIPTORS_KEPT = 32, KEPT_FLAGS = O_ACCMODE | O_SYNC | O_DSYNC | O_DIRECTORY };

static struct handle handles[HANDLE_MAX];
static unsigned handle_count, handle_next;
static uint32_t last_salt;

struct handle *handle_find(uint64_t number)
{
    struct handle *handle = &handles[number % HANDLE_MAX];
    if (handle->fd >= 0 && handle->salt == number >> 32)
        return handle;
    errno = ESTALE; /* what a fork could not take along */
    return NULL;
}

static uint64_t number_of(const struct handle *handle) { return (uint64_t)handle->salt << 32 | (uint64_t)(handle - handles); }

int keep_open(int fd, const struct node *node, uint32_t flags, size_t at)
{
    if (handle_count == HANDLE_MAX) {
        shut(fd);
        errno = ENFILE;
        return -1;
    }
    while (handles[handle_next % HANDLE_MAX].fd >= 0)
        handle_next++;
    struct handle *handle = &handles[handle_next++ % HANDLE_MAX];
    *handle = (struct handle){fd, ++last_salt, node->id, flags & O_APPEND};
    handle_count++;
    *(struct fuse_open_out *)(void *)(share_answer.bytes + at) = (struct fuse_open_out){.fh = number_of(handle)};
    return (int)(at + sizeof(struct fuse_open_out));
}

void handle_drop(struct handle *handle)
{
    close(handle->fd);
    handle->fd = -1;
    handle_count--;
}

int handle_borrow(const struct node *node, uint64_t flags)
{
    for (int i = 0; i < HANDLE_MAX; i++) {
        if (handles[i].fd < 0 || handles[i].node != node->id)
            continue;
        int mode = fcntl(handles[i].fd, F_GETFL) & O_ACCMODE;
        if (flags & O_PATH || mode == O_RDWR || mode == (int)(flags & O_ACCMODE))
            return fcntl(handles[i].fd, F_DUPFD_CLOEXEC, 0);
    }
    errno = ESTALE;
    return -1;
}

size_t handles_save(uint64_t *skip, uint8_t *to, size_t room)
{
    size_t used = 0;
    uint64_t number = 0;
    for (unsigned i = 0; i < HANDLE_MAX && room - used >= sizeof(struct share_item); i++) {
        if (handles[i].fd < 0 || number++ < *skip)
            continue;
        struct share_item *item = (void *)(to + used);
        *item = (struct share_item){.kind = SHARE_HANDLE, .id = number_of(&handles[i]), .parent = handles[i].node};
        item->flags = (uint32_t)fcntl(handles[i].fd, F_GETFL) & KEPT_FLAGS;
        item->flags |= handles[i].append ? O_APPEND : 0;
        used += sizeof *item;
        ++*skip;
    }
    return used;
}

void handle_restore(const struct share_item *item)
{
    struct handle *handle = &handles[item->id % HANDLE_MAX];
    struct node *node = node_find(item->parent);
    struct statx status;
    uint32_t salt = (uint32_t)(item->id >> 32);
    if (salt > last_salt)
        last_salt = salt; /* also of what cannot be opened: none gets its number */
    if (!node || handle->fd >= 0 || (item->id & UINT32_MAX) >= HANDLE_MAX)
        return;
    int fd = node_open(node, item->flags & KEPT_FLAGS, &status);
    if (fd < 0)
        return;
    if (item->flags & O_DIRECTORY ? !S_ISDIR(status.stx_mode) : !S_ISREG(status.stx_mode)) {
        shut(fd);
        return;
    }
    *handle = (struct handle){fd, salt, node->id, item->flags & O_APPEND};
    handle_count++;
}

void handles_open(void)
{
    struct rlimit files;
    for (int i = 0; i < HANDLE_MAX; i++)
        handles[i].fd = -1;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
        files.rlim_cur = files.rlim_max < HANDLE_MAX + DESCRIPTORS_KEPT ? files.rlim_max : HANDLE_MAX + DESCRIPTORS_KEPT;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}
