/* The tar reader. Trusts nothing: every number is checked, every buffer bounded, and what it cannot tell for sure it
 * refuses. Where readers differ it does what Go's archive/tar does, which made and reads most container layers. */
#include "tar.h"

#include <stdlib.h>

enum { BUFFER = 256 * 1024 };

/* The header block (POSIX.1-2017 ustar; GNU tar manual, "Basic Tar Format"). */
struct header {
    char name[100];
    unsigned char mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8];
    char type;
    char link[100];
    char magic[8]; /* "ustar\0" "00", or GNU's "ustar  \0" */
    char uname[32], gname[32];
    unsigned char dev_major[8], dev_minor[8];
    char prefix[155]; /* GNU: times, then the fields of struct gnu_sparse */
    char pad[12];
};

struct gnu_extent {
    unsigned char offset[12], length[12];
};

enum { GNU_EXTENTS_AT = 386, GNU_EXTENTS = 4, GNU_MORE_AT = 482, GNU_REAL_SIZE_AT = 483, GNU_BLOCK_EXTENTS = 21 };

struct text { /* a buffer that is used again */
    char *bytes;
    size_t length, room;
};

struct tar_reader {
    tar_read_fn *read;
    void *context;
    struct tar_error *error;
    size_t at, end; /* what is left in the buffer */
    uint64_t left;  /* bytes of the member's content still in the archive */
    unsigned pad;   /* bytes after them up to the next block */
    bool any;       /* there was a header or an end block */
    struct tar_map map;
    size_t extent;       /* the piece being read ... */
    uint64_t extent_done; /* ... and how much of it was handed out */
    struct tar_pax global, local;
    struct text pax_text, global_text, long_name, long_link;
    bool has_local, has_long_name, has_long_link;
    char name[sizeof((struct header *)0)->prefix + 1 + sizeof((struct header *)0)->name + 1];
    char link[sizeof((struct header *)0)->link + 1];
    unsigned char buffer[BUFFER];
};

struct tar_reader *tar_reader_new(tar_read_fn *read, void *context, struct tar_error *error) {
    _Static_assert(sizeof(struct header) == TAR_BLOCK, "header layout");
    struct tar_reader *reader = calloc(1, sizeof *reader);
    if (reader) {
        reader->read = read;
        reader->context = context;
        reader->error = error;
    }
    return reader;
}

void tar_reader_free(struct tar_reader *reader) {
    if (!reader)
        return;
    free(reader->map.items);
    free(reader->pax_text.bytes);
    free(reader->global_text.bytes);
    free(reader->long_name.bytes);
    free(reader->long_link.bytes);
    free(reader);
}

/* Have at least `need` bytes in one piece, if the input has them. -1 on a read error. */
static int fill(struct tar_reader *r, size_t need) {
    if (r->end - r->at >= need)
        return 0;
    memmove(r->buffer, r->buffer + r->at, r->end - r->at);
    r->end -= r->at;
    r->at = 0;
    while (r->end < need) {
        ssize_t got = r->read(r->context, r->buffer + r->end, sizeof r->buffer - r->end);
        if (got < 0)
            return tar_fail_errno(r->error, "cannot read the archive");
        if (got == 0)
            break;
        r->end += (size_t)got;
    }
    return 0;
}

static int truncated(struct tar_reader *r) {
    return tar_fail(r->error, "archive is cut short");
}

/* The next bytes, at most `limit` > 0: as many as are at hand. */
static int take(struct tar_reader *r, uint64_t limit, const unsigned char **bytes, size_t *size) {
    if (fill(r, 1) < 0)
        return -1;
    if (r->at == r->end)
        return truncated(r);
    *bytes = r->buffer + r->at;
    *size = r->end - r->at;
    if (*size > limit)
        *size = (size_t)limit;
    r->at += *size;
    return 0;
}

static int skip(struct tar_reader *r, uint64_t count) {
    const unsigned char *bytes;
    size_t size;
    for (; count; count -= size)
        if (take(r, count, &bytes, &size) < 0)
            return -1;
    return 0;
}

/* 1: a whole block; 0: end of input; -1: error. */
static int read_block(struct tar_reader *r, const unsigned char **block) {
    if (fill(r, TAR_BLOCK) < 0)
        return -1;
    if (r->at == r->end)
        return 0;
    if (r->end - r->at < TAR_BLOCK)
        return truncated(r);
    *block = r->buffer + r->at;
    r->at += TAR_BLOCK;
    return 1;
}

