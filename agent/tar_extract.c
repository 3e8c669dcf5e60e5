/* From archive to directory. Paths are resolved by openat2(2) below the root descriptor: the kernel keeps every one of
 * them inside, whatever symlinks the archive brings. */
#include "tar_extract.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { LATE_BYTES_MAX = 128 << 20, HOLE = 4096 };

static const char whiteout_prefix[] = ".wh.", meta_prefix[] = ".wh..wh.", opaque_marker[] = ".wh..wh..opq";

static bool starts(const char *text, const char *prefix) {
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

/* ---- attributes ---- */

static int set_xattrs(struct tar_extract *x, int fd, const struct tar_member *m) {
    for (size_t i = 0; i < m->n_xattrs && !x->options->put; i++) {
        const struct tar_xattr *attribute = &m->xattrs[i];
        bool capability = strcmp(attribute->name, "security.capability") == 0 && m->type == S_IFREG;
        if (!capability && !starts(attribute->name, "user."))
            continue; /* labels, ACLs and the like belong to the host's policy */
        if (fsetxattr(fd, attribute->name, attribute->value, attribute->size, 0) == 0 || errno == EOPNOTSUPP)
            continue;
        if (errno == EPERM && !x->options->keep_ids)
            continue;
        return tar_fail(x->error, "cannot set the extended attribute %.60s: %s", attribute->name, strerror(errno));
    }
    return 0;
}

static int fail_owner(struct tar_extract *x, const struct tar_member *m) {
    return tar_fail(x->error, "cannot set the owner %u:%u: %s", m->uid, m->gid, strerror(errno));
}

/* Owner first: a change of owner takes setuid bits and capabilities away. Time last. */
static int set_attributes(struct tar_extract *x, int fd, const struct tar_member *m) {
    const struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, m->mtime};
    if (x->options->keep_ids && fchown(fd, m->uid, m->gid) < 0)
        return fail_owner(x, m);
    if (fchmod(fd, m->mode) < 0)
        return tar_fail_errno(x->error, "cannot set the mode");
    if (set_xattrs(x, fd, m) < 0)
        return -1;
    if (futimens(fd, times) < 0)
        return tar_fail_errno(x->error, "cannot set the time");
    return 0;
}

/* For what cannot be opened: symlinks, devices, fifos. They are made with their mode; only the change of owner takes
 * something away, which is put back where nobody can have exchanged the name for a symlink meanwhile. */
static int set_attributes_at(struct tar_extract *x, int parent, const char *name, const struct tar_member *m) {
    const struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, m->mtime};
    if (x->options->keep_ids && fchownat(parent, name, m->uid, m->gid, AT_SYMLINK_NOFOLLOW) < 0)
        return fail_owner(x, m);
    if (m->type != S_IFLNK && !x->options->put && fchmodat(parent, name, m->mode, 0) < 0)
        return tar_fail_errno(x->error, "cannot set the mode");
    if (utimensat(parent, name, times, AT_SYMLINK_NOFOLLOW) < 0)
        return tar_fail_errno(x->error, "cannot set the time");
    return 0;
}

/* Attributes that must wait until the directory is full. */
static int set_later(struct tar_extract *x, const struct tar_member *m) {
    size_t length = strlen(m->name) + 1;
    x->late_bytes += length + sizeof *x->late;
    if (x->late_bytes > LATE_BYTES_MAX)
        return tar_fail(x->error, "too many directories");
    if (x->late_count == x->late_room) {
        size_t room = x->late_room ? x->late_room * 2 : 256;
        struct tar_late *late = realloc(x->late, room * sizeof *late);
        if (!late)
            return tar_fail(x->error, "out of memory");
        x->late = late;
        x->late_room = room;
    }
    char *path = malloc(length);
    if (!path)
        return tar_fail(x->error, "out of memory");
    memcpy(path, m->name, length);
    struct tar_late *late = &x->late[x->late_count++];
    *late = (struct tar_late){path, *m};
    late->member.name = path;
    late->member.link = NULL;
    late->member.xattrs = NULL;
    late->member.n_xattrs = 0;
    return 0;
}

/* The last word on a directory that is named twice is the later one. In a living tree each is new and named once; there
 * the innermost comes first, so that a closed parent does not lock its children away. */
