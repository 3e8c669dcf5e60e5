/* Names and errors of tar members. */
#include "tar.h"

#include <stdarg.h>
#include <stdio.h>

void tar_error_member(struct tar_error *error, const char *name, size_t length) {
    char *out = error->member, *limit = error->member + sizeof error->member - 4;
    for (size_t i = 0; i < length && name[i] && out < limit; i++) {
        unsigned char c = (unsigned char)name[i];
        if (c > ' ' && c < 0x7f && c != '\\')
            *out++ = (char)c;
        else if (out + 4 <= limit)
            out += snprintf(out, 5, "\\x%02x", c);
        else
            break;
    }
    *out = 0;
}

void tar_error_set(struct tar_error *error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->cause, sizeof error->cause, format, arguments);
    va_end(arguments);
}

void tar_error_print(const struct tar_error *error) {
    fprintf(stderr, "%s: %s\n", error->member[0] ? error->member : "archive", error->cause);
}

int tar_name_clean(char *name, size_t length, struct tar_error *error) {
    if (memchr(name, 0, length))
        return tar_fail(error, "name contains NUL");
    if (length > TAR_PATH_MAX)
        return tar_fail(error, "name is longer than %d bytes", TAR_PATH_MAX);
    size_t out = 0;
    for (size_t at = 0; at < length;) {
        const char *start = name + at;
        size_t size = 0;
        while (at < length && name[at] != '/')
            at++, size++;
        at++; /* the slash */
        if (size == 0 || (size == 1 && start[0] == '.'))
            continue;
        if (size == 2 && start[0] == '.' && start[1] == '.')
            return tar_fail(error, "'..' in a name is refused");
        if (size > TAR_COMPONENT_MAX)
            return tar_fail(error, "name component is longer than 255 bytes");
        if (out)
            name[out++] = '/';
        memmove(name + out, start, size); /* out never overtakes start */
        out += size;
    }
    name[out] = 0;
    return 0;
}
