/* Descriptors and directory listings. */
#include "tar.h"

#include <dirent.h>
#include <stdlib.h>
#include <unistd.h>

ssize_t tar_read_fd(void *context, void *buffer, size_t size) {
    ssize_t got;
    do
        got = read(*(int *)context, buffer, size);
    while (got < 0 && errno == EINTR);
    return got;
}

static int compare(const void *left, const void *right) {
    return strcmp(*(char *const *)left, *(char *const *)right);
}

void tar_names_free(struct tar_names *names) {
    for (size_t i = 0; i < names->count; i++)
        free(names->items[i]);
    free(names->items);
    *names = (struct tar_names){0};
}

int tar_names_read(int fd, struct tar_names *names) {
    size_t room = 0;
    *names = (struct tar_names){0};
    DIR *directory = fdopendir(fd);
    if (!directory) {
        close(fd);
        return -1;
    }
    struct dirent *entry;
    while (errno = 0, (entry = readdir(directory))) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (names->count == room) {
            room = room ? room * 2 : 64;
            char **items = realloc(names->items, room * sizeof *items);
            if (!items)
                break;
            names->items = items;
        }
        char *name = strdup(entry->d_name);
        if (!name)
            break;
        names->items[names->count++] = name;
    }
    int error = errno;
    closedir(directory);
    if (error) {
        tar_names_free(names);
        errno = error;
        return -1;
    }
    if (names->count)
        qsort(names->items, names->count, sizeof *names->items, compare);
    return 0;
}
