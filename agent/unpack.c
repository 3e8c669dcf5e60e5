/* `box-agent unpack`: the boundary between a hostile archive and the host's files. It locks itself into the destination
 * before it reads the first byte. */
#include "agent.h"
#include "tar.h"

#include <fcntl.h>
#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PIPE_SIZE = 1 << 20, FIRST_OTHER_FD = 3 };

/* From linux/capability.h, which musl's headers do not have. */
struct cap_header {
    uint32_t version;
    int pid;
};
struct cap_data {
    uint32_t effective, permitted, inheritable;
};
enum {
    CAP_V3 = 0x20080522,
    CAP_CHOWN = 0,
    CAP_DAC_OVERRIDE = 1,
    CAP_FOWNER = 3,
    CAP_FSETID = 4,
    CAP_SYS_CHROOT = 18,
    CAP_SYS_ADMIN = 21,
    CAP_MKNOD = 27,
    CAP_SETFCAP = 31,
};

static int get_caps(struct cap_data data[2]) {
    struct cap_header header = {CAP_V3, 0};
    return (int)syscall(SYS_capget, &header, data);
}

static int write_text(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t wrote = write(fd, text, strlen(text));
    return close(fd) < 0 || wrote < 0 ? -1 : 0;
}

/* Without the right to chroot: become root of a user namespace that has this one user only. */
static int enter_user_namespace(struct tar_error *error) {
    char line[64];
    uid_t uid = geteuid();
    gid_t gid = getegid();
    if (unshare(CLONE_NEWUSER) < 0)
        return tar_fail(error, "cannot lock myself into the destination: not root, and no user namespace (%s)",
                        strerror(errno));
    snprintf(line, sizeof line, "0 %u 1\n", uid);
    if (write_text("/proc/self/uid_map", line) < 0 || write_text("/proc/self/setgroups", "deny") < 0)
        return tar_fail_errno(error, "cannot map the user");
    snprintf(line, sizeof line, "0 %u 1\n", gid);
    if (write_text("/proc/self/gid_map", line) < 0)
        return tar_fail_errno(error, "cannot map the group");
    return 0;
}

/* Keep what making files needs and nothing else. */
static int drop_rights(bool trusted_xattrs, struct tar_error *error) {
    struct cap_header header = {CAP_V3, 0};
    struct cap_data data[2];
    uint32_t keep = 1u << CAP_CHOWN | 1u << CAP_DAC_OVERRIDE | 1u << CAP_FOWNER | 1u << CAP_FSETID | 1u << CAP_MKNOD |
                    1u << CAP_SETFCAP | (trusted_xattrs ? 1u << CAP_SYS_ADMIN : 0);
    if (get_caps(data) < 0)
        return tar_fail_errno(error, "cannot read my capabilities");
    data[0].permitted &= keep;
    data[0].effective = data[0].permitted;
    data[1] = (struct cap_data){0};
    data[0].inheritable = 0;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || syscall(SYS_capset, &header, data) < 0)
        return tar_fail_errno(error, "cannot drop capabilities");
    return 0;
}

static int lock_in(const char *destination, const struct tar_extract_options *options, struct tar_error *error) {
    struct cap_data data[2];
    syscall(SYS_close_range, FIRST_OTHER_FD, ~0u, 0);
    int root = open(destination, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return tar_fail(error, "cannot open the destination %.100s: %s", destination, strerror(errno));
    if (get_caps(data) < 0)
        return tar_fail_errno(error, "cannot read my capabilities");
    if (!(data[0].effective & 1u << CAP_SYS_CHROOT) && enter_user_namespace(error) < 0)
        return -1;
    unshare(CLONE_NEWNS); /* a second wall; the first is the root directory */
    if (fchdir(root) < 0 || chroot(".") < 0)
        return tar_fail_errno(error, "cannot lock myself into the destination");
    if (drop_rights(options->layer && !options->userxattr, error) < 0)
        return -1;
    return root;
}

static int parse_number(const char *text, uint64_t *value) {
    return tar_decimal(text, strlen(text), value);
}

int cmd_unpack(int argc, char **argv) {
    enum { DEST = 1, LAYER, USERXATTR, SINGLE_ID, MAX_BYTES, MAX_ENTRIES };
    static const struct option known[] = {
        {"dest", required_argument, NULL, DEST},
        {"layer", no_argument, NULL, LAYER},
        {"userxattr", no_argument, NULL, USERXATTR},
        {"single-id", no_argument, NULL, SINGLE_ID},
        {"max-bytes", required_argument, NULL, MAX_BYTES},
        {"max-entries", required_argument, NULL, MAX_ENTRIES},
        {0},
    };
    struct tar_extract_options options = {.keep_ids = true, .max_bytes = INT64_MAX, .max_entries = INT64_MAX};
    struct tar_extract_result result;
    struct tar_error error = {0};
    const char *destination = NULL;
    bool usable = true;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case DEST:
            destination = optarg;
            break;
        case LAYER:
            options.layer = true;
            break;
        case USERXATTR:
            options.userxattr = true;
            break;
        case SINGLE_ID:
            options.keep_ids = false;
            break;
        case MAX_BYTES:
            usable &= parse_number(optarg, &options.max_bytes) == 0;
            break;
        case MAX_ENTRIES:
            usable &= parse_number(optarg, &options.max_entries) == 0;
            break;
        default:
            usable = false;
        }
    }
    if (!usable || !destination || optind != argc) {
        fprintf(stderr, "usage: box-agent unpack --dest DIR [--layer] [--userxattr] [--single-id] [--max-bytes N] "
                        "[--max-entries N]\n");
        return 2;
    }
    int input = STDIN_FILENO;
    fcntl(input, F_SETPIPE_SZ, PIPE_SIZE); /* fewer, larger reads; no harm where it is no pipe */
    int root = lock_in(destination, &options, &error);
    struct tar_reader *reader = root < 0 ? NULL : tar_reader_new(tar_read_fd, &input, &error);
    int status = root < 0 ? -1 : reader ? 0 : tar_fail(&error, "out of memory");
    if (status == 0)
        status = tar_extract(reader, root, &options, &result, &error);
    if (status == 0)
        status = tar_drain(reader);
    tar_reader_free(reader);
    if (status < 0) {
        tar_error_print(&error);
        return 1;
    }
    printf("entries=%llu bytes=%llu\n", (unsigned long long)result.entries, (unsigned long long)result.bytes);
    return fflush(stdout) == 0 ? 0 : 1;
}
