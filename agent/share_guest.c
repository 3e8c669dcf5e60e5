/* A thread of PID 1, so that nobody in the box ends it, and so that PID 1 itself may wait for what it carries (sync(2) does). */
#define _GNU_SOURCE
#include "share.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/fuse.h>

enum { OWN = 1 /* a number that the kernel gives to no request */, HOLD_MS = 2000, TELL_MS = 20000 };

/* What the carrier does. Before a fork it takes no more requests, waits until all are answered, and asks what the server knows; its next
 * question is answered behind all that was said before, so that then nothing is under way. */
static enum { CARRYING, EMPTYING, ASKING, HOLDING, TELLING } stage;

enum order { HOLD, GO_ON, GO_ON_ELSEWHERE };

struct word {
    enum order order;
    unsigned turn;
    bool done;
};

struct piece {
    struct piece *next;
    size_t size;
    uint8_t bytes[];
};

static int kernel_fd, port_fd, orders = -1, commander = -1;
static uint8_t request[SHARE_MESSAGE_MAX], answer[SHARE_MESSAGE_MAX];
static size_t request_size, request_sent, answer_size;
static unsigned unanswered, turn;
static struct piece *known, **known_end = &known, *telling;
static struct word ordered;

static void take_request(void)
{
    const struct fuse_in_header *head = (void *)request;
    ssize_t size = read(kernel_fd, request, sizeof request);
    request_size = size < 0 ? 0 : (size_t)size;
    request_sent = 0;
    if (size > 0 && head->opcode != FUSE_FORGET && head->opcode != FUSE_BATCH_FORGET && head->opcode != FUSE_INTERRUPT)
        unanswered++;
}

static void send_request(void)
{
    while (request_sent < request_size) {
        ssize_t sent = write(port_fd, request + request_sent, request_size - request_sent);
        if (sent <= 0)
            return;
        request_sent += (size_t)sent;
    }
    request_size = 0;
}

static void say(uint32_t opcode, const void *bytes, size_t size)
{
    *(struct fuse_in_header *)(void *)request = (struct fuse_in_header){
        .len = (uint32_t)(sizeof(struct fuse_in_header) + size), .opcode = opcode, .unique = OWN};
    memcpy(request + sizeof(struct fuse_in_header), bytes, size);
    request_size = sizeof(struct fuse_in_header) + size;
    request_sent = 0;
}

static void forget_known(void)
{
    while (known) {
        struct piece *next = known->next;
        free(known);
        known = next;
    }
    known_end = &known;
}

