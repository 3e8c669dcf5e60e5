/* What tar_extract.c (making members) and tar_path.c (finding and clearing their places) share. */
#ifndef HUTCH_TAR_EXTRACT_H
#define HUTCH_TAR_EXTRACT_H

#include "tar.h"

struct tar_late {
    char *path;
    struct tar_member member;
};

struct tar_extract {
    struct tar_reader *reader;
    int root;
    const struct tar_extract_options *options;
    struct tar_extract_result *result;
    struct tar_error *error;
    uint64_t made; /* parents that the archive did not name */
    int parent;    /* the directory used last, or -1 */
    bool stale;    /* ... which may have lost its place */
    char parent_path[TAR_PATH_MAX + 1];
    char temporary[40];
    struct tar_late *late; /* directories whose attributes are set at the end */
    size_t late_count, late_room, late_bytes;
};

/* Open a path ("" is the root) below the root; -1 and errno. */
int tar_resolve(const struct tar_extract *x, const char *path, int flags);
/* The directory of a cleaned member name, made if need be; kept open by `x`. */
int tar_parent(struct tar_extract *x, const char *name);
/* Hand over `fd` as the directory `path`. */
void tar_keep_parent(struct tar_extract *x, const char *path, int fd);
/* Remove whatever is called `name`, with all that is in it. */
int tar_clear(struct tar_extract *x, int parent, const char *name);
bool tar_is_whiteout(const struct tar_extract *x, const struct stat *info);
/* Make overlayfs hide what lower layers have in this directory. */
int tar_set_opaque(struct tar_extract *x, int fd);

#endif