static bool is_zero(const unsigned char *block) {
    return block[0] == 0 && memcmp(block, block + 1, TAR_BLOCK - 1) == 0;
}

static unsigned padding(uint64_t size) {
    return (unsigned)(-size % TAR_BLOCK);
}

/* The checksum counts its own field as spaces; old writers summed signed bytes. */
static int check_sum(struct tar_reader *r, const struct header *h) {
    const unsigned char *bytes = (const unsigned char *)h;
    int64_t claimed, plain = 0, with_sign = 0;
    for (size_t i = 0; i < TAR_BLOCK; i++) {
        bool own = i >= offsetof(struct header, checksum) && i < offsetof(struct header, type);
        unsigned char byte = own ? ' ' : bytes[i];
        plain += byte;
        with_sign += (signed char)byte;
    }
    if (tar_number(h->checksum, sizeof h->checksum, &claimed) < 0 || (claimed != plain && claimed != with_sign))
        return tar_fail(r->error, "header checksum does not match: damaged, or not a tar archive");
    return 0;
}

static int number(struct tar_reader *r, const unsigned char *field, size_t size, const char *what, uint64_t limit,
                  uint64_t *value) {
    int64_t signed_value;
    if (tar_number(field, size, &signed_value) < 0)
        return tar_fail(r->error, "malformed %s", what);
    if (signed_value < 0 || (uint64_t)signed_value > limit)
        return tar_fail(r->error, "%s is out of range", what);
    *value = (uint64_t)signed_value;
    return 0;
}

/* The body of an extension header. */
static int read_text(struct tar_reader *r, uint64_t size, struct text *text) {
    if (size > TAR_EXTENSION_MAX)
        return tar_fail(r->error, "extended header is larger than %d bytes", TAR_EXTENSION_MAX);
    if (text->room < size + 1) {
        char *bytes = realloc(text->bytes, size + 1);
        if (!bytes)
            return tar_fail(r->error, "out of memory");
        text->bytes = bytes;
        text->room = size + 1;
    }
    const unsigned char *bytes;
    size_t got;
    for (text->length = 0; text->length < size; text->length += got) {
        if (take(r, size - text->length, &bytes, &got) < 0)
            return -1;
        memcpy(text->bytes + text->length, bytes, got);
    }
    text->bytes[size] = 0;
    return skip(r, padding(size));
}

static int read_long(struct tar_reader *r, uint64_t size, struct text *text, bool *has) {
    if (read_text(r, size, text) < 0)
        return -1;
    while (text->length && text->bytes[text->length - 1] == 0)
        text->length--;
    *has = true;
    return 0;
}

static int read_global(struct tar_reader *r, uint64_t size) {
    if (read_text(r, size, &r->global_text) < 0 ||
        tar_pax_parse(&r->global, r->global_text.bytes, r->global_text.length, &r->map, r->error) < 0)
        return -1;
    const struct tar_pax *g = &r->global;
    if (g->path || g->linkpath || g->has_size || g->sparse_name || g->sparse_v0 || g->sparse_v1 || g->n_xattrs)
        return tar_fail(r->error, "global header sets what only one member can have");
    return 0;
}

/* ---- sparse maps ---- */

static int gnu_extents(struct tar_reader *r, const unsigned char *bytes, unsigned count) {
    const struct gnu_extent *extents = (const struct gnu_extent *)bytes;
    for (unsigned i = 0; i < count; i++) {
        uint64_t offset, length;
        if (extents[i].offset[0] == 0 && extents[i].length[0] == 0)
            break;
        if (number(r, extents[i].offset, 12, "sparse offset", INT64_MAX, &offset) < 0 ||
            number(r, extents[i].length, 12, "sparse length", INT64_MAX, &length) < 0 ||
            tar_map_add(&r->map, offset, length, r->error) < 0)
            return -1;
    }
    return 0;
}

