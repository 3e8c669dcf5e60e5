/* libFuzzer: what the guest's kernel may send to the server of mounts, in a folder of its own.
 * Built with agent/share_serve.c agent/share_entry.c agent/share_file.c
 * agent/share_handle.c agent/share_fork.c agent/share_node.c. */
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "share_serve.h"

enum { KNOWN = 8, PAYLOAD_MAX = 255 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char place[] = "build/fuzz_share.XXXXXX", mount[64];
static uint64_t ids[KNOWN], opened[KNOWN];

void launch_fail(const char *step)
{
    perror(step);
    abort();
}

static int delete(const char *path, const struct stat *status, int type, struct FTW *where)
{
    (void)status;
    (void)type;
    return where->level && strcmp(path, mount) != 0 ? remove(path) : 0;
}

static void clean(void)
{
    nftw(place, delete, 8, FTW_DEPTH | FTW_PHYS); /* also what stands beside the mount: nothing but the product's root keeps the guest from it */
    chmod(mount, 0755);
}

static void end(void)
{
    clean();
    rmdir(mount);
    rmdir(place);
}

static void begin(void)
{
    const struct rlimit little = {1 << 20, 1 << 20};
    if (*mount)
        return;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &little);
    int root = mkdtemp(place) ? open(place, O_PATH | O_DIRECTORY) : -1;
    snprintf(mount, sizeof mount, "%s/0", place);
    if (mkdir(mount, 0755) < 0 || nodes_open(root) < 0)
        launch_fail(place);
    handles_open();
    atexit(end);
}

static long ask(uint32_t opcode, uint64_t node, const void *payload, size_t size)
{
    static _Alignas(8) uint8_t message[sizeof(struct fuse_in_header) + PAYLOAD_MAX + 1];
    struct fuse_in_header head = {.len = (uint32_t)(sizeof head + size), .opcode = opcode, .nodeid = node};
    uint8_t *exact = malloc(sizeof head + size); /* so that a read beyond it is seen */
    memcpy(message, &head, sizeof head);
    memcpy(message + sizeof head, payload, size);
    memcpy(exact, message, sizeof head + size);
    long answer = share_handle(exact, sizeof head + size);
    free(exact);
    if (answer && (answer < (long)sizeof head.len || answer > (long)sizeof share_answer))
        abort();
    return share_answer.head.error ? 0 : answer;
}

/* What a guest may claim to have known; here the server has begun, so the message itself would be refused. */
static void claim(const uint8_t *bytes, size_t size)
{
    static _Alignas(8) uint8_t message[sizeof(struct share_item) + PAYLOAD_MAX + 1];
    struct share_item item = {.kind = SHARE_NODE, .parent = ids[bytes[0] % KNOWN], .id = (uint64_t)bytes[1] << 40 | bytes[2], .inode = bytes[3]};
    struct request request = {.rest = message};
    item.length = bytes[4] < 128 ? size - 8 : bytes[5];
    if (bytes[4] % 4 == 3)
        item = (struct share_item){.kind = SHARE_HANDLE, .parent = ids[bytes[0] % KNOWN], .id = bytes[1] | (uint64_t)bytes[2] << 32, .flags = bytes[3] << (bytes[5] & 16)};
    memcpy(message, &item, sizeof item);
    memset(message + sizeof item, 0, PAYLOAD_MAX + 1);
    memcpy(message + sizeof item, bytes + 8, size - 8);
    request.left = sizeof item + ((size - 8 + 7) & ~(size_t)7);
    if (item.kind == SHARE_HANDLE)
        request.left = sizeof item;
    if (share_restore(&request) == 0 && item.kind == SHARE_NODE)
        ids[2 + bytes[6] % (KNOWN - 2)] = item.id;
    if (item.kind == SHARE_HANDLE) {
        ask(FUSE_RELEASE, 1, &(struct fuse_release_in){.fh = opened[bytes[6] % KNOWN]}, sizeof(struct fuse_release_in));
        opened[bytes[6] % KNOWN] = item.id;
    }
}

/* Ids and handles are drawn by the server: the input names those that it was given before. */
static void learn(uint32_t opcode, long answer, unsigned at)
{
    struct fuse_entry_out *entry = (void *)share_answer.bytes;
    if (answer >= (long)(sizeof(struct fuse_out_header) + sizeof *entry) && opcode != FUSE_READ && opcode != FUSE_READDIR)
        ids[2 + at % (KNOWN - 2)] = entry->nodeid;
    if (answer && (opcode == FUSE_OPEN || opcode == FUSE_OPENDIR || opcode == FUSE_CREATE)) {
        struct fuse_open_out *open = (void *)(share_answer.bytes + (opcode == FUSE_CREATE ? sizeof *entry : 0));
        ask(FUSE_RELEASE, 1, &(struct fuse_release_in){.fh = opened[at % KNOWN]}, sizeof(struct fuse_release_in));
        opened[at % KNOWN] = open->fh;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t payload[PAYLOAD_MAX];
    begin();
    ids[0] = FUSE_ROOT_ID;
    ids[1] = FUSE_ROOT_ID + 1;
    ask(FUSE_LOOKUP, FUSE_ROOT_ID, "0", 2);
    for (unsigned turn = 0; size >= 4; turn++) {
        uint32_t opcode = data[0] % 52;
        if (data[0] >= 208)
            opcode = SHARE_SAVE;
        uint64_t node = ids[data[1] % KNOWN];
        size_t length = data[2] < size - 4 ? data[2] : size - 4;
        memcpy(payload, data + 4, length);
        if (data[3] < 128 && length >= 8)
            memcpy(payload, data[3] < 64 ? &opened[data[3] % KNOWN] : &ids[data[3] % KNOWN], 8);
        data += 4 + length;
        size -= 4 + length;
        if (length >= 8 && opcode == 51)
            claim(payload, length);
        else
            learn(opcode, ask(opcode, node, payload, length), turn);
    }
    for (unsigned i = 0; i < KNOWN; i++)
        ask(FUSE_RELEASE, 1, &(struct fuse_release_in){.fh = opened[i]}, sizeof(struct fuse_release_in));
    clean();
    return 0;
}
