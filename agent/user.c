#include "user.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FIELDS = 7 };

struct text {
    const char *at;
    size_t size;
};

static bool same(struct text a, struct text b) { return a.size == b.size && memcmp(a.at, b.at, a.size) == 0; }

/* Cut the first piece off `rest`, up to the separator; false when nothing is left. */
static bool cut(struct text *rest, char separator, struct text *piece)
{
    if (!rest->at)
        return false;
    const char *end = rest->size ? memchr(rest->at, separator, rest->size) : NULL;
    piece->at = rest->at;
    piece->size = end ? (size_t)(end - rest->at) : rest->size;
    rest->at = end ? end + 1 : NULL;
    rest->size -= piece->size + (end != NULL);
    return true;
}

static size_t fields(struct text line, struct text field[FIELDS])
{
    size_t count = 0;
    while (count < FIELDS && cut(&line, ':', &field[count]))
        count++;
    return count;
}

/* A decimal id; 2^32-1 means "no change" to the kernel and is no id. */
static bool number(struct text text, uint32_t *value)
{
    uint64_t sum = 0;
    if (text.size == 0 || text.size > 10)
        return false;
    for (size_t i = 0; i < text.size; i++) {
        if (text.at[i] < '0' || text.at[i] > '9')
            return false;
        sum = sum * 10 + (uint64_t)(text.at[i] - '0');
    }
    *value = (uint32_t)sum;
    return sum < UINT32_MAX;
}

static bool has_member(struct text members, struct text name)
{
    struct text member;
    while (cut(&members, ',', &member))
        if (same(member, name))
            return true;
    return false;
}

static void add_group(struct user *user, gid_t gid)
{
    for (size_t i = 0; i < user->group_count; i++)
        if (user->groups[i] == gid)
            return;
    if (user->group_count < USER_GROUPS)
        user->groups[user->group_count++] = gid;
}

/* Find the user; `name` becomes the entry's name, or stays empty when a bare number has no entry. */
static const char *find_user(struct text wanted, struct text passwd, struct user *user, struct text *name)
{
    uint32_t id = 0;
    bool numeric = wanted.size == 0 || number(wanted, &id);
    struct text line, field[FIELDS];
    while (cut(&passwd, '\n', &line)) {
        uint32_t uid, gid;
        if (fields(line, field) < 6 || field[0].size == 0 || !number(field[2], &uid) || !number(field[3], &gid))
            continue;
        if (numeric ? uid != id : !same(field[0], wanted))
            continue;
        user->uid = uid;
        user->gid = gid;
        *name = field[0];
        if (field[5].size > 0 && field[5].size < sizeof user->home && !memchr(field[5].at, 0, field[5].size)) {
            memcpy(user->home, field[5].at, field[5].size);
            user->home[field[5].size] = 0;
        }
        return NULL;
    }
    user->uid = id;
    return numeric ? NULL : "no such user in /etc/passwd";
}

static const char *find_group(struct text wanted, struct text group, struct user *user)
{
    uint32_t id, gid;
    struct text line, field[FIELDS];
    if (number(wanted, &id)) {
        user->gid = id;
        return NULL;
    }
    while (cut(&group, '\n', &line))
        if (fields(line, field) >= 3 && same(field[0], wanted) && number(field[2], &gid)) {
            user->gid = gid;
            return NULL;
        }
    return "no such group in /etc/group";
}

static void find_memberships(struct text name, struct text group, struct user *user)
{
    uint32_t gid;
    struct text line, field[FIELDS];
    while (cut(&group, '\n', &line))
        if (fields(line, field) >= 4 && number(field[2], &gid) && has_member(field[3], name))
            add_group(user, gid);
}

const char *user_resolve(const char *spec, const char *passwd, size_t passwd_size, const char *group, size_t group_size,
                         struct user *user)
{
    struct text rest = {spec, strlen(spec)}, wanted, wanted_group = {0}, name = {0};
    struct text groups = {group, group_size};
    cut(&rest, ':', &wanted);
    bool explicit_group = cut(&rest, ':', &wanted_group) && wanted_group.size > 0;
    if (rest.at)
        return "not of the form user[:group]";
    *user = (struct user){.home = "/"};
    const char *wrong = find_user(wanted, (struct text){passwd, passwd_size}, user, &name);
    if (wrong)
        return wrong;
    if (explicit_group)
        return find_group(wanted_group, groups, user);
    if (name.size > 0)
        find_memberships(name, groups, user);
    return NULL;
}

static const char *read_file(const char *path, char **bytes, size_t *size)
{
    *bytes = NULL;
    *size = 0;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    if (fd < 0)
        return errno == ENOENT || errno == ENOTDIR ? NULL : "the user database cannot be opened";
    struct stat status;
    const char *wrong = NULL;
    if (fstat(fd, &status) < 0 || !S_ISREG(status.st_mode) || status.st_size > USER_FILE_MAX)
        wrong = "the user database is not a regular file of at most 1 MiB";
    else if (!(*bytes = malloc(USER_FILE_MAX)))
        wrong = "out of memory";
    while (!wrong && *size < USER_FILE_MAX) {
        ssize_t n = read(fd, *bytes + *size, USER_FILE_MAX - *size);
        if (n < 0)
            wrong = "the user database cannot be read";
        if (n <= 0)
            break;
        *size += (size_t)n;
    }
    close(fd);
    return wrong;
}

const char *user_find(const char *spec, struct user *user)
{
    char *passwd, *group = NULL;
    size_t passwd_size, group_size = 0;
    const char *wrong = read_file("/etc/passwd", &passwd, &passwd_size);
    if (!wrong)
        wrong = read_file("/etc/group", &group, &group_size);
    if (!wrong)
        wrong = user_resolve(spec, passwd, passwd_size, group, group_size, user);
    free(passwd);
    free(group);
    return wrong;
}
