/* The main command's log files and its exit record. */
#ifndef HUTCH_MAINLOG_H
#define HUTCH_MAINLOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Takes the descriptors; -1 where there is none. Clears an exit record of an earlier run. */
void mainlog_open(const int log_fd[2], int exit_fd);

/* Append the first `size` bytes of the pieces. A record that cannot be written whole is left out: the log is cut, never garbled. */
void mainlog_write(uint8_t stream, uint64_t position, const struct iovec *place, int pieces, size_t size);

/* Write the exit record, once. */
void mainlog_exit(int32_t status, bool timed_out, uint64_t unix_ns);

/* In a VM the files are the host's: hand everything over instead. */
typedef void mainlog_write_to(uint8_t stream, uint64_t position, const struct iovec *place, int pieces, size_t size);
typedef void mainlog_exit_to(int32_t status, bool timed_out, uint64_t unix_ns);
void mainlog_forward(mainlog_write_to *write, mainlog_exit_to *exit);

uint64_t unix_now_ns(void);

#endif
