/* The agent's end of the line in a VM: a virtio-serial port. */
#ifndef HUTCH_PORT_H
#define HUTCH_PORT_H

#include <stdbool.h>
#include <sys/uio.h>

#include "conn.h"
#include "line.h"

/* Whether this agent serves a VM. */
bool port_used(void);

/* Take the port, before the loop runs. */
void port_open(int fd);

/* Serve the connections that come over the port from now on. */
void port_serve(void);

/* A frame of our own; waits for room: the keeper always reads. */
void port_tell(uint8_t type, uint16_t number, const void *payload, size_t size);

/* Read one frame while the loop does not run. The payload stands until the next call. */
void port_read(struct line_frame *frame);

/* Send bytes of a connection as sendmsg would: what was taken, or -1 with EAGAIN. */
ssize_t port_send(struct conn *conn, const struct iovec *part, int parts);

/* Have the loop turn once more as soon as the port has room: connections have more to send. */
void port_go_on(void);

/* The main command's log and end: for the host's files. */
void port_log(uint8_t stream, uint64_t position, const struct iovec *place, int pieces, size_t size);
void port_exit(int32_t status, bool timed_out, uint64_t unix_ns);

#endif
