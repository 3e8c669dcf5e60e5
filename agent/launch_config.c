/* The launcher's configuration: one message of NUL-separated `key=value` records, with the descriptors attached to it. */
#define _GNU_SOURCE
#include "launch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CONFIG_MAX = 192 * 1024, FD_ROOM = 256 };

char *config_message(int control, int *fds, size_t room, size_t *count, size_t *length)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int) * FD_ROOM)];
    } space;
    struct msghdr message = {.msg_control = &space, .msg_controllen = CMSG_SPACE(sizeof(int) * room)};
    struct iovec part;
    ssize_t got;
    char *text = malloc(CONFIG_MAX);

    if (!text)
        launch_fail("memory for the configuration");
    part = (struct iovec){text, CONFIG_MAX};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    do
        got = recvmsg(control, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got <= 0 || (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) || text[got - 1] != '\0')
        launch_fail("receiving the configuration");
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (!header || header->cmsg_type != SCM_RIGHTS)
        launch_fail("receiving the descriptors");
    *count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    if (*count > room)
        launch_fail("too many descriptors");
    memcpy(fds, CMSG_DATA(header), *count * sizeof(int));
    *length = (size_t)got;
    return text;
}

bool config_next(char **rest, const char *end, const char **key, const char **value)
{
    if (*rest >= end)
        return false;
    char *equals = strchr(*rest, '=');
    errno = 0;
    if (!equals)
        launch_fail_about("malformed configuration record", *rest);
    *equals = '\0';
    *key = *rest;
    *value = equals + 1;
    *rest = equals + 1 + strlen(equals + 1) + 1;
    return true;
}

void *config_grow(void *items, size_t count, size_t size)
{
    items = realloc(items, (count + 1) * size);
    if (!items)
        launch_fail("memory for the configuration");
    return items;
}

static void add_lower(struct config *config, const char *path, bool shift)
{
    config->lowers = config_grow(config->lowers, config->lower_count, sizeof *config->lowers);
    config->lowers[config->lower_count++] = (struct lower){path, shift};
}

static void add_bind(struct config *config, const char *source, bool read_only)
{
    config->binds = config_grow(config->binds, config->bind_count, sizeof *config->binds);
    config->binds[config->bind_count++] = (struct bind){source, NULL, read_only};
}

static void take_record(struct config *config, const char *key, const char *value)
{
    const struct {
        const char *key;
        const char **value;
    } strings[] = {
        {"hostname", &config->hostname}, {"hosts", &config->hosts},         {"resolv", &config->resolv},
        {"stage", &config->stage},       {"upper", &config->upper},         {"work", &config->work},
        {"uid_map", &config->uid_map},   {"gid_map", &config->gid_map},     {"pids", &config->pids},
        {"disk", &config->disk},
    };
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++)
        if (!strcmp(key, strings[i].key)) {
            *strings[i].value = value;
            return;
        }
    if (!strcmp(key, "rootless"))
        config->rootless = !strcmp(value, "1");
    else if (!strcmp(key, "all_ids"))
        config->all_ids = !strcmp(value, "1");
    else if (!strcmp(key, "lower"))
        add_lower(config, value, false);
    else if (!strcmp(key, "lower_shift"))
        add_lower(config, value, true);
    else if (!strcmp(key, "bind_rw"))
        add_bind(config, value, false);
    else if (!strcmp(key, "bind_ro"))
        add_bind(config, value, true);
    else if (!strcmp(key, "target") && config->bind_count)
        config->binds[config->bind_count - 1].target = value;
    else if (!strcmp(key, "cgroup")) {
        config->cgroups = config_grow(config->cgroups, config->cgroup_count, sizeof *config->cgroups);
        config->cgroups[config->cgroup_count++] = value;
    } else {
        errno = 0;
        launch_fail_about("unknown configuration key", key);
    }
}

void config_receive(int control, struct config *config)
{
    const char *key, *value;
    size_t length, count;

    memset(config, 0, sizeof *config);
    config->text = config_message(control, config->fds, FD_COUNT, &count, &length);
    if (count != FD_COUNT)
        launch_fail("receiving the descriptors");
    for (char *rest = config->text; config_next(&rest, config->text + length, &key, &value);)
        take_record(config, key, value);
    errno = 0;
    if (!config->hostname || !config->hosts || !config->resolv || !config->stage || !config->upper || !config->work
        || !config->uid_map || !config->gid_map || !config->lower_count)
        launch_fail("incomplete configuration");
    for (size_t i = 0; i < config->bind_count; i++)
        if (!config->binds[i].target)
            launch_fail_about("no target for the mount of", config->binds[i].source);
}
