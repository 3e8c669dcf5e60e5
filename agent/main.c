/* box-agent: the one native program of Hutch. The first argument is the mode. */
#include <stdio.h>
#include <string.h>

#include "agent.h"

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
} modes[] = {
    {"agent", cmd_agent}, {"launch", cmd_launch}, {"vm", cmd_vm}, {"mapped", cmd_mapped}, {"disk", cmd_disk}, {"merged", cmd_merged},
    {"unpack", cmd_unpack}, {"pack", cmd_pack}, {"door", cmd_door},
};

int main(int argc, char **argv)
{
    if (argc > 0 && strcmp(argv[0], "/init") == 0)
        return cmd_init(argc, argv);
    for (size_t i = 0; argc > 1 && i < sizeof modes / sizeof modes[0]; i++)
        if (strcmp(argv[1], modes[i].name) == 0)
            return modes[i].run(argc - 1, argv + 1);
    fprintf(stderr, "usage: box-agent agent|launch|vm|mapped|disk|merged|unpack|pack|door ...\n");
    return 2;
}
