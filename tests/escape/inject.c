/* `inject PID CALL [ARGUMENT...]`: let another process make a system call, as if it had been taken over: with its rights, its root, its
 * filters. Arguments are numbers, `@TEXT` (the address of a text) or `=HEX` (of bytes). Prints what the call returned, or `killed` when it
 * was the end of the process or of its main thread. Otherwise the process goes on where it was. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BELOW_THE_STACK = 4096, ROOM = 512, PATIENCE = 2000, CALL_PATIENCE = 15000 };

static void need(int condition, const char *what)
{
    if (condition)
        return;
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(2);
}

/* Stop it where it is in a system call, so that there is an instruction for one. */
static void stop_in_call(pid_t pid, struct user_regs_struct *registers)
{
    int status;

    for (int i = 0; i < PATIENCE; i++) {
        need(ptrace(PTRACE_ATTACH, pid, NULL, NULL) == 0, "attaching");
        need(waitpid(pid, &status, __WALL) == pid && WIFSTOPPED(status), "waiting");
        need(ptrace(PTRACE_GETREGS, pid, NULL, registers) == 0, "reading registers");
        if ((ptrace(PTRACE_PEEKTEXT, pid, registers->rip - 2, NULL) & 0xffff) == 0x050f)
            return;
        ptrace(PTRACE_DETACH, pid, NULL, NULL);
        usleep(1000);
    }
    need(0, "finding a system call");
}

static void put(pid_t pid, unsigned long address, const char *bytes, size_t size)
{
    for (size_t at = 0; at < size; at += sizeof(long)) {
        long word;
        memcpy(&word, bytes + at, sizeof word);
        need(ptrace(PTRACE_POKEDATA, pid, address + at, word) == 0, "writing memory");
    }
}

static unsigned long argument(pid_t pid, unsigned long *room, const char *text)
{
    char bytes[ROOM] = {0};
    unsigned value;
    int used;
    size_t size = 0;

    if (*text != '@' && *text != '=')
        return strtoul(text, NULL, 0);
    if (*text == '@')
        size = (size_t)snprintf(bytes, sizeof bytes - 8, "%s", text + 1) + 1;
    else
        for (text++; size < sizeof bytes && sscanf(text, "%2x%n", &value, &used) == 1; text += used)
            bytes[size++] = (char)value;
    *room -= ROOM;
    put(pid, *room, bytes, (size + 7) & ~7ul);
    return *room;
}

/* Whether it comes back from the call. A main thread that dies before the others gives no event. */
static int came_back(pid_t pid)
{
    char path[32], line[256], *state;
    int status;

    for (int i = 0; i < CALL_PATIENCE; i++) {
        pid_t found = waitpid(pid, &status, __WALL | WNOHANG);
        need(found >= 0, "waiting for the call");
        if (found == pid)
            return WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP;
        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        FILE *file = fopen(path, "r");
        if (!file || !fgets(line, sizeof line, file) || ((state = strrchr(line, ')')) && state[2] == 'Z'))
            return 0;
        fclose(file);
        usleep(1000);
    }
    need(0, "waiting for the end of the call");
    return 0;
}

int main(int argc, char **argv)
{
    struct user_regs_struct before, call;
    unsigned long values[6] = {0}, room;

    need(argc >= 3 && argc <= 9, "usage");
    pid_t pid = atoi(argv[1]);
    stop_in_call(pid, &before);
    room = (before.rsp - BELOW_THE_STACK) & ~15ul;
    for (int i = 3; i < argc; i++)
        values[i - 3] = argument(pid, &room, argv[i]);
    call = before;
    call.rip -= 2;
    call.rax = strtoul(argv[2], NULL, 0);
    call.orig_rax = ~0ul; /* so that nothing is restarted on the way */
    call.rdi = values[0], call.rsi = values[1], call.rdx = values[2], call.r10 = values[3], call.r8 = values[4], call.r9 = values[5];
    need(ptrace(PTRACE_SETREGS, pid, NULL, &call) == 0, "setting registers");
    need(ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) == 0, "going one step");
    if (!came_back(pid)) {
        puts("killed");
        return 0;
    }
    need(ptrace(PTRACE_GETREGS, pid, NULL, &call) == 0, "reading the result");
    printf("%ld\n", (long)call.rax);
    need(ptrace(PTRACE_SETREGS, pid, NULL, &before) == 0 && ptrace(PTRACE_DETACH, pid, NULL, NULL) == 0, "letting it go on");
    return 0;
}
