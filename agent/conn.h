/* Host connections: frames in, queued frames out. */
#ifndef HUTCH_CONN_H
#define HUTCH_CONN_H

#include <sys/uio.h>

#include "loop.h"
#include "proto.h"

enum { CONN_MAX = 64 };

struct conn {
    struct link link;
    struct source source;
    uint8_t *in;
    size_t in_size, in_room;
    struct link out;      /* blocks that must go first, in order */
    size_t control;       /* bytes in `out` */
    struct link watchers; /* all watchers of this connection */
    struct link ready;    /* those with something to send */
    bool blocked;         /* the socket takes nothing now */
    bool closed;
    uint16_t number;      /* on a VM's line, where there is no socket; 0: not there */
    uint32_t credit;      /* bytes that the line's other end takes */
};

void conn_listen(int fd);

/* Connections over a VM's line (port.c). NULL: there is none, or no room for one. */
struct conn *conn_open(uint16_t number, uint32_t credit);
struct conn *conn_find(uint16_t number);
void conn_receive(struct conn *conn, const uint8_t *bytes, size_t size);
void conn_unblock(void);
void conn_lose_all(void); /* their other ends are gone, and so is who could be told */

void conn_close(struct conn *conn);

/* Frames of a few bytes. `id` may be NULL. */
void conn_send(struct conn *conn, uint8_t type, uint8_t stream, uint32_t req, const char *id, const void *payload,
               uint32_t size);
void conn_send_fd(struct conn *conn, uint8_t type, uint8_t stream, uint32_t req, const char *id, const void *payload,
                  uint32_t size, int fd); /* takes the descriptor */
void conn_reply(struct conn *conn, const struct frame *frame, uint8_t type, const void *payload, uint32_t size);
void conn_fail(struct conn *conn, uint32_t req, const char *id, uint16_t code, uint16_t error, const char *message);

/* A DATA frame: sent from where the bytes stand; only what the socket does not take is copied. Call only when `out` is empty or small. */
void conn_send_data(struct conn *conn, uint8_t stream, const char *id, uint64_t position, const struct iovec place[2],
                    int pieces);

/* Send what can be sent, on all connections. Once per turn. */
void conn_flush_all(void);
bool conn_all_sent(void);

/* request.c: act on one frame; false ends the connection. */
bool request_handle(struct conn *conn, const struct frame *frame);

#endif
