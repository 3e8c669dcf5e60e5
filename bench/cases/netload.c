/* Both ends of the network measurements; all figures are printed in seconds, a line each.
 *
 *     netload serve                       listens on a free port of 127.0.0.1 and prints it
 *     netload download ADDRESS PORT SIZE  receives so many bytes
 *     netload connect ADDRESS PORT COUNT  makes connections one after the other: to the first byte of the peer's answer
 *     netload many ADDRESS PORT COUNT     the same with all of them open at once; one line
 *     netload stuck ADDRESS PORT          asks for bytes that it never reads, and says "stuck" when no more arrive
 *
 * The first byte of a connection says what the server does: e sends it back, d sends bytes until the client has gone. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 1 << 20 };
static char bytes[PIECE];

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void serve_one(int connection)
{
    char wish = 0;

    if (read(connection, &wish, 1) != 1)
        return;
    while (write(connection, bytes, wish == 'd' ? PIECE : 1) > 0 && wish == 'd')
        ;
    while (wish == 'e' && read(connection, bytes, 1) > 0)
        ;
}

static void serve(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);

    if (bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, 4096) < 0)
        fail("listening");
    getsockname(listener, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int connection = accept(listener, NULL, NULL);

        if (fork() == 0) {
            close(listener);
            serve_one(connection);
            _exit(0);
        }
        close(connection);
    }
}

static int call(const char *address, const char *port, char wish)
{
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(port))};
    int on = 1, connection = socket(AF_INET, SOCK_STREAM, 0);

    inet_pton(AF_INET, address, &peer.sin_addr);
    if (connect(connection, (struct sockaddr *)&peer, sizeof peer) < 0)
        fail("connecting");
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (write(connection, &wish, 1) != 1)
        fail("writing");
    return connection;
}

static void answer(int connection)
{
    if (read(connection, bytes, 1) != 1)
        fail("no answer");
}

static void download(const char *address, const char *port, long size)
{
    double began = now();
    int connection = call(address, port, 'd');

    while (size > 0) {
        ssize_t got = read(connection, bytes, (size_t)(size < PIECE ? size : PIECE));

        if (got <= 0)
            fail("reading");
        size -= got;
    }
    printf("%.6f\n", now() - began);
}

static void connect_each(const char *address, const char *port, int count)
{
    while (count--) {
        double began = now();
        int connection = call(address, port, 'e');

        answer(connection);
        printf("%.6f\n", now() - began);
        close(connection);
    }
}

static void connect_many(const char *address, const char *port, int count)
{
    int *connections = calloc((size_t)count, sizeof *connections);
    double began = now();

    for (int i = 0; i < count; i++)
        connections[i] = call(address, port, 'e');
    for (int i = 0; i < count; i++)
        answer(connections[i]);
    printf("%.6f\n", now() - began);
}

static void stuck(const char *address, const char *port)
{
    int connection = call(address, port, 'd'), before = -1, waiting = 0;

    while (waiting == 0 || waiting != before) {
        before = waiting;
        usleep(300000);
        ioctl(connection, FIONREAD, &waiting);
    }
    printf("stuck\n");
    fflush(stdout);
    pause();
}

int main(int argc, char **argv)
{
    struct rlimit files;

    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    if (argc == 2 && !strcmp(argv[1], "serve"))
        serve();
    if (argc == 4 && !strcmp(argv[1], "stuck"))
        stuck(argv[2], argv[3]);
    if (argc != 5)
        return 2;
    if (!strcmp(argv[1], "download"))
        download(argv[2], argv[3], atol(argv[4]));
    else if (!strcmp(argv[1], "connect"))
        connect_each(argv[2], argv[3], atoi(argv[4]));
    else if (!strcmp(argv[1], "many"))
        connect_many(argv[2], argv[3], atoi(argv[4]));
    else
        return 2;
    return 0;
}
