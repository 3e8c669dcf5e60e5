/* The launcher: what its parts share. The flow stands in launch.c. */
#ifndef HUTCH_LAUNCH_H
#define HUTCH_LAUNCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* One read-only layer. `shift`: its owners on disk are 0 ... 65535 and are shifted into the box's user namespace at the mount. */
struct lower {
    const char *path;
    bool shift;
};

/* A host path bound into the box. */
struct bind {
    const char *source;
    const char *target;
    bool read_only;
};

/* The descriptors that the host passes with the configuration, in this order. */
enum { FD_LISTEN, FD_LOG0, FD_LOG1, FD_EXIT, FD_COUNT };

struct config {
    char *text; /* the received message: all strings point into it */
    const char *hostname;
    const char *hosts;  /* contents of /etc/hosts */
    const char *resolv; /* contents of /etc/resolv.conf */
    const char *stage;  /* an existing directory; a private tmpfs is mounted over it */
    const char *disk; /* a file with an ext4 file system that has upper and work in it; NULL: they are directories of the host */
    const char *upper; /* the last two lie below "disk/" when there is one */
    const char *work;
    const char *uid_map; /* maps of the box's user namespace, as the kernel takes them */
    const char *gid_map;
    bool rootless; /* the outer user namespace is not the host's */
    bool all_ids;  /* the maps cover the usual system ids, so that setgroups and gid 5 work */
    struct lower *lowers;
    size_t lower_count;
    struct bind *binds;
    size_t bind_count;
    const char *pids; /* limit on processes that no cgroup enforces; NULL: none */
    const char **cgroups; /* files that take "0": the launcher joins before the box exists */
    size_t cgroup_count;
    int fds[FD_COUNT];
};

/* The socket to the host; every part reports failures on it. */
extern int launch_control;

/* Takes a failure in place of the socket, where there is none (in a VM). */
extern void (*launch_failed)(const char *text, size_t length);

/* launch.c: steps of every launch. */
void take_control(void);
_Noreturn void enter_outer(const char *mode, const char *uid_map, const char *gid_map);
void join_cgroups(const char *const doors[], size_t count);
void await_byte(int fd);                                    /* or end, with whoever should have sent it */
void launch_tell(const char *text, size_t length, int fd); /* -1: no descriptor */
void write_id_maps(pid_t pid, const char *uid_map, const char *gid_map);
int open_user_namespace(pid_t pid);

/* Tell the host that `step` failed (with errno's text unless it is 0) and end this process. */
_Noreturn void launch_fail(const char *step);
_Noreturn void launch_fail_about(const char *step, const char *about);

/* launch_config.c: one message of records, with up to `room` descriptors; and where the next record is. */
char *config_message(int control, int *fds, size_t room, size_t *count, size_t *length);
bool config_next(char **rest, const char *end, const char **key, const char **value);
void *config_grow(void *items, size_t count, size_t size);

/* launch_config.c: receive the configuration and the descriptors from `control`. */
void config_receive(int control, struct config *config);

/* launch_stage.c: run by the launcher, with the privileges of the outer user namespace. */
void stage_open(const struct config *config);
void stage_fill(const struct config *config, int userns);
int stage_tree(const struct bind *bind, int userns);                 /* the source of a bind, with its flags, as a detached mount */
void stage_place(int tree, const char *prefix, size_t number); /* on a new directory or file; closes it */

/* launch_box.c: run by PID 1 in the box's own namespaces, before any code of the box. */
void box_namespaces(const struct config *config);
void box_root(const struct config *config);
void box_confine(void);
void loopback_up(void);
int base_directory(int root, const char *name);
void bind_into(int root, const char *source, const char *target, bool required);

/* launch_mount.c: thin wrappers; each ends the process through launch_fail when `step` is given and the call fails. */
int mount_clone(const char *path, bool recursive, const char *step);
void mount_set(int tree, bool recursive, uint64_t set, int userns, const char *step);
int mount_attach(int tree, int target);
int mount_new(const char *type, const char *const options[], uint64_t attributes);
int open_in_root(int root, const char *path, uint64_t flags, unsigned mode);

/* launch_disk.c: mount a box's disk on a directory of a private mount namespace; 0, or -1 with errno. */
int disk_mount(const char *image, const char *point);

/* seccomp.c: install the system call filter; 0, or -1 with errno. */
int seccomp_install(void);

/* mapped.c: enter a new user namespace with these maps, with newuidmap and newgidmap where one line is not enough; 0, or -1 with errno. */
int mapped_enter(const char *uid_map, const char *gid_map);

#endif
