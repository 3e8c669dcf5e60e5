/* guard.so, which the emulator is started with (LD_PRELOAD): its calls of the one function that hands frames to libslirp come here.
 *
 * A loader that cannot take it only says so and goes on. So the emulator's line is in a place where it does not look for it, and the guard
 * moves it: an emulator without a guard ends at once, since what it finds there is no socket. */
#define _GNU_SOURCE
#include "guard.h"

#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>

typedef void input_function(void *stack, const uint8_t *frame, int size);

__attribute__((visibility("default"))) input_function slirp_input;

static input_function *next;

void slirp_input(void *stack, const uint8_t *frame, int size)
{
    size_t heard = size > 0 ? guard_admitted(frame, (size_t)size) : 0;
    if (heard)
        next(stack, frame, (int)heard);
}

__attribute__((constructor)) static void begin(void)
{
    next = (input_function *)dlsym(RTLD_NEXT, "slirp_input");
    if (!next || (input_function *)dlsym(RTLD_DEFAULT, "slirp_input") != slirp_input) {
        dprintf(STDERR_FILENO, "hutch: the network stack of this emulator is not libslirp in a shared library, and cannot be guarded\n");
        _exit(1);
    }
    if (dup2(GUARD_LINE, EMULATOR_LINE) < 0)
        _exit(1);
    close(GUARD_LINE);
}
