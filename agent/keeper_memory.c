/* The memory of a template, for an emulator that must not be able to write it.
 *
 * QEMU opens the file of a private (copy-on-write) memory for writing although it never writes to it. A file that it cannot write it
 * refuses, and one that it can write it could spoil for all other boxes, once a guest has broken out into it. So its open(2) is answered
 * by the keeper with a read-only descriptor, which is enough for a private mapping.
 *
 * Memory that the guest has freed QEMU gives back in two steps: a hole in the file, and then what is mapped. The first it must not do,
 * and without it it would not go on; so it is told that it has been done. The guest then finds there what the template has. */
#define _GNU_SOURCE
#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Above all that the emulator opens itself. */
enum { MEMORY_FD = 400 };

/* QEMU's other opens are read-only or close-on-exec: they are not even asked about. */
int memory_filter(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 9),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fallocate, 4, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat, 0, 6),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, O_RDWR, 0, 4),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MEMORY_FD, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO), /* 0: done */
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
}

void memory_answer(int notify_fd, int memory_fd)
{
    struct seccomp_notif request;
    char path[sizeof MEMORY_PATH] = "";
    memset(&request, 0, sizeof request);
    if (ioctl(notify_fd, SECCOMP_IOCTL_NOTIF_RECV, &request) < 0)
        return;
    struct iovec to = {path, sizeof path}, from = {(void *)(uintptr_t)request.data.args[1], sizeof path};
    ssize_t size = process_vm_readv((pid_t)request.pid, &to, 1, &from, 1, 0);
    if (size == sizeof path && memcmp(path, MEMORY_PATH, sizeof path) == 0) {
        struct seccomp_notif_addfd answer = {.id = request.id, .flags = SECCOMP_ADDFD_FLAG_SEND | SECCOMP_ADDFD_FLAG_SETFD,
                                             .srcfd = (uint32_t)memory_fd, .newfd = MEMORY_FD, .newfd_flags = O_CLOEXEC};
        ioctl(notify_fd, SECCOMP_IOCTL_NOTIF_ADDFD, &answer);
        return;
    }
    struct seccomp_notif_resp go_on = {.id = request.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
    ioctl(notify_fd, SECCOMP_IOCTL_NOTIF_SEND, &go_on);
}
