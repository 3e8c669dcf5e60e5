/* Holding a VM still for its fork: from the answer to HOLD on, nothing runs in it and nothing is under way on its line. */
#ifndef HUTCH_HOLD_H
#define HUTCH_HOLD_H

#include "conn.h"

/* guest.c: what the host says of a box, at its first start and in a fork of it. */
void guest_become(char *records, size_t length);

/* Before the box has a root of its own: what it may hide later. */
void hold_prepare(void);

/* The request HOLD. The answer comes when the keeper holds its end of the line. */
void hold_ask(struct conn *conn, const struct frame *frame);

/* The keeper does. Returns when the box goes on, or in the fork that it has become, whose processes wait for hold_end: its network is
 * yet to come. */
void hold(void);
void hold_end(void);

#endif
