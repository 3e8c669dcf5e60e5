/* The system call filter: the lists of seccomp_rules.h as a balanced decision tree of classic BPF (about seven comparisons a call;
 * the kernel caches the calls that are allowed whatever their arguments). The lists need no order: the tree is built from a table. */
#define _GNU_SOURCE
#include "launch.h"
#include "seccomp_rules.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef __x86_64__
#error "the system call lists are those of x86-64"
#endif

enum { NUMBERS = 512, PROGRAM_MAX = 1024 };
enum action { NO_SUCH_CALL, ALLOW, REFUSE, CLONE, SOCKET, SOCKETPAIR, IOCTL, PERSONALITY, SETRLIMIT, PRLIMIT };

#define NAMESPACE_FLAGS (CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)
#define LOW_HALF(argument) ((unsigned)offsetof(struct seccomp_data, args[argument])) /* little-endian */
#define FAIL(error) (SECCOMP_RET_ERRNO | (error))

struct program {
    struct sock_filter code[PROGRAM_MAX];
    unsigned length;
    bool overflow;
};

static void emit(struct program *program, unsigned short code, unsigned k, unsigned yes, unsigned no)
{
    if (program->length == PROGRAM_MAX || yes > 255 || no > 255) {
        program->overflow = true;
        return;
    }
    program->code[program->length++] = (struct sock_filter){code, (unsigned char)yes, (unsigned char)no, k};
}

static void load(struct program *program, unsigned offset)
{
    emit(program, BPF_LD | BPF_W | BPF_ABS, offset, 0, 0);
}

static void answer(struct program *program, unsigned verdict)
{
    emit(program, BPF_RET | BPF_K, verdict, 0, 0);
}

/* If the loaded value equals `value`, answer. */
static void answer_if(struct program *program, unsigned value, unsigned verdict)
{
    emit(program, BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1);
    answer(program, verdict);
}

/* A new process may be made, a new namespace may not. (clone3 hides its flags from filters: ENOSYS makes libraries use clone.) */
static void check_clone(struct program *program)
{
    load(program, LOW_HALF(0));
    emit(program, BPF_JMP | BPF_JSET | BPF_K, NAMESPACE_FLAGS, 0, 1);
    answer(program, FAIL(EPERM));
    answer(program, SECCOMP_RET_ALLOW);
}

/* Unix sockets, IPv4 and IPv6 with the everyday protocols (others would load kernel modules), and of netlink only routing. */
static void check_socket(struct program *program)
{
    static const unsigned char protocols[] = {0, 6, 17, 1, 58}; /* default, TCP, UDP, ICMP, ICMPv6 */
    const unsigned mptcp = 262;

    load(program, LOW_HALF(0));
    answer_if(program, AF_UNIX, SECCOMP_RET_ALLOW);
    emit(program, BPF_JMP | BPF_JEQ | BPF_K, AF_NETLINK, 0, 4);
    load(program, LOW_HALF(2));
    answer_if(program, 0, SECCOMP_RET_ALLOW);
    answer(program, FAIL(EPROTONOSUPPORT));
    emit(program, BPF_JMP | BPF_JEQ | BPF_K, AF_INET, 2, 0);
    emit(program, BPF_JMP | BPF_JEQ | BPF_K, AF_INET6, 1, 0);
    answer(program, FAIL(EAFNOSUPPORT));
    load(program, LOW_HALF(1));
    emit(program, BPF_ALU | BPF_AND | BPF_K, 0xf, 0, 0);
    answer_if(program, SOCK_RAW, SECCOMP_RET_ALLOW);
    /* The others need no protocol to be special: SOCK_PACKET of IPv4 makes a packet socket, SOCK_DCCP loads a module. */
    emit(program, BPF_JMP | BPF_JEQ | BPF_K, SOCK_STREAM, 2, 0);
    emit(program, BPF_JMP | BPF_JEQ | BPF_K, SOCK_DGRAM, 1, 0);
    answer(program, FAIL(EPROTONOSUPPORT));
    load(program, LOW_HALF(2));
    for (size_t i = 0; i < sizeof protocols; i++)
        answer_if(program, protocols[i], SECCOMP_RET_ALLOW);
    answer_if(program, mptcp, SECCOMP_RET_ALLOW);
    answer(program, FAIL(EPROTONOSUPPORT));
}

static void check_socketpair(struct program *program)
{
    load(program, LOW_HALF(0));
    answer_if(program, AF_UNIX, SECCOMP_RET_ALLOW);
    answer(program, FAIL(EAFNOSUPPORT));
}

/* No typing into a terminal, no console selection, no line disciplines (they load modules). */
static void check_ioctl(struct program *program)
{
    const unsigned tioclinux = 0x541c;

    load(program, LOW_HALF(1));
    answer_if(program, TIOCSTI, FAIL(EPERM));
    answer_if(program, tioclinux, FAIL(EPERM));
    answer_if(program, TIOCSETD, FAIL(EPERM));
    answer(program, SECCOMP_RET_ALLOW);
}

