/* box-agent door: prepare the network namespace of a box so that every packet in it ends at the host's gateway, and hand the gateway its
 * sockets.
 *
 * Standard input is a SOCK_SEQPACKET socket to the host, descriptor 3 a pidfd of a process in the namespace. The namespace gets an
 * address and a default route on `lo`, redirects by nft(8), and four sockets on free ports: TCP, UDP for DNS, all other UDP (whose
 * destination IP_RECVORIGDSTADDR tells), and a raw one, by which the gateway answers in the name of peers. The same over IPv6 where the
 * kernel has it. The answer is one message:
 *
 *     D with the sockets      TCP, DNS, other UDP, raw; again for IPv6 (four or eight)
 *     E<text>                 what failed
 *
 * It may be done again at any time: what is there already is replaced. */
#define _GNU_SOURCE
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* From the ranges for documentation (RFC 5737, RFC 3849): no real peer has them. */
#define BOX_ADDRESS "192.0.2.2"
#define BOX_ADDRESS6 "2001:db8:77::2"
/* What nft(8) is told of the box's own addresses. */
#define OWN "{ 127.0.0.0/8, " BOX_ADDRESS " }"
#define OWN6 "{ ::1, " BOX_ADDRESS6 " }"

enum { CONTROL = 0, PROCESS = 3, BACKLOG = 1024, BURST = 1 << 20 };
/* The sockets of one protocol, and of both. */
enum { TCP, DNS, OTHER, RAW, KINDS, SOCKETS = 2 * KINDS };

/* As <linux/ipv6.h>, which the C library's headers do not go together with. */
struct address6 {
    struct in6_addr address;
    uint32_t prefix;
    int interface;
};

static _Noreturn void fail(const char *step)
{
    char text[256];
    int cause = errno;
    int length = snprintf(text, sizeof text, "E%s%s%s", step, cause ? ": " : "", cause ? strerror(cause) : "");

    if (send(CONTROL, text, (size_t)length, MSG_NOSIGNAL) < 0)
        _exit(2);
    _exit(1);
}

/* An ordinary user has rights over the network only in the box's user namespace. */
static void enter(void)
{
    if (setns(PROCESS, CLONE_NEWNET) < 0 && setns(PROCESS, CLONE_NEWUSER | CLONE_NEWNET) < 0)
        fail("entering the box's network namespace");
    close(PROCESS);
}

static void set_address(int fd, unsigned long request, const char *address)
{
    struct ifreq interface = {.ifr_name = "lo:0"};
    struct sockaddr_in *value = (struct sockaddr_in *)&interface.ifr_addr;

    value->sin_family = AF_INET;
    if (inet_pton(AF_INET, address, &value->sin_addr) != 1 || ioctl(fd, request, &interface) < 0)
        fail("giving the box an address");
}

static void route_all(int fd)
{
    struct rtentry route = {.rt_flags = RTF_UP, .rt_dev = "lo"};

    route.rt_dst.sa_family = route.rt_genmask.sa_family = route.rt_gateway.sa_family = AF_INET;
    if (ioctl(fd, SIOCADDRT, &route) < 0 && errno != EEXIST)
        fail("making the default route");
}

static void steer(int fd, int family, const struct in_addr *source)
{
    struct ifreq interface = {.ifr_name = "lo"};

    if (ioctl(fd, SIOCGIFINDEX, &interface) < 0)
        fail("finding the loopback interface");
    if (!steer_udp(family, interface.ifr_ifindex, source))
        fail("making the routes of UDP");
}

static void configure4(void)
{
    struct in_addr source;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        fail("opening a socket in the box's network namespace");
    set_address(fd, SIOCSIFADDR, BOX_ADDRESS);
    set_address(fd, SIOCSIFNETMASK, "255.255.255.255");
    route_all(fd);
    inet_pton(AF_INET, BOX_ADDRESS, &source);
    steer(fd, AF_INET, &source);
    close(fd);
}

