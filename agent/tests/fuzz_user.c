/* libFuzzer: user specification, passwd and group, separated by NUL bytes. Built with agent/user.c. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "user.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct user user;
    const char *spec = "app", *passwd = (const char *)data;
    char *copy = NULL;
    const uint8_t *end = memchr(data, 0, size);
    if (end) {
        spec = copy = strdup((const char *)data);
        passwd = (const char *)end + 1;
    }
    size_t rest = size - (size_t)(passwd - (const char *)data);
    const char *split = rest ? memchr(passwd, 0, rest) : NULL;
    size_t passwd_size = split ? (size_t)(split - passwd) : rest;
    const char *group = split ? split + 1 : NULL;
    if (!user_resolve(spec, passwd, passwd_size, group, split ? rest - passwd_size - 1 : 0, &user))
        if (user.group_count > USER_GROUPS || !memchr(user.home, 0, sizeof user.home) || user.uid == (uid_t)-1 ||
            user.gid == (gid_t)-1)
            abort();
    free(copy);
    return 0;
}
