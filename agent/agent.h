/* What the parts of box-agent offer to each other. One static program: `box-agent MODE ...`, see main.c. */
#ifndef HUTCH_AGENT_H
#define HUTCH_AGENT_H

#include <stdbool.h>

/* Descriptors that the agent is started with; -1 where there is none. All are close-on-exec. */
struct agent_options {
    int listen_fd; /* listening unix stream socket; in a VM the port takes its place */
    int ready_fd;  /* closed once the agent accepts connections */
    int log_fd[2]; /* main log, two files in turn */
    int exit_fd;   /* exit record of the main command */
};

/* Run the agent until power-off. As PID 1 of a box it never returns; otherwise it returns an exit status. */
int agent_run(const struct agent_options *options);

/* Serve one file operation (FILEOP of the protocol) on stdin, stdout and stderr; returns the exit status. Runs in a forked child. */
int files_child(int op, const char *path);

/* Join stdin and stdout with a port of the box ("80", "udp:53"); returns the exit status. Runs in a forked child. */
int tunnel_child(const char *port);
int datagrams_child(unsigned short port);

struct in_addr;
/* Let all UDP of this network namespace come in by an interface; see steer.c. Packets get the source, which IPv6 chooses by itself.
 * False: errno says why not. */
bool steer_udp(int family, int interface, const struct in_addr *source);

/* Modes: argv starts with the mode's name. Each returns the exit status. */
int cmd_agent(int argc, char **argv);
int cmd_launch(int argc, char **argv); /* start a box: namespaces, root, limits, then agent_run as PID 1 */
int cmd_vm(int argc, char **argv);     /* start a VM and become its keeper */
int cmd_init(int argc, char **argv);   /* be the first program of a VM */
int cmd_mapped(int argc, char **argv); /* run a host command in the user namespace of this user's boxes */
int cmd_disk(int argc, char **argv);   /* run a host command that sees the disk of a limited box */
int cmd_merged(int argc, char **argv); /* run a host command that sees layers as one tree */
int cmd_unpack(int argc, char **argv); /* tar on stdin -> directory */
int cmd_pack(int argc, char **argv);   /* directory -> tar on stdout */
int cmd_door(int argc, char **argv);   /* prepare a box's network namespace for the gateway */

#endif
