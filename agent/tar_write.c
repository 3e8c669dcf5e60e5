/* The tar writer: POSIX.1-2017 pax interchange format, with an extended header only where ustar is too small. The same
 * calls give the same bytes. */
#include "tar.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { BUFFER = 256 * 1024, NAME_FIELD = 100, ID_MAX = 07777777 };
static const uint64_t size_field_max = 077777777777;

struct text {
    char *bytes;
    size_t length, room;
    bool failed;
};

struct tar_writer {
    int fd;
    struct tar_error *error;
    struct text records, map;
    size_t used;
    unsigned char buffer[BUFFER];
};

struct tar_writer *tar_writer_new(int fd, struct tar_error *error) {
    struct tar_writer *writer = calloc(1, sizeof *writer);
    if (writer) {
        writer->fd = fd;
        writer->error = error;
    }
    return writer;
}

void tar_writer_free(struct tar_writer *writer) {
    if (!writer)
        return;
    free(writer->records.bytes);
    free(writer->map.bytes);
    free(writer);
}

static int write_out(struct tar_writer *w, const unsigned char *bytes, size_t size) {
    while (size) {
        ssize_t wrote = write(w->fd, bytes, size);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote < 0)
            return tar_fail_errno(w->error, "cannot write the archive");
        bytes += wrote;
        size -= (size_t)wrote;
    }
    return 0;
}

int tar_put_content(struct tar_writer *w, const void *data, size_t size) {
    if (size > sizeof w->buffer - w->used) {
        size_t used = w->used;
        w->used = 0;
        if (write_out(w, w->buffer, used) < 0)
            return -1;
    }
    if (size >= sizeof w->buffer)
        return write_out(w, data, size);
    memcpy(w->buffer + w->used, data, size);
    w->used += size;
    return 0;
}

int tar_put_padding(struct tar_writer *w, uint64_t size) {
    static const unsigned char zeros[TAR_BLOCK];
    return tar_put_content(w, zeros, (size_t)(-size % TAR_BLOCK));
}

int tar_put_end(struct tar_writer *w) {
    static const unsigned char zeros[2 * TAR_BLOCK];
    if (tar_put_content(w, zeros, sizeof zeros) < 0)
        return -1;
    size_t used = w->used;
    w->used = 0;
    return write_out(w, w->buffer, used);
}

/* ---- text ---- */

static void append(struct text *text, const void *bytes, size_t size) {
    if (text->failed || size > SIZE_MAX / 4 - text->length) {
        text->failed = true;
        return;
    }
    if (text->room < text->length + size) {
        size_t room = (text->length + size) * 2;
        char *grown = realloc(text->bytes, room);
        if (!grown) {
            text->failed = true;
            return;
        }
        text->bytes = grown;
        text->room = room;
    }
    memcpy(text->bytes + text->length, bytes, size);
    text->length += size;
}

__attribute__((format(printf, 2, 3))) static void append_format(struct text *text, const char *format, ...) {
    char line[128];
    va_list arguments;
    va_start(arguments, format);
    int size = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    append(text, line, (size_t)size);
}

static size_t digits(size_t number) {
    size_t count = 1;
    while (number /= 10)
        count++;
    return count;
}

/* "LENGTH KEY=VALUE\n", where the length counts itself. */
static void record(struct text *text, const char *prefix, const char *key, const void *value, size_t size) {
    size_t rest = 1 + strlen(prefix) + strlen(key) + 1 + size + 1, length = rest + digits(rest);
    if (rest + digits(length) != length)
        length = rest + digits(length);
    char number[24];
    append(text, number, (size_t)snprintf(number, sizeof number, "%zu ", length));
    append(text, prefix, strlen(prefix));
    append(text, key, strlen(key));
    append(text, "=", 1);
    append(text, value, size);
    append(text, "\n", 1);
}

static void record_number(struct text *text, const char *key, uint64_t number) {
    char value[24];
    record(text, "", key, value, (size_t)snprintf(value, sizeof value, "%llu", (unsigned long long)number));
}

static void record_time(struct text *text, const struct timespec *time) {
    char value[48];
    long long seconds = time->tv_sec;
    long nanos = time->tv_nsec;
    const char *sign = seconds < 0 ? "-" : "";
    if (seconds < 0 && nanos) { /* the fraction of a timespec counts upwards, that of a decimal number away from zero */
        seconds += 1;
        nanos = 1000000000 - nanos;
    }
    unsigned long long size = seconds < 0 ? 0 - (unsigned long long)seconds : (unsigned long long)seconds;
    int length = nanos ? snprintf(value, sizeof value, "%s%llu.%09ld", sign, size, nanos)
                       : snprintf(value, sizeof value, "%s%llu", sign, size);
    record(text, "", "mtime", value, (size_t)length);
}

/* ---- headers ---- */

