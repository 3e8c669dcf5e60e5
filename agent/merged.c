/* Running host commands that see the layers of an image as one tree. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LAYER_MAX = 500, NAME_ROOM = 16 };

/* An overlay of layers, topmost first, at POINT/root, read-only; the names of the layers are short because they must fit on one page. */
static int mount_layers(const char *point, char *const layers[], int count, bool user)
{
    char options[LAYER_MAX * NAME_ROOM + 64], name[NAME_ROOM];
    char *end = options + sprintf(options, "lowerdir=");

    if (mount("tmpfs", point, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m") < 0 || chdir(point) < 0 || mkdir("root", 0755) < 0)
        return -1;
    for (int i = 0; i < count; i++) {
        snprintf(name, sizeof name, "l%d", i);
        if (symlink(layers[i], name) < 0)
            return -1;
        end += sprintf(end, "%s%s", i ? ":" : "", name);
    }
    strcpy(end, user ? ",userxattr" : "");
    if (mount("overlay", "root", "overlay", MS_RDONLY | MS_NODEV | MS_NOSUID, options) < 0)
        return -1;
    return 0;
}

/* box-agent merged [--userxattr] POINT LAYER LAYER ... -- COMMAND ...: nobody else sees the mount, and it goes away with the command, which ends with
 * the process that wanted it. */
int cmd_merged(int argc, char **argv)
{
    bool user = argc > 1 && strcmp(argv[1], "--userxattr") == 0;
    int count = 0;

    argv += user;
    argc -= user;
    while (count + 2 < argc && strcmp(argv[count + 2], "--") != 0)
        count++;
    if (count < 2 || count > LAYER_MAX || count + 3 >= argc) {
        fprintf(stderr, "usage: box-agent merged [--userxattr] POINT LAYER LAYER ... -- COMMAND [ARGUMENT ...]\n");
        return 2;
    }
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0
        || mount_layers(argv[1], argv + 2, count, user) < 0) {
        fprintf(stderr, "cannot join the layers: %s\n", strerror(errno));
        return 125;
    }
    execvp(argv[count + 3], argv + count + 3);
    fprintf(stderr, "cannot run %s: %s\n", argv[count + 3], strerror(errno));
    return errno == ENOENT ? 127 : 126;
}
