/* The tar modes alone, for tests/tar: `tar_main unpack|pack ...` and `tar_main files OP PATH`.
 * gcc -g -O1 -fsanitize=address,undefined -D_GNU_SOURCE -I agent agent/tests/tar_main.c agent/tar_*.c agent/unpack.c agent/pack.c agent/files.c agent/tunnel.c -o tar_main */
#include "agent.h"

#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "";
    if (strcmp(mode, "unpack") == 0)
        return cmd_unpack(argc - 1, argv + 1);
    if (strcmp(mode, "pack") == 0)
        return cmd_pack(argc - 1, argv + 1);
    if (strcmp(mode, "files") == 0 && argc == 4)
        return files_child(atoi(argv[2]), argv[3]);
    return 2;
}