/* Octal digits and a NUL; 0 for what stands in the extended header. */
static void put_octal(unsigned char *field, size_t size, uint64_t number) {
    if (number >> (3 * (size - 1)))
        number = 0;
    for (size_t i = size - 1; i--; number >>= 3)
        field[i] = (unsigned char)('0' + (number & 7));
}

static void put_text(unsigned char *field, const char *text) {
    memcpy(field, text, strnlen(text, NAME_FIELD));
}

static int put_header(struct tar_writer *w, char type, const char *name, const char *link, const struct tar_member *m,
                      uint64_t size) {
    unsigned char h[TAR_BLOCK] = {0};
    unsigned sum = 0;
    put_text(h, name);
    put_octal(h + 100, 8, m->mode);
    put_octal(h + 108, 8, m->uid);
    put_octal(h + 116, 8, m->gid);
    put_octal(h + 124, 12, size);
    put_octal(h + 136, 12, m->mtime.tv_sec < 0 ? 0 : (uint64_t)m->mtime.tv_sec);
    memset(h + 148, ' ', 8);
    h[156] = (unsigned char)type;
    put_text(h + 157, link);
    memcpy(h + 257, "ustar\0" "00", 8);
    put_octal(h + 329, 8, m->dev_major);
    put_octal(h + 337, 8, m->dev_minor);
    for (size_t i = 0; i < sizeof h; i++)
        sum += h[i];
    put_octal(h + 148, 7, sum);
    return tar_put_content(w, h, sizeof h);
}

static char type_of(const struct tar_member *m) {
    if (m->hard_link)
        return '1';
    switch (m->type) {
    case S_IFLNK:
        return '2';
    case S_IFCHR:
        return '3';
    case S_IFBLK:
        return '4';
    case S_IFDIR:
        return '5';
    case S_IFIFO:
        return '6';
    default:
        return '0';
    }
}

static const char *last_component(const char *name) {
    const char *slash = strrchr(name, '/');
    return slash ? slash + 1 : name;
}

static void describe_map(struct text *text, const struct tar_map *map, uint64_t *stored) {
    static const char zeros[TAR_BLOCK];
    text->length = 0;
    *stored = 0;
    append_format(text, "%zu\n", map->count);
    for (size_t i = 0; i < map->count; i++) {
        append_format(text, "%llu\n%llu\n", (unsigned long long)map->items[i].offset,
                      (unsigned long long)map->items[i].length);
        *stored += map->items[i].length;
    }
    append(text, zeros, -text->length % TAR_BLOCK);
    *stored += text->length;
}

int tar_put_member(struct tar_writer *w, const struct tar_member *m, const struct tar_map *map) {
    struct text *records = &w->records;
    const char *link = m->link ? m->link : "";
    char name[TAR_PATH_MAX + 2], short_name[TAR_PATH_MAX + 32];
    uint64_t stored = m->type == S_IFREG && !m->hard_link ? m->size : 0;
    snprintf(name, sizeof name, "%.*s%s", TAR_PATH_MAX, m->name, m->type == S_IFDIR ? "/" : "");
    records->length = 0;
    if (map) {
        describe_map(&w->map, map, &stored);
        record_number(records, "GNU.sparse.major", 1);
        record_number(records, "GNU.sparse.minor", 0);
        record(records, "", "GNU.sparse.name", name, strlen(name));
        record_number(records, "GNU.sparse.realsize", m->size);
        snprintf(short_name, sizeof short_name, "GNUSparseFile.0/%s", last_component(m->name));
    } else {
        snprintf(short_name, sizeof short_name, "%s", name);
        if (strlen(name) > NAME_FIELD)
            record(records, "", "path", name, strlen(name));
    }
    if (strlen(link) > NAME_FIELD)
        record(records, "", "linkpath", link, strlen(link));
    if (stored > size_field_max)
        record_number(records, "size", stored);
    if (m->uid > ID_MAX)
        record_number(records, "uid", m->uid);
    if (m->gid > ID_MAX)
        record_number(records, "gid", m->gid);
    if (m->mtime.tv_nsec || m->mtime.tv_sec < 0 || (uint64_t)m->mtime.tv_sec > size_field_max)
        record_time(records, &m->mtime);
    for (size_t i = 0; i < m->n_xattrs; i++)
        record(records, "SCHILY.xattr.", m->xattrs[i].name, m->xattrs[i].value, m->xattrs[i].size);
    if (records->failed || w->map.failed)
        return tar_fail(w->error, "out of memory");
    if (records->length) {
        static const struct tar_member plain = {.mode = 0644};
        char extension[TAR_PATH_MAX + 32];
        snprintf(extension, sizeof extension, "PaxHeaders/%s", last_component(m->name));
        if (put_header(w, 'x', extension, "", &plain, records->length) < 0 ||
            tar_put_content(w, records->bytes, records->length) < 0 || tar_put_padding(w, records->length) < 0)
            return -1;
    }
    if (put_header(w, type_of(m), short_name, link, m, stored) < 0)
        return -1;
    return map ? tar_put_content(w, w->map.bytes, w->map.length) : 0;
}
