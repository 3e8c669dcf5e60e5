/* Stand-ins for modes that are not linked in. */
#include <stdio.h>
#include "agent.h"
#define ABSENT(name) \
    __attribute__((weak)) int name(int argc, char **argv) { (void)argc; fprintf(stderr, "%s: not built\n", argv[0]); return 2; }
ABSENT(cmd_launch)
ABSENT(cmd_mapped)
ABSENT(cmd_unpack)
ABSENT(cmd_pack)
__attribute__((weak)) int files_child(int op, const char *path) { (void)op; fprintf(stderr, "%s: not built\n", path); return 1; }