static void report_done(bool done)
{
    ordered.done = done;
    send(orders, &ordered, sizeof ordered, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void carry_on(void)
{
    forget_known();
    stage = CARRYING;
}

static void tell_next(void)
{
    if (telling) {
        say(SHARE_RESTORE, telling->bytes, telling->size);
        telling = telling->next;
    } else {
        carry_on();
        report_done(true);
    }
}

static bool keep(const uint8_t *items, size_t size)
{
    struct piece *piece = malloc(sizeof *piece + size);
    if (!piece)
        return false;
    piece->next = NULL;
    piece->size = size;
    memcpy(piece->bytes, items, size);
    *known_end = piece;
    known_end = &piece->next;
    return true;
}

static void take_known(const struct fuse_out_header *head, size_t size)
{
    const struct share_saved *saved = (const void *)(head + 1);
    if (ordered.order != HOLD) { /* it took too long, and nobody waits any more */
        carry_on();
    } else if (head->error || size < sizeof *saved || size > SHARE_IO_MAX /* it must fit into a request */
               || (size > sizeof *saved && !keep((const uint8_t *)(saved + 1), size - sizeof *saved))) {
        carry_on();
        report_done(false);
    } else if (size > sizeof *saved) {
        say(SHARE_SAVE, &saved->next, sizeof saved->next);
    } else {
        stage = HOLDING;
        report_done(true);
    }
}

/* false: the other end says what is no answer. */
static bool take_own_answer(const struct fuse_out_header *head)
{
    if (stage == ASKING) {
        take_known(head, head->len - sizeof *head);
        return true;
    }
    if (stage != TELLING || head->error)
        return false;
    tell_next();
    return true;
}

static void take_order(void)
{
    if (recv(orders, &ordered, sizeof ordered, MSG_DONTWAIT) != sizeof ordered)
        return;
    if (ordered.order == HOLD && stage == CARRYING) {
        stage = EMPTYING;
    } else if (ordered.order == GO_ON && stage != ASKING) {
        carry_on();
    } else if (ordered.order == GO_ON_ELSEWHERE && stage == HOLDING) {
        stage = TELLING;
        telling = known;
        tell_next();
    }
}

static void ask_when_empty(void)
{
    const uint64_t first = 0;
    if (stage != EMPTYING || unanswered || request_size)
        return;
    stage = ASKING;
    say(SHARE_SAVE, &first, sizeof first);
}

static bool pass(const struct fuse_out_header *head)
{
    if (head->unique == OWN)
        return take_own_answer(head);
    unanswered -= unanswered > 0;
    return write(kernel_fd, answer, answer_size) >= 0 || errno != ENODEV; /* ENOENT: who asked has been interrupted */
}

/* false: the other end has closed, or says what is no answer. */
static bool take_answers(void)
{
    for (;;) {
        const struct fuse_out_header *head = (void *)answer;
        size_t wanted = answer_size < sizeof *head ? sizeof *head : head->len;
        if (wanted < sizeof *head || wanted > sizeof answer)
            return false;
        if (answer_size == wanted) {
            bool passed = pass(head);
            answer_size = 0;
            if (!passed)
                return false;
            continue;
        }
        ssize_t size = read(port_fd, answer + answer_size, wanted - answer_size);
        if (size <= 0)
            return size < 0 && (errno == EAGAIN || errno == EINTR);
        answer_size += (size_t)size;
    }
}

static void *carry(void *unused)
{
    struct pollfd from[3] = {{.fd = port_fd}, {.fd = kernel_fd}, {.fd = orders, .events = POLLIN}};
    (void)unused;
    do {
        from[0].events = (short)(POLLIN | (request_size ? POLLOUT : 0));
        from[1].events = request_size || stage != CARRYING ? 0 : POLLIN;
        poll(from, 3, -1);
        if (from[2].revents & POLLIN)
            take_order();
        if (!request_size && stage == CARRYING && (from[1].revents & POLLIN))
            take_request();
        ask_when_empty();
        send_request();
    } while (!((from[0].revents & POLLHUP) || (from[1].revents & POLLERR)) && take_answers());
    close(kernel_fd); /* what is asked from now on fails */
    close(port_fd);
    close(orders);
    return NULL;
}

/* Have the carrier do it; false when it says no, or nothing in time. One that has ended has nothing to say, and nothing to keep. */
static bool have_done(enum order order)
{
    struct word word = {.order = order, .turn = ++turn}, reply;
    struct pollfd from = {.fd = commander, .events = POLLIN};
    if (commander < 0 || send(commander, &word, sizeof word, MSG_NOSIGNAL) < 0 || order == GO_ON)
        return true;
    while (poll(&from, 1, order == HOLD ? HOLD_MS : TELL_MS) > 0) {
        ssize_t size = recv(commander, &reply, sizeof reply, MSG_DONTWAIT);
        if (size == 0)
            return order == HOLD;
        if (size == sizeof reply && reply.turn == word.turn)
            return reply.done;
    }
    return false;
}

bool share_hold(void) { return have_done(HOLD); }

bool share_go_on(bool other) { return have_done(other ? GO_ON_ELSEWHERE : GO_ON); }

void share_mount(const char *point, int port)
{
    char options[96];
    sigset_t all, before;
    pthread_t thread;
    int talk[2];

    port_fd = port;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, talk) < 0)
        launch_fail("making the channel of the mounts");
    commander = talk[0];
    orders = talk[1];
    kernel_fd = open("/dev/fuse", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (kernel_fd < 0)
        launch_fail("opening /dev/fuse for the mounts (the kernel needs the module fuse)");
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", kernel_fd);
    if (mount("hutch", point, "fuse", MS_NOSUID | MS_NODEV, options) < 0)
        launch_fail("mounting the host's folders");
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    errno = pthread_create(&thread, NULL, carry, NULL);
    if (errno)
        launch_fail("starting the carrier of the mounts");
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