/* Old GNU format: four extents in the header, more in blocks of their own before the content. */
static int read_gnu_map(struct tar_reader *r, const unsigned char *block, uint64_t *real_size) {
    r->map.count = 0;
    if (number(r, block + GNU_REAL_SIZE_AT, 12, "size", INT64_MAX, real_size) < 0 ||
        gnu_extents(r, block + GNU_EXTENTS_AT, GNU_EXTENTS) < 0)
        return -1;
    bool more = block[GNU_MORE_AT];
    while (more) {
        int got = read_block(r, &block);
        if (got <= 0)
            return got < 0 ? -1 : truncated(r);
        if (gnu_extents(r, block, GNU_BLOCK_EXTENTS) < 0)
            return -1;
        more = block[GNU_BLOCK_EXTENTS * sizeof(struct gnu_extent)];
    }
    return 0;
}

/* Format 1.0: decimal lines before the content, padded to a block. They are part of the stored size, r->left. */
static int read_v1_number(struct tar_reader *r, uint64_t *used, uint64_t *value) {
    char digits[20];
    size_t length = 0;
    for (;;) {
        const unsigned char *byte;
        size_t size;
        if (*used == r->left)
            return tar_fail(r->error, "malformed sparse map");
        if (take(r, 1, &byte, &size) < 0)
            return -1;
        ++*used;
        if (*byte == '\n')
            break;
        if (length == sizeof digits)
            return tar_fail(r->error, "malformed sparse map");
        digits[length++] = (char)*byte;
    }
    return tar_decimal(digits, length, value) < 0 ? tar_fail(r->error, "malformed sparse map") : 0;
}

static int read_v1_map(struct tar_reader *r) {
    uint64_t used = 0, count, offset, length;
    r->map.count = 0;
    if (read_v1_number(r, &used, &count) < 0)
        return -1;
    if (count > TAR_EXTENTS_MAX)
        return tar_fail(r->error, "sparse file has too many pieces");
    while (count--)
        if (read_v1_number(r, &used, &offset) < 0 || read_v1_number(r, &used, &length) < 0 ||
            tar_map_add(&r->map, offset, length, r->error) < 0)
            return -1;
    uint64_t pad = padding(used);
    if (used + pad > r->left)
        return tar_fail(r->error, "malformed sparse map");
    r->left -= used + pad;
    return skip(r, pad);
}

static int check_map(struct tar_reader *r, uint64_t real_size) {
    uint64_t end = 0, stored = 0;
    for (size_t i = 0; i < r->map.count; i++) {
        const struct tar_extent *extent = &r->map.items[i];
        if (extent->offset < end || extent->offset > real_size || extent->length > real_size - extent->offset)
            return tar_fail(r->error, "sparse map is out of order or out of bounds");
        end = extent->offset + extent->length;
        stored += extent->length;
    }
    if (stored != r->left)
        return tar_fail(r->error, "sparse map does not match the stored size");
    return 0;
}

/* ---- members ---- */

static int read_size_and_map(struct tar_reader *r, const struct header *h, uint64_t size, struct tar_member *m) {
    const struct tar_pax *pax = &r->local;
    r->left = size;
    r->pad = padding(size);
    m->size = size;
    if (h->type == 'S') {
        if (read_gnu_map(r, (const unsigned char *)h, &m->size) < 0)
            return -1;
        return check_map(r, m->size);
    }
    if (pax->sparse_v1 || pax->sparse_v0) {
        if (!pax->has_real_size)
            return tar_fail(r->error, "sparse file without its real size");
        m->size = pax->real_size;
        if (pax->sparse_v1 && read_v1_map(r) < 0)
            return -1;
        return check_map(r, m->size);
    }
    r->map.count = 0;
    return tar_map_add(&r->map, 0, size, r->error);
}

static const char *header_name(struct tar_reader *r, const struct header *h, size_t *length) {
    size_t prefix = 0, size = strnlen(h->name, sizeof h->name);
    if (memcmp(h->magic, "ustar", 6) == 0) /* with its NUL: GNU's has a space there and no prefix */
        prefix = strnlen(h->prefix, memcmp(h->pad + 8, "tar", 4) == 0 ? 131 : sizeof h->prefix); /* star: shorter */
    memcpy(r->name, h->prefix, prefix);
    if (prefix)
        r->name[prefix++] = '/';
    memcpy(r->name + prefix, h->name, size);
    *length = prefix + size;
    r->name[*length] = 0;
    return r->name;
}

