/* Frames and START attributes. Built with agent/proto.c. */
#include <string.h>

#include "check.h"
#include "proto.h"

static size_t attribute(uint8_t *to, uint16_t tag, const void *value, uint32_t size)
{
    put32(put16(put16(to, tag), 0), size);
    memcpy(to + 8, value, size);
    return 8 + size;
}

static size_t text(uint8_t *to, uint16_t tag, const char *value) { return attribute(to, tag, value, (uint32_t)strlen(value)); }

static void frames(void)
{
    uint8_t bytes[64] = {0};
    struct frame frame;
    const char id[ID_SIZE] = "abcDEF09";
    memcpy(frame_header(bytes, PING, 2, 0x01020304, id, 3), "xyz", 3);
    for (size_t size = 0; size < FRAME_HEADER + 3; size++)
        CHECK(frame_parse(bytes, size, &frame) == 0);
    CHECK(frame_parse(bytes, sizeof bytes, &frame) == FRAME_HEADER + 3);
    CHECK(frame.type == PING && frame.stream == 2 && frame.req == 0x01020304 && frame.length == 3);
    CHECK(memcmp(frame.id, id, ID_SIZE) == 0 && memcmp(frame.payload, "xyz", 3) == 0);

    const struct {
        size_t at;
        uint8_t value;
    } bad[] = {{2, 0x11}, {4, 0}, {4, REQUEST_LAST + 1}, {4, 64}, {5, 3}, {6, 1}, {7, 1}, {12, '-'}, {14, 0}, {12, 0x80}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint8_t copy[sizeof bytes];
        memcpy(copy, bytes, sizeof copy);
        copy[bad[i].at] = bad[i].value;
        CHECK(frame_parse(copy, FRAME_HEADER, &frame) == -1);
    }
    frame_header(bytes, STDIN, 0, 0, NULL, FRAME_PAYLOAD_MAX);
    CHECK(frame_parse(bytes, FRAME_HEADER, &frame) == 0 && frame.length == FRAME_PAYLOAD_MAX);
}

static void numbers(void)
{
    uint8_t bytes[8];
    put64(bytes, 0x8877665544332211u);
    CHECK(bytes[0] == 0x11 && bytes[7] == 0x88 && get64(bytes) == 0x8877665544332211u);
    CHECK(get32(bytes + 4) == 0x88776655u && get16(bytes + 6) == 0x8877);
}

static void whole_start(void)
{
    uint8_t bytes[1024], wide[24];
    struct start_request request;
    size_t size = text(bytes, 1, "sh");
    size += text(bytes + size, 2, "A=b");
    size += text(bytes + size, 1, "");
    size += text(bytes + size, 3, "/tmp");
    size += text(bytes + size, 4, "");
    put16(put16(wide, 24), 80);
    size += attribute(bytes + size, 5, wide, 4);
    put32(wide, START_STDIN | START_WATCH);
    size += attribute(bytes + size, 6, wide, 4);
    for (uint16_t tag = 7; tag <= 9; tag++) {
        put64(wide, UINT64_MAX - tag);
        size += attribute(bytes + size, tag, wide, 8);
    }
    put64(put64(put64(wide, 7), 1), 2);
    size += attribute(bytes + size, 10, wide, 24);
    size += text(bytes + size, 1, "last");
    CHECK(start_parse(bytes, size, &request) == NULL);
    CHECK(strcmp(request.argv[0], "sh") == 0 && strcmp(request.argv[1], "") == 0);
    CHECK(strcmp(request.argv[2], "last") == 0 && request.argv[3] == NULL);
    CHECK(request.env_count == 1 && strcmp(request.env[0], "A=b") == 0 && request.env[1] == NULL);
    CHECK(strcmp(request.cwd, "/tmp") == 0 && strcmp(request.user, "") == 0);
    CHECK(request.tty && request.rows == 24 && request.cols == 80 && request.flags == 5);
    CHECK(request.timeout_ms == UINT64_MAX - 7 && request.kill_after_ms == UINT64_MAX - 8);
    CHECK(request.linger_ms == UINT64_MAX - 9);
    CHECK(request.limit_count == 1 && request.limits[0].resource == 7 && request.limits[0].hard == 2);
    start_free(&request);
}

static void defaults_and_files(void)
{
    uint8_t bytes[256];
    struct start_request request;
    size_t size = attribute(bytes, 11, "\1/etc", 5);
    CHECK(start_parse(bytes, size, &request) == NULL);
    CHECK(request.file_op == 1 && strcmp(request.file_path, "/etc") == 0 && request.argv[0] == NULL);
    CHECK(strcmp(request.cwd, "/") == 0 && request.kill_after_ms == 2000 && request.linger_ms == 300);
    CHECK(request.timeout_ms == 0 && request.flags == 0 && !request.tty);
    start_free(&request);
}

static void refused(void)
{
    uint8_t bytes[256];
    struct start_request request;
    const struct {
        uint16_t tag;
        const char *value;
        uint32_t size;
    } bad[] = {{0, "", 0},       {12, "", 0},        {1, "a\0b", 3},   {2, "novalue", 7}, {2, "=x", 2},   {2, "", 0},
               {3, "a\0", 2},    {4, "\0", 1},       {5, "123", 3},    {6, "12345", 5},   {7, "1234", 4}, {8, "", 0},
               {10, "12345", 5}, {11, "\1", 1},      {11, "\5/a", 3},  {11, "\0/a", 3},   {11, "\1a\0b", 4}};
    CHECK(start_parse(bytes, 0, &request) != NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        size_t size = text(bytes, 1, "sh");
        size += attribute(bytes + size, bad[i].tag, bad[i].value, bad[i].size);
        CHECK(start_parse(bytes, size, &request) != NULL);
    }
    size_t size = text(bytes, 1, "sh");
    size += text(bytes + size, 3, "/");
    size_t twice = size + text(bytes + size, 3, "/");
    CHECK(start_parse(bytes, twice, &request) != NULL);
    for (size_t cut = 1; cut < 10; cut++)
        CHECK(start_parse(bytes, cut, &request) != NULL);
    put32(bytes + 4, UINT32_MAX);
    CHECK(start_parse(bytes, size, &request) != NULL);
}

int main(void)
{
    frames();
    numbers();
    whole_start();
    defaults_and_files();
    refused();
}
