/* The server of mounts after a fork, when the guest has told what it knew: built with agent/share_serve.c agent/share_entry.c agent/share_file.c
 * agent/share_handle.c agent/share_fork.c agent/share_node.c. */
#include "check.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "share_serve.h"

enum { MANY = 128 * 1024 }; /* as many as it remembers */

static char place[] = "build/test_share.XXXXXX";

void launch_fail(const char *step)
{
    perror(step);
    abort();
}

static long ask(uint32_t opcode, uint64_t node, const void *payload, size_t size)
{
    static _Alignas(8) uint8_t message[sizeof(struct fuse_in_header) + 512];
    struct fuse_in_header head = {.len = (uint32_t)(sizeof head + size), .opcode = opcode, .nodeid = node};
    memcpy(message, &head, sizeof head);
    memcpy(message + sizeof head, payload, size);
    share_handle(message, sizeof head + size);
    return share_answer.head.error;
}

static long claim(uint64_t id, uint64_t parent, uint64_t inode, const char *name)
{
    uint8_t message[sizeof(struct share_item) + 16] = {0};
    struct share_item item = {.kind = SHARE_NODE, .id = id, .parent = parent, .inode = inode, .length = strlen(name)};
    memcpy(message, &item, sizeof item);
    memcpy(message + sizeof item, name, strlen(name));
    return ask(SHARE_RESTORE, 0, message, sizeof item + ((strlen(name) + 7) & ~7u));
}

static uint64_t found(void) { return ((struct fuse_entry_out *)(void *)share_answer.bytes)->nodeid; }

/* Mounts are never forgotten: a guest that claims more of them than there can be would leave the server nothing to forget but what it is
 * about to use. */
static void test_no_more_mounts_than_there_can_be(void)
{
    char name[16];
    for (unsigned i = 1; i < MANY - 1; i++) {
        snprintf(name, sizeof name, "%u", i);
        CHECK((claim(FUSE_ROOT_ID + 1 + i, FUSE_ROOT_ID, i, name) == 0) == (i < SHARE_MOUNT_MAX));
    }
    CHECK(ask(FUSE_LOOKUP, FUSE_ROOT_ID, "0", 2) == 0);
    CHECK(ask(FUSE_LOOKUP, found(), "directory", 10) == 0);
    CHECK(ask(FUSE_LOOKUP, found(), "file", 5) == 0);
    CHECK(nodes_count() == SHARE_MOUNT_MAX - 1 + 3);
}

int main(void)
{
    static const char *const names[] = {"", "/0", "/0/directory", "/0/directory/file"};
    char path[64];
    int root = mkdtemp(place) ? open(place, O_PATH | O_DIRECTORY) : -1;
    for (int i = 1; i < 4; i++) {
        snprintf(path, sizeof path, "%s%s", place, names[i]);
        if (mkdir(path, 0755) < 0)
            launch_fail(path);
    }
    if (nodes_open(root) < 0)
        launch_fail(place);
    handles_open();
    test_no_more_mounts_than_there_can_be();
    for (int i = 3; i >= 0; i--) {
        snprintf(path, sizeof path, "%s%s", place, names[i]);
        rmdir(path);
    }
    return 0;
}
