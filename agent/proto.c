#include "proto.h"

#include <stdlib.h>
#include <string.h>

static bool id_legal(const uint8_t *id)
{
    size_t i = 0;
    while (i < ID_SIZE &&
           ((id[i] >= '0' && id[i] <= '9') || (id[i] >= 'A' && id[i] <= 'Z') || (id[i] >= 'a' && id[i] <= 'z')))
        i++;
    while (i < ID_SIZE && id[i] == 0)
        i++;
    return i == ID_SIZE;
}

long frame_parse(uint8_t *bytes, size_t size, struct frame *frame)
{
    frame->length = 0;
    if (size < FRAME_HEADER)
        return 0;
    frame->length = get32(bytes);
    frame->type = bytes[4];
    frame->stream = bytes[5];
    frame->req = get32(bytes + 8);
    memcpy(frame->id, bytes + 12, ID_SIZE);
    frame->payload = bytes + FRAME_HEADER;
    if (frame->length > FRAME_PAYLOAD_MAX || frame->type == 0 || frame->type > REQUEST_LAST || frame->stream > 2 ||
        get16(bytes + 6) != 0 || !id_legal(bytes + 12))
        return -1;
    if (size - FRAME_HEADER < frame->length)
        return 0;
    return FRAME_HEADER + (long)frame->length;
}

uint8_t *frame_header(uint8_t *to, uint8_t type, uint8_t stream, uint32_t req, const char *id, uint32_t length)
{
    uint8_t *p = put32(to, length);
    *p++ = type;
    *p++ = stream;
    p = put32(put16(p, 0), req);
    if (id)
        memcpy(p, id, ID_SIZE);
    else
        memset(p, 0, ID_SIZE);
    return p + ID_SIZE;
}

enum attribute {
    A_ARGV = 1, A_ENV, A_CWD, A_USER, A_TTY, A_FLAGS, A_TIMEOUT, A_KILL_AFTER, A_LINGER, A_RLIMIT, A_FILEOP,
    A_LAST = A_FILEOP,
    A_HEADER = 8,
};

/* Exact sizes of the attributes of fixed size; 0 = text. */
static const uint8_t attribute_size[A_LAST + 1] = {
    [A_TTY] = 4, [A_FLAGS] = 4, [A_TIMEOUT] = 8, [A_KILL_AFTER] = 8, [A_LINGER] = 8, [A_RLIMIT] = 24,
};

static const char *attribute_check(unsigned tag, const uint8_t *value, uint32_t length)
{
    if (attribute_size[tag])
        return attribute_size[tag] == length ? NULL : "an attribute has the wrong size";
    if (memchr(value, 0, length) && !(tag == A_FILEOP && memchr(value + 1, 0, length - 1) == NULL))
        return "an argument, variable, path or user contains a NUL byte";
    if (tag == A_ENV && (length == 0 || value[0] == '=' || !memchr(value, '=', length)))
        return "an environment entry is not NAME=value";
    if (tag == A_FILEOP && (length < 2 || value[0] < 1 || value[0] > 6))
        return "bad file operation";
    return NULL;
}

/* Terminate a text in place: it moves one byte down, over its own header, which has been read. */
static char *attribute_text(uint8_t *value, uint32_t length)
{
    char *text = (char *)value - 1;
    memmove(text, value, length);
    text[length] = 0;
    return text;
}

const char *start_parse(uint8_t *bytes, size_t size, struct start_request *request)
{
    size_t count[A_LAST + 1] = {0};
    *request = (struct start_request){.cwd = "/", .user = "", .kill_after_ms = 2000, .linger_ms = 300};

    for (size_t at = 0; at < size;) {
        if (size - at < A_HEADER)
            return "an attribute is cut short";
        unsigned tag = get16(bytes + at);
        uint32_t length = get32(bytes + at + 4);
        if (tag == 0 || tag > A_LAST || get16(bytes + at + 2) != 0)
            return "unknown attribute";
        if (length > size - at - A_HEADER)
            return "an attribute is cut short";
        const char *wrong = attribute_check(tag, bytes + at + A_HEADER, length);
        if (wrong)
            return wrong;
        if (count[tag]++ && tag != A_ARGV && tag != A_ENV && tag != A_RLIMIT)
            return "an attribute is repeated";
        at += A_HEADER + length;
    }
    if ((count[A_ARGV] == 0) == (count[A_FILEOP] == 0))
        return count[A_ARGV] ? "a file operation has no arguments" : "no command";
    if (count[A_FILEOP] && count[A_TTY])
        return "a file operation has no terminal";

    request->argv = calloc(count[A_ARGV] + 1, sizeof *request->argv);
    request->env = calloc(count[A_ENV] + 2, sizeof *request->env);
    request->limits = calloc(count[A_RLIMIT] + 1, sizeof *request->limits);
    if (!request->argv || !request->env || !request->limits) {
        start_free(request);
        return "out of memory";
    }
    size_t arguments = 0;
    for (size_t at = 0; at < size;) {
        unsigned tag = get16(bytes + at);
        uint32_t length = get32(bytes + at + 4);
        uint8_t *value = bytes + at + A_HEADER;
        at += A_HEADER + length;
        switch (tag) {
        case A_ARGV: request->argv[arguments++] = attribute_text(value, length); break;
        case A_ENV: request->env[request->env_count++] = attribute_text(value, length); break;
        case A_CWD: request->cwd = attribute_text(value, length); break;
        case A_USER: request->user = attribute_text(value, length); break;
        case A_TTY:
            request->tty = true;
            request->rows = get16(value);
            request->cols = get16(value + 2);
            break;
        case A_FLAGS: request->flags = get32(value); break;
        case A_TIMEOUT: request->timeout_ms = get64(value); break;
        case A_KILL_AFTER: request->kill_after_ms = get64(value); break;
        case A_LINGER: request->linger_ms = get64(value); break;
        case A_RLIMIT:
            request->limits[request->limit_count++] =
                (struct start_limit){get32(value), get64(value + 8), get64(value + 16)};
            break;
        case A_FILEOP:
            request->file_op = value[0];
            request->file_path = attribute_text(value + 1, length - 1);
            break;
        }
    }
    return NULL;
}

void start_free(struct start_request *request)
{
    free(request->argv);
    free(request->env);
    free(request->limits);
    *request = (struct start_request){0};
}
