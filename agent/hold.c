/* The state of a machine is saved while its agent waits in `hold`. It goes on twice: here, by GO, and in the fork, by RESUME. All other
 * processes are frozen meanwhile by the kernel's own means, so that none runs in the fork before its entropy, its clock and its names are
 * its own, and none can tell. */
#include "hold.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cut.h"
#include "port.h"
#include "power.h"
#include "share.h"

#define OWN "hutch.fork"

enum { GROUPS = 64, ROUNDS = 100, FREEZE_MS = 2000 };

static int groups = -1; /* the root of the control groups */
static uint16_t asker;
static uint32_t asked;
static char frozen[GROUPS][256];
static size_t frozen_count;
static bool waiting; /* in a fork: nothing runs in it yet */

void hold_prepare(void) { groups = open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY | O_CLOEXEC); }

static bool write_file(const char *group, const char *name, const char *text)
{
    char path[300];
    snprintf(path, sizeof path, "%s/%s", group, name);
    int fd = openat(groups, path, O_WRONLY | O_CLOEXEC);
    bool done = fd >= 0 && write(fd, text, strlen(text)) > 0;
    if (fd >= 0)
        close(fd);
    return done;
}

static bool says(const char *group, const char *name, const char *text)
{
    char path[300], found[256];
    snprintf(path, sizeof path, "%s/%s", group, name);
    int fd = openat(groups, path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, found, sizeof found - 1);
    found[size < 0 ? 0 : size] = 0;
    if (fd >= 0)
        close(fd);
    return strstr(found, text) != NULL;
}

/* Move what may be moved to another group. Children are born where their parents are, so in the end nothing is left. */
static void move_all(const char *from, const char *to)
{
    bool moved = true;
    for (int round = 0; moved && round < ROUNDS; round++) {
        char path[300], line[32];
        moved = false;
        snprintf(path, sizeof path, "%s/cgroup.procs", from);
        int fd = openat(groups, path, O_RDONLY | O_CLOEXEC);
        FILE *file = fd < 0 ? NULL : fdopen(fd, "r");
        while (file && fgets(line, sizeof line, file)) {
            pid_t pid = (pid_t)atol(line);
            if (pid > 1 && getpgid(pid) > 0) /* the kernel's own threads are in no process group */
                moved |= write_file(to, "cgroup.procs", line);
        }
        if (file)
            fclose(file);
    }
}

static bool freeze_one(const char *group)
{
    if (frozen_count == GROUPS)
        return false;
    if (says(group, "cgroup.freeze", "1"))
        return true; /* by the box itself, and so it stays */
    snprintf(frozen[frozen_count], sizeof frozen[0], "%s", group);
    return write_file(frozen[frozen_count++], "cgroup.freeze", "1");
}

static void thaw(void)
{
    while (frozen_count > 0)
        write_file(frozen[--frozen_count], "cgroup.freeze", "0");
    move_all(OWN, ".");
    unlinkat(groups, OWN, AT_REMOVEDIR);
}

static bool freeze(void)
{
    if (groups < 0 || (mkdirat(groups, OWN, 0755) < 0 && errno != EEXIST))
        return false;
    move_all(".", OWN);
    bool done = true;
    int fd = openat(groups, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    for (struct dirent *file; directory && (file = readdir(directory));)
        if (file->d_type == DT_DIR && file->d_name[0] != '.')
            done &= freeze_one(file->d_name);
    if (directory)
        closedir(directory);
    for (size_t i = 0; i < frozen_count; i++)
        for (int waited = 0; !says(frozen[i], "cgroup.events", "frozen 1"); waited++, usleep(1000))
            if (waited == FREEZE_MS)
                return false;
    return done && directory;
}

void hold_ask(struct conn *conn, const struct frame *frame)
{
    if (!conn->number || groups < 0)
        conn_fail(conn, frame->req, frame->id, F_UNSUPPORTED, 0, "only a VM, whose kernel has control groups, can be forked");
    else if (power_stopping() || conn_find(asker))
        conn_fail(conn, frame->req, frame->id, F_BUSY, 0, "the box is stopping, or being forked already");
    else {
        asker = conn->number;
        asked = frame->req;
        port_tell(LINE_HOLD, asker, NULL, 0);
    }
}

void hold(void)
{
    struct conn *conn = conn_find(asker);
    struct line_frame next;
    uint8_t answer[FRAME_HEADER];
    asker = 0;
    if (!conn || !list_empty(&conn->out))
        return; /* it has gone, and the keeper holds nothing any more */
    if (!freeze() || !share_hold()) { /* in this order: what the frozen wait for must come first */
        share_go_on(false);
        thaw();
        conn_fail(conn, asked, NULL, F_BUSY, 0, "a process of the box, or one of its mounts, does not come to rest");
        return;
    }
    frame_header(answer, OK, 0, asked, NULL, 0);
    conn->credit -= sizeof answer;
    port_tell(LINE_DATA, conn->number, answer, sizeof answer);
    do
        port_read(&next);
    while (next.type != LINE_GO && next.type != LINE_RESUME);
    waiting = next.type == LINE_RESUME;
    if (waiting) {
        conn_lose_all();
        guest_become((char *)next.payload, next.length);
        cut();
        port_tell(LINE_UP, 0, NULL, 0);
    } else {
        share_go_on(false);
        thaw();
    }
}

void hold_end(void)
{
    if (waiting)
        thaw();
    waiting = false;
}
