#include "window.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

void window_init(struct window *window) { *window = (struct window){.fd = -1}; }

static void release(uint8_t *bytes, bool compact, int fd)
{
    if (compact)
        free(bytes);
    else if (bytes)
        munmap(bytes, WINDOW_SIZE);
    if (fd >= 0)
        close(fd);
}

void window_free(struct window *window)
{
    release(window->bytes, window->compact, window->fd);
    window_init(window);
}

uint64_t window_tail(const struct window *window)
{
    return window->head > WINDOW_SIZE ? window->head - WINDOW_SIZE : 0;
}

static int pieces(uint8_t *base, uint64_t position, size_t size, struct iovec place[2])
{
    size_t offset = position % WINDOW_SIZE;
    size_t first = size < WINDOW_SIZE - offset ? size : WINDOW_SIZE - offset;
    place[0] = (struct iovec){base + offset, first};
    place[1] = (struct iovec){base, size - first};
    return first < size ? 2 : 1;
}

/* Children never see the window: a fork need not copy its page table, and a file child does not hold other commands' output. */
static uint8_t *map(int flags, int fd)
{
    uint8_t *bytes = mmap(NULL, WINDOW_SIZE, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (bytes == MAP_FAILED)
        return NULL;
    madvise(bytes, WINDOW_SIZE, MADV_DONTFORK);
    return bytes;
}

int window_room(struct window *window, size_t size, struct iovec place[2])
{
    if (!window->bytes && !(window->bytes = map(MAP_PRIVATE | MAP_ANONYMOUS, -1)))
        return -1;
    return pieces(window->bytes, window->head, size, place);
}

int window_find(const struct window *window, uint64_t position, size_t size, struct iovec place[2])
{
    if (!window->compact)
        return pieces(window->bytes, position, size, place);
    place[0] = (struct iovec){window->bytes + position, size};
    place[1] = (struct iovec){window->bytes, 0};
    return 1;
}

int window_share(struct window *window)
{
    if (window->fd >= 0)
        return window->fd;
    int fd = memfd_create("window", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -1;
    uint8_t *bytes = NULL;
    if (ftruncate(fd, WINDOW_SIZE) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0 ||
        !(bytes = map(MAP_SHARED, fd))) {
        close(fd);
        return -1;
    }
    uint64_t tail = window_tail(window);
    if (window->head > tail) {
        struct iovec from[2];
        window_find(window, tail, window->head - tail, from);
        uint64_t position = tail;
        for (int i = 0; i < 2; i++) {
            struct iovec to[2];
            pieces(bytes, position, from[i].iov_len, to);
            memcpy(to[0].iov_base, from[i].iov_base, to[0].iov_len);
            memcpy(to[1].iov_base, (uint8_t *)from[i].iov_base + to[0].iov_len, to[1].iov_len);
            position += from[i].iov_len;
        }
    }
    release(window->bytes, window->compact, -1);
    window->bytes = bytes;
    window->compact = false;
    window->fd = fd;
    return fd;
}

void window_compact(struct window *window)
{
    if (!window->bytes || window->compact || window->head > WINDOW_SIZE / 2)
        return;
    uint8_t *copy = malloc(window->head + 1);
    if (!copy)
        return;
    memcpy(copy, window->bytes, window->head); /* it never wrapped */
    release(window->bytes, false, window->fd);
    window->bytes = copy;
    window->compact = true;
    window->fd = -1;
}

size_t window_memory(const struct window *window)
{
    if (!window->bytes)
        return 0;
    return window->compact ? (size_t)window->head : WINDOW_SIZE;
}
