/* Tar archives (POSIX.1-2017 pax, ustar, GNU tar): a streaming reader, a writer, and what stands between them and a
 * directory. The reader and the names are pure: they touch no file, so they can be fuzzed from memory. */
#ifndef HUTCH_TAR_H
#define HUTCH_TAR_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>

enum {
    TAR_BLOCK = 512,
    TAR_PATH_MAX = 4096,         /* bytes in a member's name */
    TAR_COMPONENT_MAX = 255 + 4, /* a component, with room for the ".wh." of a whiteout; the kernel has the last word */
    TAR_EXTENSION_MAX = 1 << 20, /* bytes in a pax header or a GNU long name */
    TAR_XATTRS_MAX = 128,
    TAR_XATTR_VALUE_MAX = 65536, /* the kernel's XATTR_SIZE_MAX */
    TAR_EXTENTS_MAX = 1 << 20,   /* pieces of one sparse file */
};

/* ---- errors: who and why, for one line on stderr ---- */

struct tar_error {
    char member[204]; /* escaped, printable */
    char cause[200];
};

void tar_error_member(struct tar_error *error, const char *name, size_t length);
void tar_error_set(struct tar_error *error, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Set the cause, value -1 (a macro, so that the compiler sees it). */
#define tar_fail(...) (tar_error_set(__VA_ARGS__), -1)
/* Likewise, with the text of errno. */
#define tar_fail_errno(error, what) tar_fail(error, "%s: %s", what, strerror(errno))
void tar_error_print(const struct tar_error *error);

/* ---- names ---- */

/* Bring a member's name into its shortest form in place: no leading or doubled slashes, no "." components, no trailing
 * slash; "" is the root itself. -1 for "..", NUL, or too long. */
int tar_name_clean(char *name, size_t length, struct tar_error *error);

/* ---- pax records and numbers ---- */

struct tar_xattr {
    const char *name; /* NUL-terminated */
    const void *value;
    size_t size;
};

struct tar_extent {
    uint64_t offset, length;
};

/* A growing list of extents. */
struct tar_map {
    struct tar_extent *items;
    size_t count, room;
};

int tar_map_add(struct tar_map *map, uint64_t offset, uint64_t length, struct tar_error *error);

/* What an extended header says. Pointers lead into the buffer that was parsed; NULL and has_* false: not said. */
struct tar_pax {
    char *path, *linkpath, *sparse_name;
    size_t path_length, linkpath_length, sparse_name_length;
    bool has_size, has_mtime, has_uid, has_gid, has_real_size, sparse_v1, sparse_v0;
    uint64_t size, uid, gid, real_size;
    struct timespec mtime;
    struct tar_xattr xattrs[TAR_XATTRS_MAX];
    size_t n_xattrs;
    bool half_extent; /* sparse 0.0: an offset whose length has not come yet */
    uint64_t half_offset;
};

/* Parse the records in `text` (modified: NULs are put in); pieces of sparse formats 0.0 and 0.1 go to `map`. */
int tar_pax_parse(struct tar_pax *pax, char *text, size_t length, struct tar_map *map, struct tar_error *error);
/* A numeric header field: octal, or base-256 (GNU). -1 when it is neither. */
int tar_number(const unsigned char *field, size_t length, int64_t *value);
/* Decimal digits, nothing else, no overflow beyond INT64_MAX. */
int tar_decimal(const char *text, size_t length, uint64_t *value);

/* ---- reader ---- */

struct tar_member {
    mode_t type;      /* S_IFREG, S_IFDIR, S_IFLNK, S_IFCHR, S_IFBLK, S_IFIFO */
    bool hard_link;   /* then `link` is the cleaned name of the target, and type S_IFREG */
    const char *name; /* cleaned; "" is the root itself */
    const char *link; /* target of a symlink (raw) or hard link (cleaned) */
    mode_t mode;      /* permission bits, 07777 at most */
    uid_t uid;
    gid_t gid;
    struct timespec mtime;
    uint64_t size; /* of the file's content; with holes */
    uint32_t dev_major, dev_minor;
    const struct tar_xattr *xattrs;
    size_t n_xattrs;
};

typedef ssize_t tar_read_fn(void *context, void *buffer, size_t size); /* as read(2): 0 at the end, -1 and errno */

struct tar_reader;
/* NULL when out of memory. `error` is filled by every call that fails, and must outlive the reader. */
struct tar_reader *tar_reader_new(tar_read_fn *read, void *context, struct tar_error *error);
void tar_reader_free(struct tar_reader *reader);
/* 1: `member` is valid until the next call; 0: end of the archive; -1: error. Skips content that was not read. */
int tar_next(struct tar_reader *reader, struct tar_member *member);
/* The next piece of the member's content and the place in the file it belongs to; what lies between pieces is zeros.
 * 1: a piece, valid until the next call; 0: no more; -1: error. */
int tar_content(struct tar_reader *reader, const void **piece, size_t *size, uint64_t *offset);
/* Read and drop what follows the archive, so that the writer of a pipe is never cut. */
int tar_drain(struct tar_reader *reader);

/* ---- writer ---- */

struct tar_writer;
struct tar_writer *tar_writer_new(int fd, struct tar_error *error);
void tar_writer_free(struct tar_writer *writer);
/* Start a member. `name` and `link` are written as they are; directories get their trailing slash here. `map` (or NULL)
 * lists the pieces of a sparse file, written as GNU sparse 1.0. */
int tar_put_member(struct tar_writer *writer, const struct tar_member *member, const struct tar_map *map);
int tar_put_content(struct tar_writer *writer, const void *data, size_t size);
int tar_put_padding(struct tar_writer *writer, uint64_t size); /* after `size` bytes of content */
int tar_put_end(struct tar_writer *writer);                    /* the end blocks, and flush */

/* ---- archive -> directory ---- */

struct tar_extract_options {
    bool layer;     /* OCI whiteouts become overlayfs whiteouts */
    bool userxattr; /* ... with user.overlay.* instead of trusted.overlay.* */
    bool keep_ids;  /* set owners from the archive */
    bool put;       /* copy into a living tree: no symlink is followed, files appear at once and whole, existing
                       directories keep their attributes, missing parents are not made, runs of zeros become holes */
    uint64_t max_bytes, max_entries;
};

struct tar_extract_result {
    uint64_t entries, bytes;
};

/* Unpack everything below the directory `root`. */
int tar_extract(struct tar_reader *reader, int root, const struct tar_extract_options *options,
                struct tar_extract_result *result, struct tar_error *error);

/* ---- directory -> archive ---- */

struct tar_walk_options {
    bool layer;     /* overlayfs whiteouts become OCI whiteouts */
    bool userxattr; /* ... from user.overlay.* instead of trusted.overlay.* */
    bool xattrs;    /* write security.capability and user.* */
    bool tolerate;  /* a living tree: what vanishes or is a socket is left out */
    bool one_system; /* of a directory that something is mounted on, only the directory; of such a file, nothing */
    bool shift;     /* subtract `base` from uids and gids */
    uint32_t base;
};

/* Write what `name` is in the directory `parent` (never following it when it is a symlink), and everything below, under
 * the archive name `as`. Files that changed meanwhile are reported at the end. */
int tar_walk(struct tar_writer *writer, int parent, const char *name, const char *as,
             const struct tar_walk_options *options, struct tar_error *error);

/* ---- directories ---- */

struct tar_names {
    char **items;
    size_t count;
};

/* The names in the directory `fd` (which is closed), without "." and "..", in byte order. */
int tar_names_read(int fd, struct tar_names *names);
void tar_names_free(struct tar_names *names);
/* read(2) on a descriptor as a tar_read_fn; the context is an int *. */
ssize_t tar_read_fd(void *context, void *buffer, size_t size);

#endif
