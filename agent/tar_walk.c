/* From directory to archive. Everything is opened relative to its directory and never through a symlink; in a living
 * tree, what is opened may not be what was listed, so only what was opened counts. */
#include "tar.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

enum {
    BUFFER = 256 * 1024,
    HOLES_WORTH = 64 * 1024, /* bytes saved that make a file worth writing as sparse */
    SHIFT_RANGE = 65536,
    XATTR_LIST = 65536, /* the kernel's XATTR_LIST_MAX */
};

struct link {
    dev_t device;
    ino_t inode;
    char *name; /* NULL: free slot */
};

struct walk {
    struct tar_writer *writer;
    const struct tar_walk_options *options;
    struct tar_error *error;
    struct tar_error changed; /* the first file that shrank, if any */
    struct link *links;       /* hash table, open addressing */
    size_t links_used, links_room;
    dev_t device; /* of what the walk began with */
    struct tar_map map;
    struct tar_xattr xattrs[TAR_XATTRS_MAX];
    char names[XATTR_LIST];
    unsigned char *values[TAR_XATTRS_MAX];
    char path[TAR_PATH_MAX + 1]; /* name in the archive; "" is the root */
    char target[TAR_PATH_MAX];
    unsigned char buffer[BUFFER];
};

/* ---- hard links ---- */

static struct link *find_link(struct link *links, size_t room, dev_t device, ino_t inode) {
    size_t at = (size_t)((inode * 0x9e3779b97f4a7c15u) ^ device) & (room - 1);
    while (links[at].name && (links[at].device != device || links[at].inode != inode))
        at = (at + 1) & (room - 1);
    return &links[at];
}

static int grow_links(struct walk *w) {
    size_t room = w->links_room ? w->links_room * 2 : 256;
    struct link *links = calloc(room, sizeof *links);
    if (!links)
        return tar_fail(w->error, "out of memory");
    for (size_t i = 0; i < w->links_room; i++)
        if (w->links[i].name)
            *find_link(links, room, w->links[i].device, w->links[i].inode) = w->links[i];
    free(w->links);
    w->links = links;
    w->links_room = room;
    return 0;
}

/* The name under which this file is in the archive already, or NULL. -1 when out of memory. */
static int known_link(struct walk *w, const struct stat *info, const char **name) {
    *name = NULL;
    if (S_ISDIR(info->st_mode) || info->st_nlink < 2)
        return 0;
    if (w->links_used * 2 >= w->links_room && grow_links(w) < 0)
        return -1;
    struct link *link = find_link(w->links, w->links_room, info->st_dev, info->st_ino);
    *name = link->name;
    return 0;
}

/* Called once the member is written: what was skipped must not become a target. */
static int remember_link(struct walk *w, const struct stat *info) {
    if (S_ISDIR(info->st_mode) || info->st_nlink < 2)
        return 0;
    struct link *link = find_link(w->links, w->links_room, info->st_dev, info->st_ino);
    if (link->name)
        return 0;
    char *name = strdup(w->path);
    if (!name)
        return tar_fail(w->error, "out of memory");
    *link = (struct link){info->st_dev, info->st_ino, name};
    w->links_used++;
    return 0;
}

/* ---- attributes ---- */

static int shift_id(struct walk *w, uint32_t *id) {
    if (!w->options->shift)
        return 0;
    if (*id < w->options->base || *id - w->options->base >= SHIFT_RANGE)
        return tar_fail(w->error, "owner %u is not one of the box's ids, %u to %u", *id, w->options->base,
                        w->options->base + (SHIFT_RANGE - 1));
    *id -= w->options->base;
    return 0;
}

static int describe(struct walk *w, const struct stat *info, struct tar_member *m) {
    *m = (struct tar_member){
        .type = info->st_mode & S_IFMT,
        .name = w->path[0] ? w->path : ".",
        .mode = info->st_mode & 07777,
        .uid = info->st_uid,
        .gid = info->st_gid,
        .mtime = info->st_mtim,
        .size = S_ISREG(info->st_mode) ? (uint64_t)info->st_size : 0,
    };
    if (S_ISCHR(info->st_mode) || S_ISBLK(info->st_mode)) {
        m->dev_major = major(info->st_rdev);
        m->dev_minor = minor(info->st_rdev);
    }
    return shift_id(w, &m->uid) < 0 || shift_id(w, &m->gid) < 0 ? -1 : 0;
}