/* Only plain Linux, its 32-bit address and name variants, and the query. */
static void check_personality(struct program *program)
{
    static const unsigned values[] = {0, 0x8, 0x20000, 0x20008, 0xffffffff};

    load(program, LOW_HALF(0));
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        answer_if(program, values[i], SECCOMP_RET_ALLOW);
    answer(program, FAIL(EPERM));
}

/* The limit on core dumps is 1 byte, the one value that also keeps the kernel from piping a dump into a program of the host (core(5));
 * a change of it has no effect. It does not fail either, because programs give up when they cannot switch their dumps off. */
static void check_setrlimit(struct program *program)
{
    load(program, LOW_HALF(0));
    answer_if(program, RLIMIT_CORE, FAIL(0));
    answer(program, SECCOMP_RET_ALLOW);
}

static void check_prlimit(struct program *program)
{
    load(program, LOW_HALF(1));
    emit(program, BPF_JMP | BPF_JEQ | BPF_K, RLIMIT_CORE, 0, 5);
    load(program, LOW_HALF(2)); /* the new limit; a null pointer only asks */
    emit(program, BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 2);
    load(program, LOW_HALF(2) + 4);
    emit(program, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0);
    answer(program, FAIL(0));
    answer(program, SECCOMP_RET_ALLOW);
}

static void emit_action(struct program *program, enum action action)
{
    switch (action) {
    case ALLOW: answer(program, SECCOMP_RET_ALLOW); break;
    case REFUSE: answer(program, FAIL(EPERM)); break;
    case CLONE: check_clone(program); break;
    case SOCKET: check_socket(program); break;
    case SOCKETPAIR: check_socketpair(program); break;
    case IOCTL: check_ioctl(program); break;
    case PERSONALITY: check_personality(program); break;
    case SETRLIMIT: check_setrlimit(program); break;
    case PRLIMIT: check_prlimit(program); break;
    default: answer(program, FAIL(ENOSYS));
    }
}

/* The numbers from starts[low] up to starts[high] (exclusive), each start beginning a run of one action. */
static void emit_tree(struct program *program, const unsigned *starts, const unsigned char *actions, unsigned low, unsigned high)
{
    unsigned middle = (low + high) / 2;
    unsigned branch = program->length;

    if (high - low == 1) {
        emit_action(program, actions[starts[low]]);
        return;
    }
    emit(program, BPF_JMP | BPF_JGE | BPF_K, starts[middle], 0, 0);
    emit_tree(program, starts, actions, low, middle);
    unsigned distance = program->length - branch - 1;
    if (distance > 255)
        program->overflow = true;
    else
        program->code[branch].jt = (unsigned char)distance;
    emit_tree(program, starts, actions, middle, high);
}

static void fill_actions(unsigned char actions[static NUMBERS])
{
    memset(actions, NO_SUCH_CALL, NUMBERS);
    for (size_t i = 0; i < sizeof seccomp_allowed / sizeof *seccomp_allowed; i++)
        actions[seccomp_allowed[i]] = ALLOW;
    for (size_t i = 0; i < sizeof seccomp_denied / sizeof *seccomp_denied; i++)
        actions[seccomp_denied[i]] = REFUSE;
    actions[__NR_clone] = CLONE;
    actions[__NR_socket] = SOCKET;
    actions[__NR_socketpair] = SOCKETPAIR;
    actions[__NR_ioctl] = IOCTL;
    actions[__NR_personality] = PERSONALITY;
    actions[__NR_setrlimit] = SETRLIMIT;
    actions[__NR_prlimit64] = PRLIMIT;
}

int seccomp_install(void)
{
    static struct program program;
    unsigned char actions[NUMBERS];
    unsigned starts[NUMBERS];
    unsigned runs = 0;

    fill_actions(actions);
    for (unsigned number = 0; number < NUMBERS; number++)
        if (number == 0 || actions[number] != actions[number - 1])
            starts[runs++] = number;

    program.length = 0;
    load(&program, offsetof(struct seccomp_data, arch));
    emit(&program, BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
    answer(&program, SECCOMP_RET_KILL_PROCESS); /* 32-bit calls: other numbers, another attack surface */
    load(&program, offsetof(struct seccomp_data, nr));
    emit(&program, BPF_JMP | BPF_JGE | BPF_K, NUMBERS, 0, 1); /* x32 calls as well */
    answer(&program, FAIL(ENOSYS));
    emit_tree(&program, starts, actions, 0, runs);
    if (program.overflow) {
        errno = E2BIG;
        return -1;
    }
    struct sock_fprog filter = {(unsigned short)program.length, program.code};
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter);
}
