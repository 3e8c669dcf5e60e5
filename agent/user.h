/* Who a command runs as: `user[:group]` looked up in the box's own passwd and group files. Own parser: the files are hostile. */
#ifndef HUTCH_USER_H
#define HUTCH_USER_H

#include <stddef.h>
#include <sys/types.h>

enum { USER_GROUPS = 256, USER_FILE_MAX = 1 << 20 };

struct user {
    uid_t uid;
    gid_t gid;
    gid_t groups[USER_GROUPS];
    size_t group_count;
    char home[1024];
};

/* Pure. As Docker: "" is uid 0; a number is always an id and needs no entry (gid 0 then); an explicit group replaces the supplementary
 * groups. Returns NULL, or why not. */
const char *user_resolve(const char *spec, const char *passwd, size_t passwd_size, const char *group, size_t group_size,
                         struct user *user);

/* The same with the files read from `/etc`. An absent file is an empty one; one that is not regular or is larger than 1 MiB is an error. */
const char *user_find(const char *spec, struct user *user);

#endif
