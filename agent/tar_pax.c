/* Numbers and extended headers (POSIX.1-2017 pax, "Extended Header"; GNU tar manual, "Storing Sparse Files"). */
#include "tar.h"

#include <stdlib.h>

int tar_number(const unsigned char *field, size_t length, int64_t *value) {
    if (field[0] & 0x80) { /* base-256, big-endian two's complement below the marker bit */
        bool negative = field[0] & 0x40;
        uint64_t sum = negative ? UINT64_MAX : 0;
        for (size_t i = 0; i < length; i++) {
            unsigned char byte = field[i];
            if (i == 0)
                byte = (unsigned char)(negative ? byte | 0x80 : byte & 0x7f);
            uint64_t top = sum >> 55; /* the byte that leaves and the sign bit that stays must be plain sign */
            if (top != (negative ? 0x1ff : 0))
                return -1;
            sum = sum << 8 | byte;
        }
        *value = (int64_t)sum;
        return 0;
    }
    size_t at = 0, end = length;
    while (at < end && (field[at] == ' ' || field[at] == 0))
        at++;
    while (end > at && (field[end - 1] == ' ' || field[end - 1] == 0))
        end--;
    uint64_t sum = 0;
    for (; at < end; at++) {
        if (field[at] == 0) /* what follows the terminator does not count */
            break;
        if (field[at] < '0' || field[at] > '7' || sum >> 60)
            return -1;
        sum = sum << 3 | (uint64_t)(field[at] - '0');
    }
    *value = (int64_t)sum;
    return 0;
}

int tar_decimal(const char *text, size_t length, uint64_t *value) {
    uint64_t sum = 0;
    if (length == 0)
        return -1;
    for (size_t i = 0; i < length; i++) {
        if (text[i] < '0' || text[i] > '9' || sum > (INT64_MAX - 9) / 10)
            return -1;
        sum = sum * 10 + (uint64_t)(text[i] - '0');
    }
    *value = sum;
    return 0;
}

/* [-]seconds[.fraction], rounded down to nanoseconds. */
static int parse_time(const char *text, size_t length, struct timespec *time) {
    bool negative = length && text[0] == '-';
    text += negative, length -= negative;
    const char *dot = memchr(text, '.', length);
    size_t whole = dot ? (size_t)(dot - text) : length;
    uint64_t seconds;
    if (tar_decimal(text, whole, &seconds) < 0)
        return -1;
    long nanos = 0;
    long unit = 100000000;
    bool rest = false;
    for (size_t i = whole + 1; i < length; i++) {
        if (text[i] < '0' || text[i] > '9')
            return -1;
        rest |= unit == 0 && text[i] != '0';
        nanos += unit * (text[i] - '0');
        unit /= 10;
    }
    int64_t sign = negative ? -1 : 1;
    time->tv_sec = sign * (int64_t)seconds;
    if (negative && (nanos || rest)) {
        time->tv_sec -= 1;
        nanos = 1000000000 - nanos - rest;
    }
    time->tv_nsec = nanos;
    return 0;
}

int tar_map_add(struct tar_map *map, uint64_t offset, uint64_t length, struct tar_error *error) {
    if (map->count == TAR_EXTENTS_MAX)
        return tar_fail(error, "sparse file has too many pieces");
    if (map->count == map->room) {
        size_t room = map->room ? map->room * 2 : 64;
        struct tar_extent *items = realloc(map->items, room * sizeof *items);
        if (!items)
            return tar_fail(error, "out of memory");
        map->items = items;
        map->room = room;
    }
    map->items[map->count++] = (struct tar_extent){offset, length};
    return 0;
}

/* GNU.sparse.map of format 0.1: offset,length,offset,length... */
static int parse_sparse_map(const char *text, size_t length, struct tar_map *map, struct tar_error *error) {
    uint64_t pair[2];
    int at = 0;
    map->count = 0;
    while (length) {
        const char *comma = memchr(text, ',', length);
        size_t size = comma ? (size_t)(comma - text) : length;
        if (tar_decimal(text, size, &pair[at]) < 0)
            return tar_fail(error, "malformed GNU.sparse.map");
        if (at == 1 && tar_map_add(map, pair[0], pair[1], error) < 0)
            return -1;
        at ^= 1;
        text += size + (comma != NULL);
        length -= size + (comma != NULL);
    }
    return at ? tar_fail(error, "malformed GNU.sparse.map") : 0;
}

static int add_xattr(struct tar_pax *pax, const char *name, size_t name_length, const char *value, size_t size,
                     struct tar_error *error) {
    if (name_length == 0 || name_length > 255)
        return tar_fail(error, "extended attribute has a bad name");
    if (size > TAR_XATTR_VALUE_MAX)
        return tar_fail(error, "extended attribute is larger than %d bytes", TAR_XATTR_VALUE_MAX);
    size_t i = 0;
    while (i < pax->n_xattrs && strcmp(pax->xattrs[i].name, name) != 0)
        i++;
    if (i == TAR_XATTRS_MAX)
        return tar_fail(error, "more than %d extended attributes", TAR_XATTRS_MAX);
    if (i == pax->n_xattrs)
        pax->n_xattrs++;
    pax->xattrs[i] = (struct tar_xattr){name, value, size};
    return 0;
}