/* Where the name and the target come from: GNU's long ones, then pax, then the header. */
static int read_names(struct tar_reader *r, const struct header *h, struct tar_member *m, bool *slash) {
    const struct tar_pax *pax = &r->local;
    size_t length, link_length;
    char *name = (char *)(uintptr_t)header_name(r, h, &length), *link = r->link;
    link_length = strnlen(h->link, sizeof h->link);
    memcpy(link, h->link, link_length);
    link[link_length] = 0;
    if (pax->path)
        name = pax->path, length = pax->path_length;
    if (pax->sparse_name && (pax->sparse_v0 || pax->sparse_v1))
        name = pax->sparse_name, length = pax->sparse_name_length;
    if (r->has_long_name)
        name = r->long_name.bytes, length = r->long_name.length;
    if (pax->linkpath)
        link = pax->linkpath, link_length = pax->linkpath_length;
    if (r->has_long_link)
        link = r->long_link.bytes, link_length = r->long_link.length;
    tar_error_member(r->error, name, length);
    if (length == 0)
        return tar_fail(r->error, "member has no name");
    *slash = name[length - 1] == '/';
    if (tar_name_clean(name, length, r->error) < 0)
        return -1;
    m->name = name;
    m->link = link;
    if (h->type != '1' && h->type != '2')
        return 0;
    if (link_length == 0)
        return tar_fail(r->error, "link has no target");
    if (link_length >= TAR_PATH_MAX || memchr(link, 0, link_length))
        return tar_fail(r->error, "link target is too long or contains NUL");
    if (h->type == '1' && tar_name_clean(link, link_length, r->error) < 0)
        return tar_fail(r->error, "target of the hard link is refused ('..' or too long)");
    return 0;
}

static int read_attributes(struct tar_reader *r, const struct header *h, struct tar_member *m) {
    const struct tar_pax *local = &r->local, *global = &r->global;
    const uint64_t id_max = UINT32_MAX - 1; /* the last one means "leave alone" to chown */
    uint64_t mode, uid, gid;
    int64_t seconds;
    if (number(r, h->mode, sizeof h->mode, "mode", INT64_MAX, &mode) < 0 ||
        number(r, h->uid, sizeof h->uid, "uid", INT64_MAX, &uid) < 0 ||
        number(r, h->gid, sizeof h->gid, "gid", INT64_MAX, &gid) < 0)
        return -1;
    if (tar_number(h->mtime, sizeof h->mtime, &seconds) < 0)
        return tar_fail(r->error, "malformed mtime");
    uid = local->has_uid ? local->uid : global->has_uid ? global->uid : uid;
    gid = local->has_gid ? local->gid : global->has_gid ? global->gid : gid;
    if (uid > id_max || gid > id_max)
        return tar_fail(r->error, "owner is out of range");
    m->mode = (mode_t)mode & 07777;
    m->uid = (uid_t)uid;
    m->gid = (gid_t)gid;
    m->mtime = local->has_mtime    ? local->mtime
               : global->has_mtime ? global->mtime
                                   : (struct timespec){.tv_sec = seconds};
    m->xattrs = local->xattrs;
    m->n_xattrs = local->n_xattrs;
    return 0;
}

static int read_device(struct tar_reader *r, const struct header *h, struct tar_member *m) {
    uint64_t major_number, minor_number; /* the kernel has 12 and 20 bits */
    if (number(r, h->dev_major, sizeof h->dev_major, "device number", 0xfff, &major_number) < 0 ||
        number(r, h->dev_minor, sizeof h->dev_minor, "device number", 0xfffff, &minor_number) < 0)
        return -1;
    m->dev_major = (uint32_t)major_number;
    m->dev_minor = (uint32_t)minor_number;
    return 0;
}

/* A header that is a member. 1, or 0 for a kind that carries nothing (a volume label), or -1. */
static int read_member(struct tar_reader *r, const struct header *h, struct tar_member *m) {
    bool slash;
    uint64_t size;
    *m = (struct tar_member){0};
    if (!r->has_local) {
        r->local = (struct tar_pax){0};
        r->map.count = 0;
    }
    if (read_names(r, h, m, &slash) < 0 || read_attributes(r, h, m) < 0 ||
        number(r, h->size, sizeof h->size, "size", INT64_MAX, &size) < 0)
        return -1;
    if (r->local.has_size)
        size = r->local.size;
    switch (h->type) {
    case '0':
    case 0:
    case '7':
        if (slash) { /* before ustar, directories were told by their slash */
            m->type = S_IFDIR;
            return size ? tar_fail(r->error, "directory with content") : 1;
        }
        /* fall through */
    case 'S':
        m->type = S_IFREG;
        return read_size_and_map(r, h, size, m) < 0 ? -1 : 1;
    case '1':
        m->type = S_IFREG;
        m->hard_link = true;
        return 1;
    case '2':
        m->type = S_IFLNK;
        return 1;
    case '3':
    case '4':
        m->type = h->type == '3' ? S_IFCHR : S_IFBLK;
        return read_device(r, h, m) < 0 ? -1 : 1;
    case '5':
        m->type = S_IFDIR;
        return 1;
    case '6':
        m->type = S_IFIFO;
        return 1;
    case 'V':
        return 0;
    default:
        return tar_fail(r->error, "member type 0x%02x is not supported", (unsigned char)h->type);
    }
}

