/* libFuzzer: the frames of a VM's line. Built with agent/proto.c. */
#include <stdlib.h>
#include <string.h>

#include "line.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *bytes = malloc(size ? size : 1);
    struct line_frame frame;
    memcpy(bytes, data, size);
    for (size_t at = 0;;) {
        long taken = line_parse(bytes + at, size - at, &frame);
        if (taken <= 0)
            break;
        if ((size_t)taken > size - at || frame.payload + frame.length > bytes + size || frame.length > LINE_DATA_MAX)
            abort();
        at += (size_t)taken;
    }
    free(bytes);
    return 0;
}
