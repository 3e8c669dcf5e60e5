/* libFuzzer: the frame parser and the START attributes. Built with agent/proto.c. */
#include <stdlib.h>
#include <string.h>

#include "proto.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *bytes = malloc(size ? size : 1);
    struct frame frame;
    memcpy(bytes, data, size);
    for (size_t at = 0;;) {
        long taken = frame_parse(bytes + at, size - at, &frame);
        if (taken <= 0)
            break;
        if ((size_t)taken > size - at || frame.payload + frame.length > bytes + size)
            abort();
        at += (size_t)taken;
    }
    struct start_request request;
    if (!start_parse(bytes, size, &request)) {
        size_t total = strlen(request.cwd) + strlen(request.user);
        for (char **item = request.argv; *item; item++)
            total += strlen(*item);
        for (char **item = request.env; *item; item++)
            if (!strchr(*item, '='))
                abort();
        if (total > size || (!request.file_op && !request.argv[0]))
            abort();
        request.env[request.env_count + 1] = NULL; /* the spare slot is there */
        start_free(&request);
    }
    free(bytes);
    return 0;
}
