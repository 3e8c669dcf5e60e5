/* The guard of an emulator's network stack: a shared object of our own in the emulator (QEMU), before libslirp. */
#ifndef HUTCH_GUARD_H
#define HUTCH_GUARD_H

#include <stddef.h>
#include <stdint.h>

/* The emulator's descriptors. Its line it gets from the guard: without one it has none, and ends. */
enum { EMULATOR_LINE = 3, EMULATOR_FILES, GUARD_LINE };

/* admit.c: of a frame that the guest sends, how many bytes the stack may hear; 0: none. */
size_t guard_admitted(const uint8_t *frame, size_t size);

/* guard_image.c: guard.so, as box-agent carries it. */
extern const char guard_image[], guard_image_end[];

#endif
