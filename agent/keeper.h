/* The keeper: the process on the host that owns one VM. It is PID 1 of the VM's process namespace, so its end is the machine's. */
#ifndef HUTCH_KEEPER_H
#define HUTCH_KEEPER_H

#include <sys/types.h>

struct keeper {
    int listen_fd;  /* hosts connect here */
    int log_fd[2];  /* main log */
    int exit_fd;    /* exit record */
    int console_fd; /* file for what the machine's console and its emulator say */
    int line_fd;    /* to the emulator's serial port */
    int output_fd;  /* what console and emulator say */
    int notify_fd;  /* seccomp notifications; -1: none */
    int memory_fd;  /* what the emulator gets when it opens MEMORY_PATH */
    pid_t emulator;
};

#define MEMORY_PATH "/memory"

/* Serve until the machine has ended. */
_Noreturn void keeper_run(const struct keeper *keeper);

/* keeper_memory.c: let this process's opens of MEMORY_PATH be answered by the keeper, and return the descriptor for that; -1 with errno. */
int memory_filter(void);

/* Answer one of them. */
void memory_answer(int notify_fd, int memory_fd);

#endif