static int set_late(struct tar_extract *x) {
    for (size_t i = 0; i < x->late_count; i++) {
        const struct tar_late *late = &x->late[x->options->put ? x->late_count - 1 - i : i];
        const struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, late->member.mtime};
        int fd = tar_resolve(x, late->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
        if (fd < 0)
            continue; /* a later member took its place */
        int result = 0;
        tar_error_member(x->error, late->path, strlen(late->path));
        if (x->options->put)
            result = set_attributes(x, fd, &late->member);
        else if (futimens(fd, times) < 0)
            result = tar_fail_errno(x->error, "cannot set the time");
        close(fd);
        if (result < 0)
            return -1;
    }
    return 0;
}

/* ---- content ---- */

static int write_at(struct tar_extract *x, int fd, const unsigned char *bytes, size_t size, uint64_t offset) {
    while (size) {
        ssize_t wrote = pwrite(fd, bytes, size, (off_t)offset);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote < 0)
            return tar_fail_errno(x->error, "cannot write");
        bytes += wrote;
        size -= (size_t)wrote;
        offset += (uint64_t)wrote;
    }
    return 0;
}

static bool is_zero(const unsigned char *bytes, size_t size) {
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, size - 1) == 0;
}

/* Write runs of what is not zero, in steps that end on multiples of HOLE; the file is new and reads as zeros. */
static int write_with_holes(struct tar_extract *x, int fd, const unsigned char *bytes, size_t size, uint64_t offset) {
    size_t start = 0, at = 0;
    while (at < size) {
        size_t step = HOLE - (size_t)((offset + at) % HOLE);
        if (step > size - at)
            step = size - at;
        if (is_zero(bytes + at, step)) {
            if (write_at(x, fd, bytes + start, at - start, offset + start) < 0)
                return -1;
            start = at + step;
        }
        at += step;
    }
    return write_at(x, fd, bytes + start, size - start, offset + start);
}

static int write_content(struct tar_extract *x, int fd, const struct tar_member *m) {
    const void *piece;
    size_t size = 0;
    uint64_t offset = 0;
    int got;
    if (m->size > INT64_MAX)
        return tar_fail(x->error, "file is too large");
    bool sized = false;
    while ((got = tar_content(x->reader, &piece, &size, &offset)) > 0) {
        if (x->options->put ? write_with_holes(x, fd, piece, size, offset) : write_at(x, fd, piece, size, offset))
            return -1;
        sized = !x->options->put && offset + size == m->size;
    }
    if (got < 0)
        return -1;
    if (!sized && m->size && ftruncate(fd, (off_t)m->size) < 0)
        return tar_fail_errno(x->error, "cannot write");
    return 0;
}

/* ---- placing members ---- */

/* The name under which to make a thing in its parent: in a living tree a temporary one, until it is whole. */
static const char *place(struct tar_extract *x, const char *name) {
    uint64_t random;
    if (!x->options->put)
        return name;
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        random = (uint64_t)getpid() << 32 | x->result->entries; /* O_EXCL tells of a clash */
    snprintf(x->temporary, sizeof x->temporary, ".hutch-%016llx.tmp", (unsigned long long)random);
    return x->temporary;
}

/* Whether to try again after a failed creation: what stood in the way was removed. */
static bool cleared(struct tar_extract *x, int parent, const char *name) {
    return errno == EEXIST && !x->options->put && tar_clear(x, parent, name) == 0;
}

static int fail_create(struct tar_extract *x) {
    return tar_fail_errno(x->error, "cannot create");
}

static int finish(struct tar_extract *x, int parent, const char *as, const char *name, int result) {
    if (!x->options->put)
        return result;
    if (result == 0 && renameat(parent, as, parent, name) < 0)
        result = tar_fail_errno(x->error, "cannot put in place");
    /* After a rename onto another link of the same file, the temporary name is still there. */
    unlinkat(parent, as, 0);
    return result;
}

static int make_file(struct tar_extract *x, int parent, const char *name, const struct tar_member *m) {
    const int flags = O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC;
    const char *as = place(x, name);
    int fd = openat(parent, as, flags, 0600);
    if (fd < 0 && cleared(x, parent, as))
        fd = openat(parent, as, flags, 0600);
    if (fd < 0)
        return fail_create(x);
    int result = write_content(x, fd, m);
    if (result == 0)
        result = set_attributes(x, fd, m);
    if (close(fd) < 0 && result == 0)
        result = tar_fail_errno(x->error, "cannot write");
    return finish(x, parent, as, name, result);
}