/* A capability that was set in a box names the root of the box's user namespace (version 3, linux/capability.h); in the
 * archive it is that of plain root (version 2). False: it belongs to some other root and has no meaning elsewhere. */
static bool plain_capability(const struct walk *w, unsigned char *value, size_t *size) {
    enum { V2_SIZE = 20, V3_SIZE = 24, REVISION_AT = 3, REVISION_2 = 2, REVISION_3 = 3 };
    if (*size != V3_SIZE || value[REVISION_AT] != REVISION_3)
        return true;
    uint32_t root = value[20] | (uint32_t)value[21] << 8 | (uint32_t)value[22] << 16 | (uint32_t)value[23] << 24;
    value[REVISION_AT] = REVISION_2;
    *size = V2_SIZE;
    return root == (w->options->shift ? w->options->base : 0);
}

static bool starts(const char *text, const char *prefix) {
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

/* What overlayfs notes in a layer's files. Only opaque directories can be told to others. */
static int read_overlay_note(struct walk *w, int fd, const char *name, bool *opaque) {
    const char *prefix = w->options->userxattr ? "user.overlay." : "trusted.overlay.";
    char value;
    if (!w->options->layer || !starts(name, prefix))
        return 0;
    const char *note = name + strlen(prefix);
    if (strcmp(note, "redirect") == 0 || strcmp(note, "metacopy") == 0)
        return tar_fail(w->error, "content lies in a lower layer (overlay %.20s)", note);
    if (strcmp(note, "opaque") != 0)
        return 0;
    if (fgetxattr(fd, name, &value, 1) != 1 || value != 'y')
        return tar_fail(w->error, "unknown kind of opaque directory");
    *opaque = true;
    return 0;
}

static int read_xattr(struct walk *w, int fd, const char *name, struct tar_member *m) {
    if (m->n_xattrs == TAR_XATTRS_MAX)
        return tar_fail(w->error, "more than %d extended attributes", TAR_XATTRS_MAX);
    unsigned char **value = &w->values[m->n_xattrs];
    if (!*value && !(*value = malloc(TAR_XATTR_VALUE_MAX)))
        return tar_fail(w->error, "out of memory");
    ssize_t got = fgetxattr(fd, name, *value, TAR_XATTR_VALUE_MAX);
    if (got < 0 && errno == ENODATA)
        return 0;
    if (got < 0)
        return tar_fail_errno(w->error, "cannot read an extended attribute");
    size_t size = (size_t)got;
    if (strcmp(name, "security.capability") == 0 && !plain_capability(w, *value, &size))
        return 0;
    w->xattrs[m->n_xattrs++] = (struct tar_xattr){name, *value, size};
    m->xattrs = w->xattrs;
    return 0;
}

static int read_xattrs(struct walk *w, int fd, struct tar_member *m, bool *opaque) {
    if (!w->options->xattrs)
        return 0;
    ssize_t got = flistxattr(fd, w->names, sizeof w->names);
    if (got < 0)
        return errno == EOPNOTSUPP ? 0 : tar_fail_errno(w->error, "cannot list the extended attributes");
    for (const char *name = w->names; name < w->names + got; name += strlen(name) + 1) {
        if (read_overlay_note(w, fd, name, opaque) < 0)
            return -1;
        bool wanted = strcmp(name, "security.capability") == 0;
        wanted |= starts(name, "user.") && !starts(name, "user.overlay.");
        if (wanted && read_xattr(w, fd, name, m) < 0)
            return -1;
    }
    return 0;
}

/* ---- content ---- */

/* Fill w->map with the pieces of a file that has holes; false when it is not worth it. */
static int find_holes(struct walk *w, int fd, const struct stat *info, bool *sparse) {
    off_t size = info->st_size, at = 0;
    *sparse = false;
    if (size - info->st_blocks * 512 < HOLES_WORTH)
        return 0;
    w->map.count = 0;
    while (at < size) {
        off_t data = lseek(fd, at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            break;
        off_t hole = data < 0 ? -1 : lseek(fd, data, SEEK_HOLE);
        if (hole < 0)
            return 0; /* a file system that cannot tell: write it as it reads */
        if (data >= size)
            break;
        at = hole < size ? hole : size;
        if (tar_map_add(&w->map, (uint64_t)data, (uint64_t)(at - data), w->error) < 0)
            return -1;
    }
    *sparse = true;
    struct tar_extent *last = w->map.count ? &w->map.items[w->map.count - 1] : NULL;
    if (last && last->offset + last->length == (uint64_t)size)
        return 0;
    return tar_map_add(&w->map, (uint64_t)size, 0, w->error); /* says where the file ends */
}

static void note_change(struct walk *w) {
    if (w->changed.cause[0])
        return;
    w->changed = *w->error;
    tar_error_set(&w->changed, "changed while reading");
}

static int put_extent(struct walk *w, int fd, uint64_t offset, uint64_t length) {
    while (length) {
        size_t want = length < sizeof w->buffer ? (size_t)length : sizeof w->buffer;
        ssize_t got = pread(fd, w->buffer, want, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return tar_fail_errno(w->error, "cannot read");
        if (got == 0) { /* it shrank: keep the archive's promise with zeros */
            note_change(w);
            memset(w->buffer, 0, want);
            got = (ssize_t)want;
        }
        if (tar_put_content(w->writer, w->buffer, (size_t)got) < 0)
            return -1;
        offset += (uint64_t)got;
        length -= (uint64_t)got;
    }
    return 0;
}

static int put_file(struct walk *w, int fd, const struct stat *info, const struct tar_member *m) {
    const struct tar_map whole = {.items = &(struct tar_extent){0, m->size}, .count = 1}, *map = &whole;
    uint64_t stored = 0;
    bool sparse;
    if (find_holes(w, fd, info, &sparse) < 0)
        return -1;
    if (sparse)
        map = &w->map;
    if (tar_put_member(w->writer, m, sparse ? map : NULL) < 0)
        return -1;
    for (size_t i = 0; i < map->count; i++) {
        if (put_extent(w, fd, map->items[i].offset, map->items[i].length) < 0)
            return -1;
        stored += map->items[i].length;
    }
    return tar_put_padding(w->writer, stored);
}

/* ---- entries ---- */

static int put_entry(struct walk *w, int parent, const char *name);

/* Make w->path name something in the directory that it names now; `length` gets the length to go back to. */
static int push(struct walk *w, const char *prefix, const char *name, size_t *length) {
    size_t at = *length = strlen(w->path);
    if (at + 1 + strlen(prefix) + strlen(name) > TAR_PATH_MAX)
        return tar_fail(w->error, "name is longer than %d bytes", TAR_PATH_MAX);
    if (at)
        w->path[at++] = '/';
    memcpy(w->path + at, prefix, strlen(prefix));
    memcpy(w->path + at + strlen(prefix), name, strlen(name) + 1);
    tar_error_member(w->error, w->path, strlen(w->path));
    return 0;
}

/* An empty file called `prefix` and `name` in the directory that w->path names. */
static int put_marker(struct walk *w, const char *prefix, const char *name, const struct tar_member *like) {
    struct tar_member m = {.type = S_IFREG, .name = w->path, .uid = like->uid, .gid = like->gid, .mtime = like->mtime};
    size_t length;
    if (push(w, prefix, name, &length) < 0)
        return -1;
    int result = tar_put_member(w->writer, &m, NULL);
    w->path[length] = 0;
    return result;
}

/* It vanished, or became something else, in a tree where that is to be expected. */
static bool gone(const struct walk *w) {
    return w->options->tolerate && (errno == ENOENT || errno == ENOTDIR || errno == ELOOP || errno == ENXIO);
}

static int put_opened(struct walk *w, int fd, const struct stat *seen, struct tar_member *m) {
    struct stat info;
    bool opaque = false;
    if (fstat(fd, &info) < 0)
        return tar_fail_errno(w->error, "cannot read");
    if ((info.st_mode & S_IFMT) != (seen->st_mode & S_IFMT))
        return w->options->tolerate ? 0 : tar_fail(w->error, "changed while reading");
    if (describe(w, &info, m) < 0 || read_xattrs(w, fd, m, &opaque) < 0)
        return -1;
    if (S_ISREG(info.st_mode)) {
        bool same = info.st_dev == seen->st_dev && info.st_ino == seen->st_ino;
        return put_file(w, fd, &info, m) < 0 || (same && remember_link(w, seen) < 0) ? -1 : 0;
    }
    if (tar_put_member(w->writer, m, NULL) < 0 || (opaque && put_marker(w, "", ".wh..wh..opq", m) < 0))
        return -1;
    struct tar_names names;
    int listed = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (listed < 0 || tar_names_read(listed, &names) < 0)
        return tar_fail_errno(w->error, "cannot list");
    int result = 0;
    for (size_t i = 0; i < names.count && result == 0; i++)
        result = put_entry(w, fd, names.items[i]);
    tar_names_free(&names);
    return result;
}

/* What w->path names: `name` in the directory `parent`. */
static int put_named(struct walk *w, int parent, const char *name) {
    struct stat info;
    struct tar_member m;
    const char *link;
    if (fstatat(parent, name, &info, AT_SYMLINK_NOFOLLOW) < 0)
        return gone(w) ? 0 : tar_fail_errno(w->error, "cannot read");
    if (S_ISSOCK(info.st_mode))
        return 0; /* has no form in an archive, and no life without its process */
    bool foreign = w->options->one_system && info.st_dev != w->device;
    if (foreign && !S_ISDIR(info.st_mode))
        return 0;
    if (describe(w, &info, &m) < 0 || known_link(w, &info, &link) < 0)
        return -1;
    if (foreign)
        return tar_put_member(w->writer, &m, NULL);
    if (link) {
        m.hard_link = true;
        m.link = link;
        return tar_put_member(w->writer, &m, NULL);
    }
    if (S_ISREG(info.st_mode) || S_ISDIR(info.st_mode)) {
        int kind = S_ISDIR(info.st_mode) ? O_DIRECTORY : O_NONBLOCK | O_NOCTTY;
        int fd = openat(parent, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | kind);
        if (fd < 0)
            return gone(w) ? 0 : tar_fail_errno(w->error, "cannot open");
        int result = put_opened(w, fd, &info, &m);
        close(fd);
        return result;
    }
    if (S_ISLNK(info.st_mode)) {
        ssize_t size = readlinkat(parent, name, w->target, sizeof w->target);
        if (size < 0 || size == (ssize_t)sizeof w->target)
            return size < 0 && (gone(w) || (w->options->tolerate && errno == EINVAL))
                       ? 0
                       : tar_fail(w->error, "cannot read the symlink");
        w->target[size] = 0;
        m.link = w->target;
    }
    return tar_put_member(w->writer, &m, NULL) < 0 || remember_link(w, &info) < 0 ? -1 : 0;
}

static bool is_whiteout(int parent, const char *name, struct stat *info) {
    return fstatat(parent, name, info, AT_SYMLINK_NOFOLLOW) == 0 && S_ISCHR(info->st_mode) &&
           info->st_rdev == makedev(0, 0);
}

/* The kernel makes whiteouts with the ids of whoever mounted the overlay, which mean nothing in the box. */
static int put_whiteout(struct walk *w, const struct stat *info, const char *name) {
    struct tar_member like;
    struct stat owned = *info;
    owned.st_uid = owned.st_gid = w->options->shift ? w->options->base : 0;
    return describe(w, &owned, &like) < 0 ? -1 : put_marker(w, ".wh.", name, &like);
}

static int put_entry(struct walk *w, int parent, const char *name) {
    size_t length;
    struct stat info;
    if (w->options->layer && is_whiteout(parent, name, &info))
        return put_whiteout(w, &info, name);
    if (push(w, "", name, &length) < 0)
        return -1;
    if (w->options->layer && starts(name, ".wh."))
        return tar_fail(w->error, "a layer cannot hold this name: it means a whiteout");
    int result = put_named(w, parent, name);
    w->path[length] = 0;
    return result;
}

int tar_walk(struct tar_writer *writer, int parent, const char *name, const char *as,
             const struct tar_walk_options *options, struct tar_error *error) {
    struct walk *w = calloc(1, sizeof *w);
    if (!w)
        return tar_fail(error, "out of memory");
    w->writer = writer;
    w->options = options;
    w->error = error;
    if (strcmp(as, ".") != 0)
        memcpy(w->path, as, strnlen(as, TAR_PATH_MAX));
    tar_error_member(error, as, strlen(as));
    struct stat start;
    w->device = fstatat(parent, name, &start, AT_SYMLINK_NOFOLLOW) == 0 ? start.st_dev : 0;
    int result = put_named(w, parent, name);
    if (result == 0)
        result = tar_put_end(writer);
    if (result == 0 && w->changed.cause[0]) {
        *error = w->changed;
        result = -1;
    }
    for (size_t i = 0; i < w->links_room; i++)
        free(w->links[i].name);
    for (size_t i = 0; i < TAR_XATTRS_MAX; i++)
        free(w->values[i]);
    free(w->links);
    free(w->map.items);
    free(w);
    return result;
}
