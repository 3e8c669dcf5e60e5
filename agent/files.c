/* File operations in the box (docs/agent-protocol.md, "Files"). Runs as the box's user inside the box's root. */
#include "agent.h"
#include "tar.h"

#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { OP_GET = 1, OP_PUT = 2, OP_STAT = 3, OP_LIST = 4, OP_ROOT = 5, OP_TUNNEL = 6 };
enum { EXIT_FAILED = 1, EXIT_MISSING = 2 };

static int fail(struct tar_error *error, const char *path) {
    int status = errno == ENOENT ? EXIT_MISSING : EXIT_FAILED;
    tar_error_member(error, path, strlen(path));
    tar_error_set(error, "%s", strerror(errno));
    return status;
}

/* The last component of a path as it was given; "." when it has none of its own. */
static void last_component(const char *path, char name[NAME_MAX + 1]) {
    size_t end = strlen(path);
    while (end && path[end - 1] == '/')
        end--;
    size_t start = end;
    while (start && path[start - 1] != '/')
        start--;
    if (end == start || end - start > NAME_MAX || (end - start == 2 && memcmp(path + start, "..", 2) == 0))
        memcpy(name, ".", 2);
    else {
        memcpy(name, path + start, end - start);
        name[end - start] = 0;
    }
}

static int get_as(const char *path, const struct tar_walk_options *options, struct tar_error *error) {
    char real[PATH_MAX], as[NAME_MAX + 1];
    struct stat info;
    last_component(path, as);
    if (!realpath(path, real) || lstat(real, &info) < 0)
        return fail(error, path);
    if (S_ISSOCK(info.st_mode)) {
        errno = EOPNOTSUPP;
        return fail(error, path);
    }
    char *slash = strrchr(real, '/');
    const char *name = slash[1] ? slash + 1 : ".";
    *slash = 0;
    int parent = open(real[0] ? real : "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (parent < 0)
        return fail(error, path);
    struct tar_writer *writer = tar_writer_new(STDOUT_FILENO, error);
    int result =
        writer ? tar_walk(writer, parent, name, as, options, error) : tar_fail(error, "out of memory");
    tar_writer_free(writer);
    close(parent);
    return result < 0 ? EXIT_FAILED : 0;
}

static int get(const char *path, struct tar_error *error) {
    static const struct tar_walk_options options = {.tolerate = true};
    return get_as(path, &options, error);
}

static int get_root(const char *path, struct tar_error *error) {
    static const struct tar_walk_options options = {.tolerate = true, .xattrs = true, .one_system = true};
    return get_as(path, &options, error);
}

static int put(const char *path, struct tar_error *error) {
    const struct tar_extract_options options = {
        .put = true, .keep_ids = geteuid() == 0, .max_bytes = INT64_MAX, .max_entries = INT64_MAX};
    struct tar_extract_result done;
    int input = STDIN_FILENO, root = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return fail(error, path);
    signal(SIGXFSZ, SIG_IGN); /* a limit on file sizes is an error like any other, and leaves nothing half-made */
    struct tar_reader *reader = tar_reader_new(tar_read_fd, &input, error);
    int result = reader ? tar_extract(reader, root, &options, &done, error) : tar_fail(error, "out of memory");
    if (result == 0)
        result = tar_drain(reader);
    tar_reader_free(reader);
    close(root);
    return result < 0 ? EXIT_FAILED : 0;
}

static char type_letter(mode_t mode) {
    switch (mode & S_IFMT) {
    case S_IFDIR:
        return 'd';
    case S_IFLNK:
        return 'l';
    case S_IFIFO:
        return 'p';
    case S_IFSOCK:
        return 's';
    case S_IFCHR:
        return 'c';
    case S_IFBLK:
        return 'b';
    default:
        return 'f';
    }
}

static long long nanoseconds(const struct timespec *time) {
    long long sum;
    if (__builtin_mul_overflow((long long)time->tv_sec, 1000000000LL, &sum) ||
        __builtin_add_overflow(sum, (long long)time->tv_nsec, &sum))
        return time->tv_sec < 0 ? LLONG_MIN : LLONG_MAX;
    return sum;
}

/* One record on stdout; -1 and errno when there is no such file. */
static int print_record(int parent, const char *name, const char *as) {
    struct stat info;
    char target[PATH_MAX];
    ssize_t length = 0;
    if (fstatat(parent, name, &info, AT_SYMLINK_NOFOLLOW) < 0)
        return -1;
    if (S_ISLNK(info.st_mode) && (length = readlinkat(parent, name, target, sizeof target)) < 0)
        return -1;
    printf("%c %o %u %u %lld %lld %s%c%.*s%c", type_letter(info.st_mode), info.st_mode & 07777, info.st_uid,
           info.st_gid, (long long)info.st_size, nanoseconds(&info.st_mtim), as, 0, (int)length, target, 0);
    return 0;
}

static int flush(struct tar_error *error, const char *path) {
    return fflush(stdout) == 0 && !ferror(stdout) ? 0 : fail(error, path);
}

static int list(const char *path, struct tar_error *error) {
    struct tar_names names;
    int status = 0;
    int directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int listed = directory < 0 ? -1 : fcntl(directory, F_DUPFD_CLOEXEC, 0);
    if (listed < 0 || tar_names_read(listed, &names) < 0) {
        status = fail(error, path);
    } else {
        for (size_t i = 0; i < names.count && status == 0; i++)
            if (print_record(directory, names.items[i], names.items[i]) < 0 && errno != ENOENT)
                status = fail(error, path);
        tar_names_free(&names);
    }
    if (directory >= 0)
        close(directory);
    return status ? status : flush(error, path);
}

static int stat_one(const char *path, struct tar_error *error) {
    char as[NAME_MAX + 1];
    last_component(path, as);
    return print_record(AT_FDCWD, path, as) < 0 ? fail(error, path) : flush(error, path);
}

int files_child(int op, const char *path) {
    static int (*const operations[])(const char *, struct tar_error *) = {
        [OP_GET] = get, [OP_PUT] = put, [OP_STAT] = stat_one, [OP_LIST] = list, [OP_ROOT] = get_root};
    struct tar_error error = {0};
    if (op == OP_TUNNEL)
        return tunnel_child(path);
    if (op < OP_GET || op > OP_ROOT) {
        fprintf(stderr, "unknown file operation %d\n", op);
        return EXIT_FAILED;
    }
    int status = operations[op](path, &error);
    if (status)
        tar_error_print(&error);
    return status;
}
