/* Folders of the host in a VM. The guest's kernel speaks FUSE (fuse(4)) with a server on the host, over a serial port of its own; the guest's agent
 * only carries the messages. The server is a process in the box's own user namespace whose root holds the mounts and nothing else:
 *
 *     launcher                     keeper                       server                              guest
 *     user namespace, sources
 *                                  fork --------------------->  mounts as its root, drop, filter
 *                                                               serve  <── emulator's port 2 ──>   relay ── kernel ── programs
 *
 * Nothing of what the guest sends is trusted. */
#ifndef HUTCH_SHARE_H
#define HUTCH_SHARE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <linux/stat.h>

#include "launch.h"
#include "list.h"

enum { SHARE_IO_MAX = 256 * 1024, SHARE_MESSAGE_MAX = SHARE_IO_MAX + 4096, SHARE_MOUNT_MAX = 64 };

/* share.c: run by the launcher, where the host's files are in reach: the sources become detached mounts, `userns` says whose ids they have on disk. */
struct share {
    int userns;
    int trees[SHARE_MOUNT_MAX];
    size_t count;
};
void share_prepare(struct share *share, const struct bind *binds, size_t count, const char *uid_map, const char *gid_map, bool shift);

/* Start the server, as a child; returns the emulator's end of the channel. */
int share_start(const struct share *share);

/* share_serve.c: answer messages until the other end closes. `root` has a directory entry for each mount: 0, 1, ... */
_Noreturn void share_serve(int channel, int root);

/* share_node.c: what the guest's kernel knows files by. A node is a name in another node, and the file that stood there when it was last seen: it
 * is opened by its path, and is stale (ESTALE) when another file is found. Then the guest's kernel looks its name up again. So any node can
 * be forgotten, and there are never more than NODE_MAX. */
struct file_id {
    uint64_t device, inode;
    int64_t born; /* inode numbers are used again */
    unsigned mount; /* the same file by way of two mounts is two */
};

struct node {
    struct link order; /* the least lately used first */
    struct node *next_by_id, *next_by_file, *parent;
    uint64_t id, lookups;
    struct file_id file;
    unsigned children;
    char *name;
};

int nodes_open(int root);
struct node *node_find(uint64_t id);
struct node *node_enter(struct node *parent, const char *name, const struct statx *status);
void node_moved(struct node *parent, const char *name, const struct statx *status);
void node_forget(uint64_t id, uint64_t count);
bool node_is(const struct node *node, const struct statx *status);
int node_open(struct node *node, uint64_t flags, struct statx *status); /* -1 with errno; follows no symlink, opens no device */
int file_status(int fd, const char *name, struct statx *status);        /* an empty name: of the descriptor */

/* What a server knows that a guest counts on, so that the server of its fork can go on: items, each of a multiple of 8 bytes. The guest's
 * agent asks for them (SHARE_SAVE, with the number of the first) and says them to the new server before all else (SHARE_RESTORE). They are
 * not trusted: whatever they claim, a file is what its path leads to and its identity says, like after any lookup. */
enum { SHARE_SAVE = 0x48550001, SHARE_RESTORE = 0x48550002, SHARE_NODE = 1, SHARE_HANDLE = 2 };

struct share_saved {
    uint64_t next; /* of the items: as many were told */
};

struct share_item {
    uint32_t kind, flags; /* flags: how a handle is open */
    uint64_t id, parent;  /* of a handle: its node */
    uint64_t device, inode, lookups;
    int64_t born;
    uint64_t length; /* of the name */
    char name[];
};

size_t nodes_save(uint64_t *skip, uint8_t *to, size_t room); /* parents first; the items that fit, behind the first `skip` */
unsigned nodes_count(void);
bool node_restore(const struct share_item *item, const char *name); /* false with EINVAL: it is malformed */

/* share_guest.c: in the guest: mount at `point` what the other end of the port serves. */
void share_mount(const char *point, int port);

/* For a fork: keep requests back, and learn from the server what it knows. false: that is not possible now. */
bool share_hold(void);

/* Go on, with the same server or with another one, which is told first. false: it has refused. */
bool share_go_on(bool other);

#endif
