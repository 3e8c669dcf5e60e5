/* The forked child on its way to the command. */
#ifndef HUTCH_CHILD_H
#define HUTCH_CHILD_H

#include <stdbool.h>
#include <stdint.h>

#include "proto.h"

/* What a child that cannot start writes to its report pipe; one that starts closes the pipe without a word. */
struct child_report {
    uint16_t code; /* enum failure */
    uint16_t error; /* errno, 0 = none */
    char message[500];
};

struct child_plan {
    struct start_request *request;
    int in, out, err; /* all > 2; `in` == `null` when the command has no stdin of its own */
    int null;
    bool tty; /* `in` is the slave of the command's own terminal */
    int report;
};

_Noreturn void child_run(const struct child_plan *plan);

#endif
