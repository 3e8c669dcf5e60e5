/* The parts of the server of mounts (share.h): what share_serve.c receives is done by share_entry.c, by name, and share_file.c. */
#ifndef HUTCH_SHARE_SERVE_H
#define HUTCH_SHARE_SERVE_H

#include "share.h"

#include <linux/fuse.h>

struct request {
    const struct fuse_in_header *head;
    const uint8_t *rest;
    size_t left;
};

/* Do what a whole message asks for; the size of the answer, which is in share_answer, or 0: none is wanted. */
long share_handle(uint8_t *message, size_t size);

/* What a message consists of; NULL with errno when it lacks something. */
const void *request_part(struct request *request, size_t size);
const char *request_text(struct request *request);
const char *request_name(struct request *request); /* of one file: no path */
struct node *request_node(const struct request *request);

/* Where answers are put together. */
extern struct share_answer {
    struct fuse_out_header head;
    uint8_t bytes[SHARE_IO_MAX];
} share_answer;

/* For what may not be open, and without a change of errno. */
void shut(int fd);

/* share_entry.c; no node, no directory. */
int open_directory(struct node *node, struct statx *status);

/* share_file.c, for entries. */
void put_attributes(struct fuse_attr *to, const struct statx *status);
uint64_t safe_flags(uint32_t flags);

/* share_handle.c: the files and directories that the guest has open. */
struct handle {
    int fd; /* -1: free */
    uint32_t salt;
    uint64_t node;
    bool append;
};

void handles_open(void);
struct handle *handle_find(uint64_t number);
int keep_open(int fd, const struct node *node, uint32_t flags, size_t at); /* takes the descriptor, in any case */
void handle_drop(struct handle *handle);
int handle_borrow(const struct node *node, uint64_t flags); /* a file that has lost its name may still be open; `flags`: how it must be */
size_t handles_save(uint64_t *skip, uint8_t *to, size_t room);
void handle_restore(const struct share_item *item); /* what cannot be opened any more is stale */

/* share_fork.c: the opcodes SHARE_SAVE and SHARE_RESTORE. */
int share_save(struct request *request);
int share_restore(struct request *request);

/* Requests: the size of the answer, or -1 with errno. */
typedef int share_act(struct request *request);
share_act share_lookup, share_mknod, share_mkdir, share_symlink, share_unlink, share_rmdir, share_rename, share_rename2, share_link, share_create;
share_act share_getattr, share_setattr, share_readlink, share_open, share_opendir, share_read, share_write, share_release, share_fsync,
    share_readdir, share_statfs, share_fallocate, share_lseek;

#endif
