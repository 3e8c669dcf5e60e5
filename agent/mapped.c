/* Entering the user namespace of an ordinary user's boxes, and running host commands in it. */
#define _GNU_SOURCE
#include "agent.h"
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAP_WORDS = 48 };

static int write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    ssize_t put;
    int saved;

    if (fd < 0)
        return -1;
    put = write(fd, text, strlen(text));
    saved = errno;
    close(fd);
    errno = saved;
    return put == (ssize_t)strlen(text) ? 0 : -1;
}

/* Start the set-user-id helper `program PID WORD...`; the words are the numbers of the map. */
static pid_t start_mapper(const char *program, const char *pid, const char *map, const int go[2])
{
    pid_t child = fork();
    if (child)
        return child;

    close(go[1]); /* so that the end of the parent is seen */
    char *words = strdup(map);
    char *argv[MAP_WORDS + 3] = {(char *)program, (char *)pid};
    char *rest = NULL;
    char byte;
    int count = 2;

    for (char *word = strtok_r(words, " \n", &rest); word && count < MAP_WORDS + 2; word = strtok_r(NULL, " \n", &rest))
        argv[count++] = word;
    if (read(go[0], &byte, 1) != 1)
        _exit(126);
    execvp(program, argv);
    _exit(127);
}

static int wait_mapper(pid_t child)
{
    int status = -1;

    if (child < 0)
        return -1;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            return -1;
    if (status != 0)
        errno = WIFEXITED(status) && WEXITSTATUS(status) == 127 ? ENOENT : EPERM;
    return status == 0 ? 0 : -1;
}

/* Several ranges: only the set-user-id helpers may write them, from outside the namespace. Both run while we unshare. */
static int enter_with_helpers(const char *uid_map, const char *gid_map)
{
    char pid[16];
    int go[2];
    int result;

    snprintf(pid, sizeof pid, "%d", (int)getpid());
    if (pipe2(go, O_CLOEXEC) < 0)
        return -1;
    pid_t uids = start_mapper("newuidmap", pid, uid_map, go);
    pid_t gids = start_mapper("newgidmap", pid, gid_map, go);
    close(go[0]);
    result = unshare(CLONE_NEWUSER);
    if (result == 0 && write(go[1], "gg", 2) != 2)
        result = -1;
    close(go[1]);
    if (wait_mapper(uids) < 0)
        result = -1;
    if (wait_mapper(gids) < 0)
        result = -1;
    return result;
}

static int enter_alone(const char *uid_map, const char *gid_map)
{
    if (unshare(CLONE_NEWUSER) < 0 || write_file("/proc/self/setgroups", "deny") < 0)
        return -1;
    return write_file("/proc/self/uid_map", uid_map) < 0 ? -1 : write_file("/proc/self/gid_map", gid_map);
}

int mapped_enter(const char *uid_map, const char *gid_map)
{
    bool several = strchr(uid_map, '\n') && strchr(gid_map, '\n');

    if ((several ? enter_with_helpers(uid_map, gid_map) : enter_alone(uid_map, gid_map)) < 0)
        return -1;
    if (several && setgroups(0, NULL) < 0)
        return -1;
    return setresgid(0, 0, 0) < 0 ? -1 : setresuid(0, 0, 0);
}

/* box-agent mapped UID_MAP GID_MAP -- COMMAND ...: run a command as root of the namespace, so that it may handle files of box users. */
int cmd_mapped(int argc, char **argv)
{
    if (argc < 5 || strcmp(argv[3], "--") != 0) {
        fprintf(stderr, "usage: box-agent mapped UID_MAP GID_MAP -- COMMAND [ARGUMENT ...]\n");
        return 2;
    }
    if (mapped_enter(argv[1], argv[2]) < 0) {
        fprintf(stderr, "cannot make the user namespace: %s\n", strerror(errno));
        return 125;
    }
    execvp(argv[4], argv + 4);
    fprintf(stderr, "cannot run %s: %s\n", argv[4], strerror(errno));
    return errno == ENOENT ? 127 : 126;
}
