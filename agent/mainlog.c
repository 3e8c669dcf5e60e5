#include "mainlog.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "proto.h"

enum { LOG_MAX = 8 << 20, RECORD_HEADER = 24 };

static int log_file[2] = {-1, -1};
static off_t log_size[2];
static int current;
static int exit_file = -1;
static mainlog_write_to *write_to;
static mainlog_exit_to *exit_to;

void mainlog_forward(mainlog_write_to *write, mainlog_exit_to *exit)
{
    write_to = write;
    exit_to = exit;
}

uint64_t unix_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void mainlog_open(const int log_fd[2], int exit_fd)
{
    struct stat status[2] = {0};
    for (int i = 0; i < 2; i++) {
        log_file[i] = log_fd[i];
        if (log_fd[i] >= 0 && fstat(log_fd[i], &status[i]) == 0)
            log_size[i] = status[i].st_size;
    }
    /* An earlier run ended in the file that was written last. */
    bool second_newer = status[1].st_mtim.tv_sec != status[0].st_mtim.tv_sec
                            ? status[1].st_mtim.tv_sec > status[0].st_mtim.tv_sec
                            : status[1].st_mtim.tv_nsec > status[0].st_mtim.tv_nsec;
    current = log_size[1] > 0 && second_newer;
    exit_file = exit_fd;
    if (exit_fd >= 0 && ftruncate(exit_fd, 0) < 0)
        errno = 0; /* a pipe */
}

void mainlog_write(uint8_t stream, uint64_t position, const struct iovec *place, int pieces, size_t size)
{
    if (write_to) {
        write_to(stream, position, place, pieces, size);
        return;
    }
    if (log_file[current] < 0)
        return;
    if (log_size[current] > LOG_MAX && log_file[!current] >= 0) {
        if (ftruncate(log_file[!current], 0) < 0)
            return;
        current = !current;
        log_size[current] = 0;
    }
    uint8_t header[RECORD_HEADER] = {0};
    uint8_t *p = put32(put64(put64(header, unix_now_ns()), position), (uint32_t)size);
    *p = stream;
    struct iovec record[3] = {{header, sizeof header}, place[0], {0}};
    if (record[1].iov_len > size)
        record[1].iov_len = size;
    if (pieces > 1)
        record[2] = (struct iovec){place[1].iov_base, size - record[1].iov_len};
    ssize_t written = writev(log_file[current], record, 3);
    if (written == (ssize_t)(sizeof header + size))
        log_size[current] += written;
    else if (written > 0 && ftruncate(log_file[current], log_size[current]) < 0)
        log_file[current] = -1; /* cannot be made whole again: no more of it */
}

void mainlog_exit(int32_t status, bool timed_out, uint64_t unix_ns)
{
    char record[80];
    if (exit_to) {
        exit_to(status, timed_out, unix_ns);
        return;
    }
    if (exit_file < 0)
        return;
    int size = snprintf(record, sizeof record, "exit %" PRId32 " %d %" PRIu64 "\n", status, timed_out, unix_ns);
    if (write(exit_file, record, (size_t)size) != size)
        errno = 0; /* a full disk: the host learns the end from the box's end */
    close(exit_file);
    exit_file = -1;
}