/* 1 when the block was an extension header (and was read), 0 when it is a member. */
static int read_extension(struct tar_reader *r, const struct header *h) {
    uint64_t size;
    if (h->type == 0 || !strchr("xgLK", h->type))
        return 0;
    tar_error_member(r->error, h->name, sizeof h->name);
    if (number(r, h->size, sizeof h->size, "size", INT64_MAX, &size) < 0)
        return -1;
    char type = h->type; /* reading on moves the block */
    if (type == 'L')
        return read_long(r, size, &r->long_name, &r->has_long_name) < 0 ? -1 : 1;
    if (type == 'K')
        return read_long(r, size, &r->long_link, &r->has_long_link) < 0 ? -1 : 1;
    if (type == 'g')
        return read_global(r, size) < 0 ? -1 : 1;
    r->has_local = true;
    if (read_text(r, size, &r->pax_text) < 0 ||
        tar_pax_parse(&r->local, r->pax_text.bytes, r->pax_text.length, &r->map, r->error) < 0)
        return -1;
    return 1;
}

static bool half_said(const struct tar_reader *r) {
    return r->has_local || r->has_long_name || r->has_long_link;
}

static int end_of_archive(struct tar_reader *r, bool end_blocks) {
    if (half_said(r))
        return tar_fail(r->error, "archive ends after an extended header");
    if (!r->any && !end_blocks)
        return tar_fail(r->error, "not a tar archive: no data");
    return 0;
}

int tar_next(struct tar_reader *r, struct tar_member *member) {
    if (skip(r, r->left) < 0 || skip(r, r->pad) < 0)
        return -1;
    r->error->member[0] = 0;
    r->left = r->pad = 0;
    r->map.count = 0;
    r->extent = 0;
    r->extent_done = 0;
    r->has_local = r->has_long_name = r->has_long_link = false;
    for (;;) {
        const unsigned char *block;
        int got = read_block(r, &block);
        if (got <= 0) /* writers exist that leave out the end blocks */
            return got < 0 ? -1 : end_of_archive(r, false);
        if (is_zero(block)) {
            got = read_block(r, &block);
            if (got < 0)
                return -1;
            if (got && !is_zero(block))
                return tar_fail(r->error, "a lone block of zeros in the middle of the archive");
            return end_of_archive(r, true);
        }
        /* The buffer moves while a long map is read; the header is wanted until then. */
        struct header h;
        memcpy(&h, block, sizeof h);
        if (check_sum(r, &h) < 0)
            return -1;
        r->any = true;
        got = read_extension(r, &h);
        if (got < 0)
            return -1;
        if (got)
            continue;
        got = read_member(r, &h, member);
        if (got)
            return got;
        r->has_local = r->has_long_name = r->has_long_link = false;
    }
}

int tar_content(struct tar_reader *r, const void **piece, size_t *size, uint64_t *offset) {
    while (r->extent < r->map.count && r->extent_done == r->map.items[r->extent].length) {
        r->extent++;
        r->extent_done = 0;
    }
    if (r->extent == r->map.count)
        return 0;
    const struct tar_extent *extent = &r->map.items[r->extent];
    const unsigned char *bytes;
    if (take(r, extent->length - r->extent_done, &bytes, size) < 0)
        return -1;
    *piece = bytes;
    *offset = extent->offset + r->extent_done;
    r->extent_done += *size;
    r->left -= *size;
    return 1;
}

int tar_drain(struct tar_reader *r) {
    ssize_t got;
    while ((got = r->read(r->context, r->buffer, sizeof r->buffer)) > 0)
        continue;
    return got < 0 ? tar_fail_errno(r->error, "cannot read the archive") : 0;
}
