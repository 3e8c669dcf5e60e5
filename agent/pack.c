/* `box-agent pack`: a directory as a deterministic archive. */
#include "agent.h"
#include "tar.h"

#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>

static int pack(const char *source, const struct tar_walk_options *options, struct tar_error *error) {
    int root = open(source, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return tar_fail(error, "cannot open the source %.100s: %s", source, strerror(errno));
    struct tar_writer *writer = tar_writer_new(STDOUT_FILENO, error);
    int result = writer ? tar_walk(writer, root, ".", ".", options, error) : tar_fail(error, "out of memory");
    tar_writer_free(writer);
    close(root);
    return result;
}

int cmd_pack(int argc, char **argv) {
    enum { SOURCE = 1, LAYER, USERXATTR, SHIFT };
    static const struct option known[] = {
        {"source", required_argument, NULL, SOURCE},
        {"layer", no_argument, NULL, LAYER},
        {"userxattr", no_argument, NULL, USERXATTR},
        {"shift", required_argument, NULL, SHIFT},
        {0},
    };
    struct tar_walk_options options = {.xattrs = true};
    struct tar_error error = {0};
    const char *source = NULL;
    uint64_t base = 0;
    bool usable = true;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case SOURCE:
            source = optarg;
            break;
        case LAYER:
            options.layer = true;
            break;
        case USERXATTR:
            options.userxattr = true;
            break;
        case SHIFT:
            options.shift = true;
            usable &= tar_decimal(optarg, strlen(optarg), &base) == 0 && base <= UINT32_MAX - UINT16_MAX;
            break;
        default:
            usable = false;
        }
    }
    if (!usable || !source || optind != argc) {
        fprintf(stderr, "usage: box-agent pack --source DIR [--layer] [--userxattr] [--shift BASE]\n");
        return 2;
    }
    options.base = (uint32_t)base;
    struct rlimit files; /* one descriptor for each level of directories */
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (pack(source, &options, &error) == 0)
        return 0;
    tar_error_print(&error);
    return 1;
}
