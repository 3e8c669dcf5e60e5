#include "share.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/fuse.h>

enum { NODE_MAX = 128 * 1024, CHAINS = 32 * 1024, PATH_ROOM = 4096 };

static struct node *by_id[CHAINS], *by_file[CHAINS];
static struct link used = {&used, &used};
static struct node top = {.id = FUSE_ROOT_ID, .lookups = 1};
static unsigned count;
static uint64_t last_id;
static int root_fd;

static struct node **id_chain(uint64_t id) { return &by_id[id % CHAINS]; }

static struct node **file_chain(const struct file_id *file)
{
    uint64_t mixed = (file->inode ^ file->device << 20 ^ file->mount) * 0x9e3779b97f4a7c15u;
    return &by_file[(mixed >> 40) % CHAINS];
}

int file_status(int fd, const char *name, struct statx *status)
{
    int flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | (*name ? 0 : AT_EMPTY_PATH);
    return (int)syscall(SYS_statx, fd, name, flags, STATX_BASIC_STATS | STATX_BTIME, status);
}

static struct file_id identify(const struct statx *status, unsigned mount)
{
    return (struct file_id){
        .device = (uint64_t)status->stx_dev_major << 32 | status->stx_dev_minor,
        .inode = status->stx_ino,
        .born = status->stx_mask & STATX_BTIME ? status->stx_btime.tv_sec * 1000000000 + status->stx_btime.tv_nsec : 0,
        .mount = mount,
    };
}

static bool same(const struct file_id *a, const struct file_id *b)
{
    return a->inode == b->inode && a->device == b->device && a->born == b->born && a->mount == b->mount;
}

bool node_is(const struct node *node, const struct statx *status)
{
    struct file_id file = identify(status, node->file.mount);
    return same(&node->file, &file);
}

/* The mounts themselves: the guest has bound them, and could not look them up again. */
static bool pinned(const struct node *node) { return !node->parent || node->parent == &top; }

/* A parent is used whenever a child is, and stands behind it: the first of all is a leaf, nearly always. */
static void touch(struct node *node)
{
    for (; node; node = node->parent) {
        list_remove(&node->order);
        list_append(&used, &node->order);
    }
}

static void drop(struct node *node)
{
    struct node **at = id_chain(node->id);
    while (*at != node)
        at = &(*at)->next_by_id;
    *at = node->next_by_id;
    for (at = file_chain(&node->file); *at != node;)
        at = &(*at)->next_by_file;
    *at = node->next_by_file;
    list_remove(&node->order);
    node->parent->children--;
    count--;
    free(node->name);
    free(node);
}

static void make_room(void)
{
    for (int i = 0; count >= NODE_MAX && i < NODE_MAX; i++) {
        struct node *oldest = entry(used.next, struct node, order);
        if (pinned(oldest) || oldest->children)
            touch(oldest);
        else
            drop(oldest);
    }
}

/* Whether `node` is `of`, or lies above it. */
static bool above(const struct node *node, const struct node *of)
{
    for (; of; of = of->parent)
        if (of == node)
            return true;
    return false;
}

static bool place_at(struct node *node, struct node *parent, const char *name)
{
    if (node->parent == parent && strcmp(node->name, name) == 0)
        return true;
    if (above(node, parent)) { /* a mount of the host shows a directory inside itself */
        errno = ELOOP;
        return false;
    }
    char *copy = strdup(name);
    if (!copy)
        return false;
    free(node->name);
    node->name = copy;
    if (node->parent)
        node->parent->children--;
    node->parent = parent;
    parent->children++;
    return true;
}

int nodes_open(int root)
{
    struct statx status;
    root_fd = root;
    list_init(&top.order);
    if (file_status(root, "", &status) < 0 || getrandom(&last_id, sizeof last_id, 0) != sizeof last_id)
        return -1;
    last_id = last_id >> 2 | (uint64_t)1 << 32; /* what a server before this one has said means nothing to this one */
    top.file = identify(&status, 0);
    top.next_by_id = *id_chain(top.id);
    *id_chain(top.id) = &top;
    return 0;
}

struct node *node_find(uint64_t id)
{
    for (struct node *node = *id_chain(id); node; node = node->next_by_id)
        if (node->id == id)
            return node;
    errno = ESTALE;
    return NULL;
}

static struct node *find_file(const struct file_id *file)
{
    for (struct node *node = *file_chain(file); node; node = node->next_by_file)
        if (same(&node->file, file))
            return node;
    return NULL;
}

static unsigned mount_of(const struct node *parent, const char *name)
{
    return parent == &top ? (unsigned)atoi(name) + 1 : parent->file.mount;
}

static struct node *insert(struct node *parent, const char *name, const struct file_id *file, uint64_t id, uint64_t lookups)
{
    struct node *node = calloc(1, sizeof *node);
    if (!node)
        return NULL;
    list_init(&node->order);
    node->file = *file;
    if (!place_at(node, parent, name)) {
        free(node);
        return NULL;
    }
    node->id = id;
    node->lookups = lookups;
    node->next_by_id = *id_chain(id);
    *id_chain(id) = node;
    node->next_by_file = *file_chain(file);
    *file_chain(file) = node;
    count++;
    return node;
}

