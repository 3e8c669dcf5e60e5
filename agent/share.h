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

/* share_guest.c: in the guest: mount at `point` what the other end of the port serves. */
void share_mount(const char *point, int port);

#endif