/* False: the kernel has no IPv6, so nothing can leave by it. */
static bool configure6(void)
{
    struct ifreq interface = {.ifr_name = "lo"};
    struct address6 address = {.prefix = 128};
    struct in6_rtmsg route = {.rtmsg_metric = 1024, .rtmsg_flags = RTF_UP};
    int fd = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return false;
    if (ioctl(fd, SIOCGIFINDEX, &interface) < 0)
        fail("finding the loopback interface");
    address.interface = route.rtmsg_ifindex = interface.ifr_ifindex;
    inet_pton(AF_INET6, BOX_ADDRESS6, &address.address);
    if ((ioctl(fd, SIOCSIFADDR, &address) < 0 && errno != EEXIST) || (ioctl(fd, SIOCADDRT, &route) < 0 && errno != EEXIST)) {
        close(fd);
        return false; /* switched off by a sysctl */
    }
    steer(fd, AF_INET6, NULL);
    close(fd);
    return true;
}

/* The socket gets packets for any address, and is told which: IP_TRANSPARENT, IP_RECVORIGDSTADDR, and the same of IPv6. */
static void take_all(int fd, int family)
{
    int level = family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6, on = 1, space = BURST;

    if (setsockopt(fd, level, family == AF_INET ? IP_TRANSPARENT : IPV6_TRANSPARENT, &on, sizeof on) < 0
        || setsockopt(fd, level, family == AF_INET ? IP_RECVORIGDSTADDR : IPV6_RECVORIGDSTADDR, &on, sizeof on) < 0)
        fail("preparing the gateway's socket for UDP");
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &space, sizeof space); /* an older kernel lets a burst lose more */
}

/* Bound to the loopback address, where redirected packets arrive, so that answers have the source that conntrack turns back. */
static int open_socket(int family, int kind, unsigned *port)
{
    static const int types[KINDS] = {[TCP] = SOCK_STREAM, [DNS] = SOCK_DGRAM, [OTHER] = SOCK_DGRAM, [RAW] = SOCK_RAW};
    struct sockaddr_storage address = {.ss_family = (sa_family_t)family};
    struct sockaddr_in *inet = (struct sockaddr_in *)&address;
    struct sockaddr_in6 *inet6 = (struct sockaddr_in6 *)&address;
    socklen_t size = family == AF_INET ? sizeof *inet : sizeof *inet6;
    int fd = socket(family, types[kind] | SOCK_NONBLOCK | SOCK_CLOEXEC, kind == RAW ? IPPROTO_RAW : 0);

    if (fd < 0)
        fail("opening the gateway's socket");
    if (kind == RAW)
        return fd;
    if (kind == OTHER)
        take_all(fd, family);
    if (family == AF_INET)
        inet->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    else
        inet6->sin6_addr = in6addr_loopback;
    if (bind(fd, (struct sockaddr *)&address, size) < 0 || getsockname(fd, (struct sockaddr *)&address, &size) < 0
        || (kind == TCP && listen(fd, BACKLOG) < 0))
        fail("opening the gateway's socket");
    *port = ntohs(family == AF_INET ? inet->sin_port : inet6->sin6_port);
    return fd;
}

/* One transaction: there is no moment with half of the rules. UDP must come from the box itself: an answer to a made-up sender would be
 * taken for another packet of the box. */
