/* Fuzz the tar reader from memory, with a sink that checks what it promises.
 * clang -g -O1 -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE -I agent agent/tests/fuzz_tar.c agent/tar_read.c agent/tar_pax.c agent/tar_name.c -o fuzz_tar
 *
 * The first byte of the input chooses: 1 = put right the checksum of every block, so that mutations get past it; the
 * others cut the input into short reads. */
#include "tar.h"

#include <stdio.h>
#include <stdlib.h>

struct input {
    unsigned char *bytes;
    size_t size, at, step;
};

static ssize_t read_some(void *context, void *buffer, size_t size) {
    struct input *input = context;
    size_t count = input->size - input->at;
    if (count > size)
        count = size;
    if (input->step && count > input->step)
        count = input->step;
    memcpy(buffer, input->bytes + input->at, count);
    input->at += count;
    return (ssize_t)count;
}

static void put_checksums_right(struct input *input) {
    enum { AT = 148, SIZE = 8 };
    for (size_t at = 0; at + TAR_BLOCK <= input->size; at += TAR_BLOCK) {
        unsigned char *block = input->bytes + at;
        unsigned sum = 0, any = 0;
        for (int i = 0; i < TAR_BLOCK; i++) {
            sum += i >= AT && i < AT + SIZE ? ' ' : block[i];
            any |= block[i];
        }
        if (any)
            snprintf((char *)block + AT, SIZE, "%06o", sum);
    }
}

static void require(int condition) {
    if (!condition)
        abort();
}

static void check_name(const char *name) {
    require(strlen(name) <= TAR_PATH_MAX && name[0] != '/');
    for (const char *at = name; *at; at += *at == '/') {
        size_t size = strcspn(at, "/");
        require(size > 0 && size <= TAR_COMPONENT_MAX);
        require(!(size == 1 && at[0] == '.') && !(size == 2 && at[0] == '.' && at[1] == '.'));
        at += size;
        require(*at == 0 || at[1] != 0);
    }
}

static void check_member(const struct tar_member *m) {
    check_name(m->name);
    require((m->mode & ~07777u) == 0 && m->uid != UINT32_MAX && m->gid != UINT32_MAX && m->size <= INT64_MAX);
    require(m->mtime.tv_nsec >= 0 && m->mtime.tv_nsec < 1000000000);
    if (m->hard_link)
        check_name(m->link);
    if (m->type == S_IFLNK)
        require(m->link[0] && strlen(m->link) < TAR_PATH_MAX);
    for (size_t i = 0; i < m->n_xattrs; i++)
        require(m->xattrs[i].name[0] && m->xattrs[i].size <= TAR_XATTR_VALUE_MAX);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2)
        return 0;
    struct input input = {.bytes = malloc(size - 1), .size = size - 1, .step = data[0] >> 1};
    struct tar_error error = {0};
    struct tar_member member;
    volatile unsigned sum = 0;
    memcpy(input.bytes, data + 1, size - 1);
    if (data[0] & 1)
        put_checksums_right(&input);
    struct tar_reader *reader = tar_reader_new(read_some, &input, &error);
    int got;
    while ((got = tar_next(reader, &member)) > 0) {
        const void *piece;
        size_t length;
        uint64_t offset, end = 0;
        check_member(&member);
        while ((got = tar_content(reader, &piece, &length, &offset)) > 0) {
            require(length > 0 && offset >= end && offset <= member.size && length <= member.size - offset);
            end = offset + length;
            sum += ((const unsigned char *)piece)[0] + ((const unsigned char *)piece)[length - 1];
        }
        if (got < 0)
            break;
    }
    if (got < 0)
        require(error.cause[0] && strlen(error.member) <= 200);
    else
        tar_drain(reader);
    tar_reader_free(reader);
    free(input.bytes);
    return 0;
}
