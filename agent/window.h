/* The newest bytes of one output stream, at `position % WINDOW_SIZE`. Memory is taken at the first byte. */
#ifndef HUTCH_WINDOW_H
#define HUTCH_WINDOW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum { WINDOW_SIZE = 512 * 1024 };

struct window {
    uint8_t *bytes;
    uint64_t head; /* position behind the newest byte */
    int fd;        /* memfd once it is shared, else -1 */
    bool compact;  /* `bytes` is an exact copy of [0, head) on the heap: nothing more can be added */
};

void window_init(struct window *window);
void window_free(struct window *window);

/* Position of the oldest byte that is kept. */
uint64_t window_tail(const struct window *window);

/* The place of the next `size` (<= WINDOW_SIZE) bytes, in one or two pieces; returns their number, -1 without memory. */
int window_room(struct window *window, size_t size, struct iovec place[2]);

/* `size` bytes have been written to the room. The oldest ones are gone. */
static inline void window_add(struct window *window, size_t size) { window->head += size; }

/* Where [position, position + size) stands, in one or two pieces; the range must lie within [tail, head). */
int window_find(const struct window *window, uint64_t position, size_t size, struct iovec place[2]);

/* Make the window a sealed memfd; returns the descriptor (the window's own) or -1 with errno. */
int window_share(struct window *window);

/* No byte will be added: give back memory that is not needed. Failure is harmless. */
void window_compact(struct window *window);

/* Memory held, in bytes. */
size_t window_memory(const struct window *window);

#endif