struct node *node_enter(struct node *parent, const char *name, const struct statx *status)
{
    struct file_id file = identify(status, mount_of(parent, name));
    struct node *node = find_file(&file);
    if (node) {
        if (!pinned(node) && !place_at(node, parent, name))
            return NULL;
        touch(node);
        node->lookups++;
        return node;
    }
    touch(parent); /* so that it is not what has to go */
    make_room();
    node = insert(parent, name, &file, parent == &top ? FUSE_ROOT_ID + file.mount : ++last_id, 1);
    if (node)
        touch(node);
    return node;
}

void node_moved(struct node *parent, const char *name, const struct statx *status)
{
    struct file_id file = identify(status, mount_of(parent, name));
    struct node *node = find_file(&file);
    if (node && !pinned(node))
        place_at(node, parent, name);
}

void node_forget(uint64_t id, uint64_t lookups)
{
    struct node *node = node_find(id);
    if (!node || pinned(node))
        return;
    node->lookups -= lookups < node->lookups ? lookups : node->lookups;
    if (node->lookups == 0 && node->children == 0)
        drop(node);
}

/* The path below the root, at the end of `room`; NULL with errno. */
static const char *path_of(const struct node *node, char room[PATH_ROOM])
{
    char *at = room + PATH_ROOM - 1;
    *at = 0;
    for (; node->parent; node = node->parent) {
        size_t length = strlen(node->name);
        if ((size_t)(at - room) < length + 1) {
            errno = ENAMETOOLONG;
            return NULL;
        }
        if (*at)
            *--at = '/';
        at -= length;
        memcpy(at, node->name, length);
    }
    return *at ? at : ".";
}

int node_open(struct node *node, uint64_t flags, struct statx *status)
{
    char room[PATH_ROOM];
    struct open_how how = {
        .flags = flags | O_NOFOLLOW | O_NONBLOCK * !(flags & O_PATH) | O_NOCTTY * !(flags & O_PATH) | O_CLOEXEC,
        .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
    };
    const char *path = path_of(node, room);
    if (!path)
        return -1;
    touch(node);
    int fd = (int)syscall(SYS_openat2, root_fd, path, &how, sizeof how);
    if (fd < 0) {
        if (errno == ENOENT || errno == ENOTDIR || errno == ELOOP || errno == EXDEV)
            errno = ESTALE;
        return -1;
    }
    if (file_status(fd, "", status) == 0 && node_is(node, status))
        return fd;
    close(fd);
    errno = ESTALE;
    return -1;
}

unsigned nodes_count(void) { return count; }

/* Put each parent behind its children: whoever is told of the last first knows the parents of all. */
static void order_all(void)
{
    for (unsigned i = 0; i <= count; i++)
        touch(entry(used.next, struct node, order));
}

size_t nodes_save(uint64_t *skip, uint8_t *to, size_t room)
{
    size_t done = 0;
    uint64_t number = 0;
    if (*skip == 0)
        order_all();
    for (struct link *at = used.prev; at != &used; at = at->prev) {
        const struct node *node = entry(at, struct node, order);
        if (!node->parent || number++ < *skip)
            continue;
        size_t length = strlen(node->name), size = sizeof(struct share_item) + ((length + 7) & ~(size_t)7);
        if (room - done < size)
            break;
        struct share_item *item = (void *)(to + done);
        memset(item, 0, size);
        *item = (struct share_item){.kind = SHARE_NODE, .id = node->id, .parent = node->parent->id, .device = node->file.device,
                                    .inode = node->file.inode, .born = node->file.born, .lookups = node->lookups, .length = length};
        memcpy(item->name, node->name, length);
        done += size;
        ++*skip;
    }
    return done;
}

bool node_restore(const struct share_item *item, const char *name)
{
    struct node *parent = node_find(item->parent);
    char room[PATH_ROOM];
    if (!parent || count >= NODE_MAX)
        return true; /* stale then, like all that is forgotten */
    struct file_id file = {item->device, item->inode, item->born, mount_of(parent, name)};
    bool mount = parent == &top, own_id = item->id == FUSE_ROOT_ID + (uint64_t)file.mount;
    bool of_mount = item->id <= FUSE_ROOT_ID + SHARE_MOUNT_MAX; /* which are pinned: of more of them there would be no room for others */
    if (node_find(item->id) || find_file(&file) || mount != of_mount || (mount && !own_id)) {
        errno = EINVAL;
        return false;
    }
    struct node *node = insert(parent, name, &file, item->id, item->lookups);
    if (node)
        list_append(used.next, &node->order); /* what comes later was used less lately */
    if (node && !path_of(node, room))
        drop(node);
    return true;
}
