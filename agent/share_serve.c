#include "share_serve.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static union {
    uint64_t aligned;
    uint8_t bytes[SHARE_MESSAGE_MAX];
} in;
struct share_answer share_answer;

void shut(int fd)
{
    int cause = errno;
    if (fd >= 0)
        close(fd);
    errno = cause;
}

const void *request_part(struct request *request, size_t size)
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

const char *request_text(struct request *request)
{
    const char *at = (const char *)request->rest;
    const char *end = memchr(at, 0, request->left);
    if (!end) {
        errno = EINVAL;
        return NULL;
    }
    return request_part(request, (size_t)(end - at) + 1);
}

const char *request_name(struct request *request)
{
    const char *at = request_text(request);
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

struct node *request_node(const struct request *request) { return node_find(request->head->nodeid); }

static int share_init(struct request *request)
{
    const struct fuse_init_in *wanted = (const void *)request->rest; /* older kernels send less of it */
    struct fuse_init_out *answer = (void *)share_answer.bytes;
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

/* What is not here the guest's kernel does by itself, or tells its programs that it cannot be done. */
static share_act *const acts[] = {
    [FUSE_LOOKUP] = share_lookup,   [FUSE_GETATTR] = share_getattr,    [FUSE_SETATTR] = share_setattr,   [FUSE_READLINK] = share_readlink,
    [FUSE_SYMLINK] = share_symlink, [FUSE_MKNOD] = share_mknod,        [FUSE_MKDIR] = share_mkdir,       [FUSE_UNLINK] = share_unlink,
    [FUSE_RMDIR] = share_rmdir,     [FUSE_RENAME] = share_rename,      [FUSE_RENAME2] = share_rename2,   [FUSE_LINK] = share_link,
    [FUSE_OPEN] = share_open,       [FUSE_READ] = share_read,          [FUSE_WRITE] = share_write,       [FUSE_STATFS] = share_statfs,
    [FUSE_RELEASE] = share_release, [FUSE_RELEASEDIR] = share_release, [FUSE_FSYNC] = share_fsync,       [FUSE_FSYNCDIR] = share_fsync,
    [FUSE_INIT] = share_init,       [FUSE_OPENDIR] = share_opendir,    [FUSE_READDIR] = share_readdir,   [FUSE_CREATE] = share_create,
    [FUSE_FALLOCATE] = share_fallocate, [FUSE_LSEEK] = share_lseek,
};

static share_act *act_for(uint32_t opcode)
{
    static bool begun;
    if (opcode == SHARE_RESTORE)
        return begun ? NULL : share_restore;
    begun = true;
    if (opcode == SHARE_SAVE)
        return share_save;
    return opcode < sizeof acts / sizeof *acts ? acts[opcode] : NULL;
}

static void forget(struct request *request)
{
    if (request->head->opcode == FUSE_FORGET) {
        const struct fuse_forget_in *one = request_part(request, sizeof *one);
        if (one)
            node_forget(request->head->nodeid, one->nlookup);
        return;
    }
    const struct fuse_batch_forget_in *batch = request_part(request, sizeof *batch);
    const struct fuse_forget_one *one;
    for (uint32_t i = 0; batch && i < batch->count && (one = request_part(request, sizeof *one)); i++)
        node_forget(one->nodeid, one->nlookup);
}

static bool send_all(int channel, size_t size)
{
    for (const uint8_t *at = (const uint8_t *)&share_answer; size > 0;) {
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

long share_handle(uint8_t *message, size_t size)
{
    struct request request = {(void *)message, message + sizeof(struct fuse_in_header), size - sizeof(struct fuse_in_header)};
    uint32_t opcode = request.head->opcode;
    if (opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET)
        forget(&request);
    if (opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET || opcode == FUSE_INTERRUPT)
        return 0; /* they want no answer */
    share_act *act = act_for(opcode);
    errno = ENOSYS;
    int done = act ? act(&request) : -1;
    share_answer.head = (struct fuse_out_header){.error = done < 0 ? -errno : 0, .unique = request.head->unique};
    share_answer.head.len = (uint32_t)(sizeof share_answer.head + (done < 0 ? 0 : (size_t)done));
    return share_answer.head.len;
}

_Noreturn void share_serve(int channel, int root)
{
    struct fuse_in_header *head = (void *)in.bytes;
    if (nodes_open(root) < 0)
        launch_fail("looking at the mounts");
    handles_open();
    for (;;) {
        if (!receive(channel, head, sizeof *head) || head->len < sizeof *head || head->len > sizeof in.bytes
            || !receive(channel, in.bytes + sizeof *head, head->len - sizeof *head))
            _exit(0); /* the machine has ended, or whoever rules its kernel sends rubbish */
        long size = share_handle(in.bytes, head->len);
        if (size > 0 && !send_all(channel, (size_t)size))
            _exit(0);
    }
}