static int write_rules(char *text, size_t size, const unsigned ports[SOCKETS], bool six)
{
    const unsigned *ports6 = ports + KINDS;
    int length = snprintf(text, size,
                          "add table inet hutch\n"
                          "delete table inet hutch\n"
                          "table inet hutch {\n"
                          " chain door {\n"
                          "  type nat hook output priority -100; policy accept;\n"
                          "  ip daddr " OWN " return\n"
                          "  ip6 daddr " OWN6 " return\n"
                          "  meta nfproto ipv4 meta l4proto tcp redirect to :%u\n"
                          "  meta nfproto ipv4 udp dport 53 redirect to :%u\n",
                          ports[TCP], ports[DNS]);

    if (six)
        length += snprintf(text + length, size - (size_t)length,
                           "  meta nfproto ipv6 meta l4proto tcp redirect to :%u\n"
                           "  meta nfproto ipv6 udp dport 53 redirect to :%u\n",
                           ports6[TCP], ports6[DNS]);
    length += snprintf(text + length, size - (size_t)length,
                       " }\n"
                       " chain wall {\n"
                       "  type filter hook output priority 0; policy drop;\n"
                       "  ip daddr " OWN " accept\n"
                       "  ip6 daddr " OWN6 " accept\n"
                       "  ip saddr " OWN " meta l4proto udp accept\n"
                       "  ip6 saddr " OWN6 " meta l4proto udp accept\n"
                       "  reject with icmpx type admin-prohibited\n"
                       " }\n"
                       " chain steer {\n"
                       "  type filter hook prerouting priority -150; policy drop;\n"
                       "  ip daddr " OWN " accept\n"
                       "  ip6 daddr " OWN6 " accept\n"
                       "  meta nfproto ipv4 meta l4proto udp tproxy ip to 127.0.0.1:%u accept\n",
                       ports[OTHER]);
    if (six)
        length += snprintf(text + length, size - (size_t)length,
                           "  meta nfproto ipv6 meta l4proto udp tproxy ip6 to [::1]:%u accept\n", ports6[OTHER]);
    return length + snprintf(text + length, size - (size_t)length, " }\n}\n");
}

static _Noreturn void run_nft(const char *rules, size_t length)
{
    char *const argv[] = {"nft", "-f", "-", NULL};
    int ends[2];
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    /* The rules fit into a pipe, so nobody has to feed it. */
    if (null < 0 || pipe2(ends, O_CLOEXEC) < 0 || write(ends[1], rules, length) != (ssize_t)length)
        _exit(126);
    close(ends[1]);
    if (dup2(ends[0], 0) < 0 || dup2(null, 1) < 0)
        _exit(126);
    execvp(argv[0], argv);
    _exit(127);
}

static void load_rules(const unsigned ports[SOCKETS], bool six)
{
    char rules[2048];
    int length = write_rules(rules, sizeof rules, ports, six);
    int status;
    pid_t child = fork();

    if (child == 0)
        run_nft(rules, (size_t)length);
    while (child > 0 && waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            fail("waiting for nft");
    if (child < 0)
        fail("starting nft");
    errno = 0;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
        fail("nft is not installed");
    if (status != 0)
        fail("nft refuses the rules; the kernel may lack nf_tables with NAT, redirect and tproxy");
}

static void hand_over(const int fds[], size_t count)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int) * SOCKETS)];
    } space = {.bytes = {0}};
    struct iovec part = {"D", 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &space};

    message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
    space.header.cmsg_level = SOL_SOCKET;
    space.header.cmsg_type = SCM_RIGHTS;
    space.header.cmsg_len = CMSG_LEN(sizeof(int) * count);
    memcpy(CMSG_DATA(&space.header), fds, sizeof(int) * count);
    if (sendmsg(CONTROL, &message, MSG_NOSIGNAL) < 0)
        fail("handing over the sockets");
}

int cmd_door(int argc, char **argv)
{
    unsigned ports[SOCKETS] = {0};
    int fds[SOCKETS];
    size_t count;

    (void)argv;
    if (argc != 1)
        return 2;
    enter();
    configure4();
    count = configure6() ? SOCKETS : KINDS;
    for (size_t i = 0; i < count; i++)
        fds[i] = open_socket(i < KINDS ? AF_INET : AF_INET6, (int)(i % KINDS), &ports[i]);
    load_rules(ports, count == SOCKETS);
    hand_over(fds, count);
    return 0;
}
