/* The window against a plain model. Built with agent/window.c. */
#include <string.h>
#include <sys/mman.h>

#include "check.h"
#include "window.h"

static uint8_t model[8 * WINDOW_SIZE]; /* every byte ever added */

static void add(struct window *window, size_t size)
{
    struct iovec place[2];
    int pieces = window_room(window, size, place);
    CHECK(pieces == 1 || pieces == 2);
    CHECK(place[0].iov_len + (pieces == 2 ? place[1].iov_len : 0) == size);
    for (size_t i = 0; i < size; i++) {
        uint8_t byte = (uint8_t)rand();
        model[window->head + i] = byte;
        ((uint8_t *)place[i >= place[0].iov_len].iov_base)[i >= place[0].iov_len ? i - place[0].iov_len : i] = byte;
    }
    window_add(window, size);
}

static void check(const struct window *window, uint64_t from, size_t size)
{
    struct iovec place[2];
    int pieces = window_find(window, from, size, place);
    size_t first = place[0].iov_len, second = pieces == 2 ? place[1].iov_len : 0;
    CHECK(first + second == size);
    CHECK(memcmp(place[0].iov_base, model + from, first) == 0);
    CHECK(memcmp(place[1].iov_base, model + from + first, second) == 0);
}

static void check_all(const struct window *window)
{
    uint64_t tail = window_tail(window);
    CHECK(tail == (window->head > WINDOW_SIZE ? window->head - WINDOW_SIZE : 0));
    check(window, tail, window->head - tail);
    if (window->head - tail > 2)
        check(window, tail + 1, window->head - tail - 2);
}

static void check_shared(struct window *window)
{
    int fd = window_share(window);
    CHECK(fd >= 0 && window_share(window) == fd);
    const uint8_t *bytes = mmap(NULL, WINDOW_SIZE, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(bytes != MAP_FAILED);
    for (uint64_t at = window_tail(window); at < window->head; at++)
        CHECK(bytes[at % WINDOW_SIZE] == model[at]);
    munmap((void *)bytes, WINDOW_SIZE);
}

int main(void)
{
    srand(5);
    for (int round = 0; round < 40; round++) {
        struct window window;
        window_init(&window);
        CHECK(window_memory(&window) == 0 && window_tail(&window) == 0);
        int adds = rand() % 8;
        for (int i = 0; i < adds; i++) {
            add(&window, 1 + (size_t)rand() % (round % 2 ? WINDOW_SIZE : 9000));
            check_all(&window);
            if (rand() % 6 == 0) {
                check_shared(&window);
                check_all(&window);
            }
        }
        uint64_t kept = window.head - window_tail(&window);
        window_compact(&window);
        window_compact(&window);
        if (adds) {
            check_all(&window);
            CHECK(window_memory(&window) == (kept <= WINDOW_SIZE / 2 ? kept : WINDOW_SIZE));
        }
        check_shared(&window); /* a finished stream may be asked for as well */
        check_all(&window);
        window_compact(&window);
        check_all(&window);
        window_free(&window);
        CHECK(window_memory(&window) == 0);
    }
}