static int make_symlink(struct tar_extract *x, int parent, const char *name, const struct tar_member *m) {
    const char *as = place(x, name);
    int result = symlinkat(m->link, parent, as);
    if (result < 0 && cleared(x, parent, as))
        result = symlinkat(m->link, parent, as);
    if (result < 0)
        return fail_create(x);
    return finish(x, parent, as, name, set_attributes_at(x, parent, as, m));
}

static int make_special(struct tar_extract *x, int parent, const char *name, const struct tar_member *m) {
    bool device = m->type != S_IFIFO;
    if (device && x->options->put)
        return tar_fail(x->error, "device nodes cannot be copied into a box");
    if (x->options->layer && m->type == S_IFCHR && m->dev_major == 0 && m->dev_minor == 0)
        return tar_fail(x->error, "character device 0:0 is refused: it would be a whiteout");
    const char *as = place(x, name);
    dev_t number = device ? makedev(m->dev_major, m->dev_minor) : 0;
    int result = mknodat(parent, as, m->type | m->mode, number);
    if (result < 0 && cleared(x, parent, as))
        result = mknodat(parent, as, m->type | m->mode, number);
    if (result < 0 && errno == EPERM && device)
        return 0; /* user namespaces have no devices: the box gets its own */
    if (result < 0)
        return fail_create(x);
    return finish(x, parent, as, name, set_attributes_at(x, parent, as, m));
}

static int make_hard_link(struct tar_extract *x, int parent, const char *name, const struct tar_member *m) {
    struct stat there, target;
    const char *as = place(x, name), *base = strrchr(m->link, '/');
    char above[TAR_PATH_MAX + 1];
    size_t length = base ? (size_t)(base - m->link) : 0;
    base = base ? base + 1 : m->link;
    memcpy(above, m->link, length);
    above[length] = 0;
    int from = tar_resolve(x, above, O_PATH | O_DIRECTORY);
    if (from < 0 || fstatat(from, base, &target, AT_SYMLINK_NOFOLLOW) < 0) {
        if (from >= 0)
            close(from);
        return tar_fail(x->error, "target of the hard link is not there: %.100s", m->link);
    }
    if (!x->options->put && fstatat(parent, as, &there, AT_SYMLINK_NOFOLLOW) == 0 &&
        there.st_dev == target.st_dev && there.st_ino == target.st_ino) {
        close(from);
        return 0; /* it is that link already; to clear its place could take the last name of the file */
    }
    int result = linkat(from, base, parent, as, 0);
    if (result < 0 && cleared(x, parent, as))
        result = linkat(from, base, parent, as, 0);
    int error = errno;
    close(from);
    errno = error;
    if (result < 0)
        return fail_create(x);
    return finish(x, parent, as, name, 0);
}

static int make_directory(struct tar_extract *x, int parent, const char *name, const struct tar_member *m) {
    struct stat there;
    bool made = mkdirat(parent, name, 0700) == 0, whiteout = false;
    if (!made) {
        if (errno != EEXIST || fstatat(parent, name, &there, AT_SYMLINK_NOFOLLOW) < 0)
            return tar_fail_errno(x->error, "cannot create");
        if (!S_ISDIR(there.st_mode)) {
            if (x->options->put)
                return tar_fail(x->error, "there is something else in the place of this directory");
            whiteout = tar_is_whiteout(x, &there);
            if (tar_clear(x, parent, name) < 0)
                return -1;
            if (mkdirat(parent, name, 0700) < 0)
                return tar_fail_errno(x->error, "cannot create");
        }
    }
    if (x->options->put)
        return made ? set_later(x, m) : 0;
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return tar_fail_errno(x->error, "cannot open");
    if ((whiteout && tar_set_opaque(x, fd) < 0) || set_attributes(x, fd, m) < 0) {
        close(fd);
        return -1;
    }
    tar_keep_parent(x, m->name, fd); /* what comes next is likely inside */
    return set_later(x, m);
}

/* ---- OCI whiteouts (image-spec, layer.md "Whiteouts") in overlayfs form ---- */

