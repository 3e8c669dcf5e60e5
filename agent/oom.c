#include "oom.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "port.h"

uint64_t oom_kills(void)
{
    static const char KEY[] = "\noom_kill ";
    static int fd = -1; /* stays open: each command asks */
    char text[8192];
    if (!port_used() || (fd < 0 && (fd = open("/proc/vmstat", O_RDONLY | O_CLOEXEC)) < 0))
        return 0;
    ssize_t size = pread(fd, text, sizeof text - 1, 0);
    text[size < 0 ? 0 : size] = 0;
    char *found = strstr(text, KEY);
    return found ? strtoull(found + sizeof KEY - 1, NULL, 10) : 0;
}
