/* The other end of a connection does not know of a fork. A program of the fork that only reads would wait for ever, so its sockets are
 * disconnected here, as if the peer had reset them. What is between processes of the box is whole, and stays. */
#include "cut.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "exec.h"

union address {
    struct sockaddr any;
    struct sockaddr_in four;
    struct sockaddr_in6 six;
};

static int processes = -1; /* what the kernel says of them */

void cut_prepare(void) { processes = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC); }

static bool same(const union address *a, const union address *b)
{
    return a->any.sa_family == AF_INET ? a->four.sin_addr.s_addr == b->four.sin_addr.s_addr
                                       : memcmp(&a->six.sin6_addr, &b->six.sin6_addr, sizeof a->six.sin6_addr) == 0;
}

static bool loopback(const union address *peer)
{
    const struct in6_addr *six = &peer->six.sin6_addr;
    if (peer->any.sa_family == AF_INET)
        return ntohl(peer->four.sin_addr.s_addr) >> 24 == 127;
    return IN6_IS_ADDR_LOOPBACK(six) || (IN6_IS_ADDR_V4MAPPED(six) && six->s6_addr[12] == 127);
}

/* Whether it is a stream that has a peer; `to_others`: one that is not in the box. */
static bool connected(int fd, bool to_others)
{
    union address peer, own;
    socklen_t peer_size = sizeof peer, own_size = sizeof own;
    int kind = 0;
    socklen_t kind_size = sizeof kind;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &kind_size) < 0 || kind != SOCK_STREAM
        || getpeername(fd, &peer.any, &peer_size) < 0 || getsockname(fd, &own.any, &own_size) < 0
        || (peer.any.sa_family != AF_INET && peer.any.sa_family != AF_INET6))
        return false;
    return !to_others || !(loopback(&peer) || same(&peer, &own));
}

static void cut_socket(int process, int number, bool all)
{
    const struct sockaddr nobody = {.sa_family = AF_UNSPEC};
    int fd = (int)syscall(SYS_pidfd_getfd, process, number, 0);
    if (fd < 0)
        return;
    if (connected(fd, !all))
        connect(fd, &nobody, sizeof nobody);
    close(fd);
}

static void cut_process(pid_t pid, bool all)
{
    char path[32], target[16];
    snprintf(path, sizeof path, "%d/fd", (int)pid);
    int process = (int)syscall(SYS_pidfd_open, pid, 0), fd = process < 0 ? -1 : openat(processes, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *files = fd < 0 ? NULL : fdopendir(fd);
    for (struct dirent *file; files && (file = readdir(files));)
        if (readlinkat(dirfd(files), file->d_name, target, sizeof target) > 7 && memcmp(target, "socket:", 7) == 0)
            cut_socket(process, atoi(file->d_name), all);
    if (files)
        closedir(files);
    if (process >= 0)
        close(process);
}

void cut(void)
{
    list_each(it, &exec_running) {
        const struct exec *exec = entry(it, struct exec, link);
        if (!exec->transfer || exec->state == EXEC_EXITED)
            continue;
        cut_process(exec->pid, true);
        kill(-exec->pid, SIGKILL);
    }
    int fd = processes < 0 ? -1 : openat(processes, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *all = fd < 0 ? NULL : fdopendir(fd);
    for (struct dirent *entry; all && (entry = readdir(all));)
        if (isdigit((unsigned char)entry->d_name[0]) && atoi(entry->d_name) > 1)
            cut_process(atoi(entry->d_name), false);
    if (all)
        closedir(all);
}