static int hide_all(struct tar_extract *x, int parent) {
    int fd = openat(parent, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return tar_fail_errno(x->error, "cannot open");
    int result = tar_set_opaque(x, fd);
    close(fd);
    return result;
}

/* A whiteout hides only what earlier layers brought: what this layer brings itself stays, and a directory of it hides
 * the earlier one whole. */
static int hide(struct tar_extract *x, int parent, const char *name) {
    struct stat there;
    if (name[0] == 0 || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        return tar_fail(x->error, "whiteout of nothing");
    if (mknodat(parent, name, S_IFCHR, makedev(0, 0)) == 0)
        return 0;
    if (errno != EEXIST || fstatat(parent, name, &there, AT_SYMLINK_NOFOLLOW) < 0)
        return tar_fail_errno(x->error, "cannot create the whiteout");
    if (!S_ISDIR(there.st_mode))
        return 0;
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return tar_fail_errno(x->error, "cannot open");
    int result = tar_set_opaque(x, fd);
    close(fd);
    return result;
}

/* A component but the last that looks like a whiteout; NULL if there is none. */
static const char *reserved_parent(const char *name) {
    for (const char *slash; (slash = strchr(name, '/')); name = slash + 1)
        if (starts(name, whiteout_prefix))
            return name;
    return NULL;
}

/* ---- members ---- */

static int check(struct tar_extract *x, const struct tar_member *m) {
    const struct tar_extract_options *options = x->options;
    struct tar_extract_result *result = x->result;
    if (result->entries + x->made >= options->max_entries)
        return tar_fail(x->error, "archive has more than %llu entries", (unsigned long long)options->max_entries);
    result->entries++;
    if (m->size > options->max_bytes - result->bytes)
        return tar_fail(x->error, "content is larger than %llu bytes", (unsigned long long)options->max_bytes);
    result->bytes += m->size;
    for (size_t i = 0; i < m->n_xattrs && !options->put; i++)
        if (starts(m->xattrs[i].name, "trusted.overlay.") || starts(m->xattrs[i].name, "user.overlay."))
            return tar_fail(x->error, "extended attribute %.60s is refused: it steers overlayfs", m->xattrs[i].name);
    return 0;
}

static int place_root(struct tar_extract *x, const struct tar_member *m) {
    if (m->type != S_IFDIR)
        return tar_fail(x->error, "member has no name");
    if (x->options->put)
        return 0;
    int fd = openat(x->root, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return tar_fail_errno(x->error, "cannot open");
    int result = set_attributes(x, fd, m);
    close(fd);
    return result < 0 ? -1 : set_later(x, m);
}

static int place_member(struct tar_extract *x, const struct tar_member *m) {
    const char *base = strrchr(m->name, '/'), *reserved = NULL;
    base = base ? base + 1 : m->name;
    if (check(x, m) < 0)
        return -1;
    if (m->name[0] == 0)
        return place_root(x, m);
    if (x->options->layer) {
        bool marker = strcmp(base, opaque_marker) == 0;
        reserved = reserved_parent(m->name);
        if (reserved ? starts(reserved, meta_prefix) : starts(base, meta_prefix) && !marker)
            return 0; /* private notes of AUFS */
        if (reserved)
            return tar_fail(x->error, "a whiteout cannot be a directory");
    }
    int parent = tar_parent(x, m->name);
    if (parent < 0)
        return -1;
    if (x->options->layer && starts(base, whiteout_prefix))
        return strcmp(base, opaque_marker) == 0 ? hide_all(x, parent) : hide(x, parent, base + strlen(whiteout_prefix));
    if (m->hard_link)
        return make_hard_link(x, parent, base, m);
    switch (m->type) {
    case S_IFREG:
        return make_file(x, parent, base, m);
    case S_IFDIR:
        return make_directory(x, parent, base, m);
    case S_IFLNK:
        return make_symlink(x, parent, base, m);
    default:
        return make_special(x, parent, base, m);
    }
}

int tar_extract(struct tar_reader *reader, int root, const struct tar_extract_options *options,
                struct tar_extract_result *result, struct tar_error *error) {
    struct tar_extract x = {
        .reader = reader, .root = root, .options = options, .result = result, .error = error, .parent = -1};
    struct tar_member member;
    int got;
    *result = (struct tar_extract_result){0};
    mode_t mask = umask(0);
    while ((got = tar_next(reader, &member)) > 0 && (got = place_member(&x, &member)) == 0)
        continue;
    if (got == 0)
        got = set_late(&x);
    umask(mask);
    tar_keep_parent(&x, "", -1);
    for (size_t i = 0; i < x.late_count; i++)
        free(x.late[i].path);
    free(x.late);
    return got;
}
