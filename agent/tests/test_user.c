/* passwd and group lookups. Built with agent/user.c. */
#include <string.h>

#include "check.h"
#include "user.h"

static const char passwd[] = "# comment\n"
                             "broken:x:1\n"
                             "root:x:0:0:root:/root:/bin/sh\n"
                             "bad:x:-1:0::/:/bin/sh\n"
                             "huge:x:4294967295:0::/:/bin/sh\n"
                             "app:x:1000:1001:App:/home/app:/bin/sh\n"
                             "app:x:7:7:second:/second:/bin/sh\n"
                             "1234:x:55:55::/numeric:/bin/sh\n"
                             "nohome:x:8:8:::\n"
                             "last:x:9:9::/last:/bin/sh";
static const char group[] = "root:x:0:\nadm:x:4:app,other\nstaff:x:50:other,app\nagain:x:4:app\nprefix:x:60:apple,ap\napp:x:1001:\n"
                            "wheel:x:10:root,app";

static struct user user;

static const char *resolve(const char *spec)
{
    return user_resolve(spec, passwd, sizeof passwd - 1, group, sizeof group - 1, &user);
}

static void is(const char *spec, uid_t uid, gid_t gid, size_t groups, const char *home)
{
    CHECK(resolve(spec) == NULL);
    CHECK(user.uid == uid && user.gid == gid && user.group_count == groups && strcmp(user.home, home) == 0);
}

int main(void)
{
    is("", 0, 0, 1, "/root");
    is("root", 0, 0, 1, "/root");
    is("app", 1000, 1001, 3, "/home/app");
    CHECK(user.groups[0] == 4 && user.groups[1] == 50 && user.groups[2] == 10);
    is("1000", 1000, 1001, 3, "/home/app");
    is("app:staff", 1000, 50, 0, "/home/app");
    is("app:77", 1000, 77, 0, "/home/app");
    is("app:", 1000, 1001, 3, "/home/app");
    is("1234", 1234, 0, 0, "/");
    is("4294967294:4294967294", 4294967294u, 4294967294u, 0, "/");
    is("nohome", 8, 8, 0, "/");
    is("last", 9, 9, 0, "/last");
    is(":staff", 0, 50, 0, "/root");
    const char *bad[] = {"who", "root:who", "4294967295", "99999999999", "-1", "a:b:c", "bad", "huge", "broken", "0:4294967295", " 0"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(resolve(bad[i]) != NULL);
    CHECK(user_resolve("", NULL, 0, NULL, 0, &user) == NULL && user.uid == 0 && strcmp(user.home, "/") == 0);
    CHECK(user_resolve("root", "", 0, "", 0, &user) != NULL);

    /* More memberships than there is room for, and a home that does not fit. */
    static char many[USER_GROUPS * 40], entry[4096];
    size_t size = 0;
    for (int i = 0; i < USER_GROUPS * 2; i++)
        size += (size_t)snprintf(many + size, sizeof many - size, "g%d:x:%d:u\n", i, 5000 + i);
    int length = snprintf(entry, sizeof entry, "u:x:1:1::/%02000d:\n", 0);
    CHECK(user_resolve("u", entry, (size_t)length, many, size, &user) == NULL);
    CHECK(user.group_count == USER_GROUPS && strcmp(user.home, "/") == 0);
}