static bool is(const char *key, size_t length, const char *name) {
    return strlen(name) == length && memcmp(key, name, length) == 0;
}

/* One record; an empty value takes back what was said before. The key ends with a NUL that the caller put in. */
static int apply(struct tar_pax *pax, char *key, size_t key_length, char *value, size_t length, struct tar_map *map,
                 struct tar_error *error) {
    static const char xattr_prefix[] = "SCHILY.xattr.";
    const size_t prefix = sizeof xattr_prefix - 1;
    const struct {
        const char *name;
        char **text;
        size_t *size;
    } strings[] = {
        {"path", &pax->path, &pax->path_length},
        {"linkpath", &pax->linkpath, &pax->linkpath_length},
        {"GNU.sparse.name", &pax->sparse_name, &pax->sparse_name_length},
    };
    const struct {
        const char *name;
        bool *has;
        uint64_t *number;
    } numbers[] = {
        {"size", &pax->has_size, &pax->size},
        {"uid", &pax->has_uid, &pax->uid},
        {"gid", &pax->has_gid, &pax->gid},
        {"GNU.sparse.realsize", &pax->has_real_size, &pax->real_size},
        {"GNU.sparse.size", &pax->has_real_size, &pax->real_size},
    };
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++)
        if (is(key, key_length, strings[i].name)) {
            *strings[i].text = length ? value : NULL;
            *strings[i].size = length;
            return 0;
        }
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (is(key, key_length, numbers[i].name)) {
            *numbers[i].has = length > 0;
            if (length && tar_decimal(value, length, numbers[i].number) < 0)
                return tar_fail(error, "malformed number in extended header record '%s'", numbers[i].name);
            return 0;
        }
    if (is(key, key_length, "mtime")) {
        pax->has_mtime = length > 0;
        if (length && parse_time(value, length, &pax->mtime) < 0)
            return tar_fail(error, "malformed time in extended header");
        return 0;
    }
    if (key_length > prefix && memcmp(key, xattr_prefix, prefix) == 0)
        return add_xattr(pax, key + prefix, key_length - prefix, value, length, error);
    if (is(key, key_length, "GNU.sparse.major")) {
        pax->sparse_v1 = is(value, length, "1");
        if (!pax->sparse_v1 && !is(value, length, "0"))
            return tar_fail(error, "unknown sparse format");
        return 0;
    }
    if (is(key, key_length, "GNU.sparse.minor"))
        return 0; /* 0.0, 0.1 and 1.0 are told apart by their records */
    if (is(key, key_length, "GNU.sparse.map")) {
        pax->sparse_v0 = true;
        return parse_sparse_map(value, length, map, error);
    }
    if (is(key, key_length, "GNU.sparse.offset") || is(key, key_length, "GNU.sparse.numbytes")) {
        uint64_t number;
        bool is_offset = is(key, key_length, "GNU.sparse.offset");
        if (tar_decimal(value, length, &number) < 0 || pax->half_extent == is_offset)
            return tar_fail(error, "malformed sparse record");
        pax->sparse_v0 = true;
        pax->half_extent = is_offset;
        if (is_offset)
            pax->half_offset = number;
        else
            return tar_map_add(map, pax->half_offset, number, error);
    }
    return 0;
}

int tar_pax_parse(struct tar_pax *pax, char *text, size_t length, struct tar_map *map, struct tar_error *error) {
    *pax = (struct tar_pax){0};
    map->count = 0;
    while (length && text[0]) { /* some writers pad with NULs */
        char *space = memchr(text, ' ', length < 21 ? length : 21);
        uint64_t size;
        if (!space || tar_decimal(text, (size_t)(space - text), &size) < 0 || size > length)
            return tar_fail(error, "malformed extended header");
        size_t head = (size_t)(space - text) + 1;
        if (size < head + 2 || text[size - 1] != '\n')
            return tar_fail(error, "malformed extended header");
        char *key = space + 1, *end = text + size - 1;
        char *equals = memchr(key, '=', (size_t)(end - key));
        if (!equals || equals == key || memchr(key, 0, (size_t)(equals - key)))
            return tar_fail(error, "malformed extended header");
        *equals = 0;
        *end = 0;
        if (apply(pax, key, (size_t)(equals - key), equals + 1, (size_t)(end - equals - 1), map, error) < 0)
            return -1;
        text += size;
        length -= size;
    }
    return pax->half_extent ? tar_fail(error, "malformed sparse record") : 0;
}
