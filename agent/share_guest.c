/* A thread of PID 1, so that nobody in the box ends it, and so that PID 1 itself may wait for what it carries (sync(2) does). */
#define _GNU_SOURCE
#include "share.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include <linux/fuse.h>

static int kernel_fd, port_fd;
static uint8_t request[SHARE_MESSAGE_MAX], answer[SHARE_MESSAGE_MAX];
static size_t request_size, request_sent, answer_size;

static void take_request(void)
{
    ssize_t size = read(kernel_fd, request, sizeof request);
    request_size = size < 0 ? 0 : (size_t)size;
    request_sent = 0;
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

/* false: the other end has closed, or says what is no answer. */
static bool take_answers(void)
{
    for (;;) {
        const struct fuse_out_header *head = (void *)answer;
        size_t wanted = answer_size < sizeof *head ? sizeof *head : head->len;
        if (wanted < sizeof *head || wanted > sizeof answer)
            return false;
        if (answer_size == wanted) {
            ssize_t taken = write(kernel_fd, answer, answer_size); /* ENOENT: who asked has been interrupted */
            answer_size = 0;
            if (taken < 0 && errno == ENODEV)
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
    struct pollfd from[2] = {{.fd = port_fd}, {.fd = kernel_fd}};
    (void)unused;
    do {
        from[0].events = (short)(POLLIN | (request_size ? POLLOUT : 0));
        from[1].events = request_size ? 0 : POLLIN;
        poll(from, 2, -1);
        if (!request_size && (from[1].revents & POLLIN))
            take_request();
        send_request();
    } while (!((from[0].revents & POLLHUP) || (from[1].revents & POLLERR)) && take_answers());
    close(kernel_fd); /* what is asked from now on fails */
    close(port_fd);
    return NULL;
}

void share_mount(const char *point, int port)
{
    char options[96];
    sigset_t all, before;
    pthread_t thread;

    port_fd = port;
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
