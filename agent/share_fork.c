/* The server of a box that is forked tells what it knows, and that of the fork is told (share.h). */
#include "share_serve.h"

#include <errno.h>
#include <string.h>

int share_save(struct request *request)
{
    const uint64_t *first = request_part(request, sizeof *first);
    struct share_saved *answer = (void *)share_answer.bytes;
    uint8_t *items = share_answer.bytes + sizeof *answer;
    if (!first)
        return -1;
    size_t room = sizeof share_answer.bytes - sizeof *answer, size;
    uint64_t next = *first;
    if (next < nodes_count()) {
        size = nodes_save(&next, items, room);
    } else {
        next -= nodes_count();
        size = handles_save(&next, items, room);
        next += nodes_count();
    }
    answer->next = next;
    return (int)(sizeof *answer + size);
}

/* A name of a file and nothing else, as in any request. */
static const char *name_of(struct request *request, uint64_t length)
{
    static char name[256];
    const char *at = length < sizeof name ? request_part(request, (length + 7) & ~7u) : NULL;
    if (!at)
        return NULL;
    memcpy(name, at, length);
    name[length] = 0;
    struct request alone = {.rest = (const uint8_t *)name, .left = length + 1};
    return request_name(&alone) && alone.left == 0 ? name : NULL;
}

int share_restore(struct request *request)
{
    while (request->left > 0) {
        const struct share_item *item = request_part(request, sizeof *item);
        const char *name = item && item->kind == SHARE_NODE ? name_of(request, item->length) : NULL;
        if (item && item->kind == SHARE_HANDLE && item->length == 0) {
            handle_restore(item);
        } else if (!name || !node_restore(item, name)) {
            errno = EINVAL;
            return -1;
        }
    }
    return 0;
}
