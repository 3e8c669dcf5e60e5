/* Routes for all UDP of a network namespace: whatever its destination, it arrives on the loopback interface as if it were for this
 * machine, so that a rule of nft(8) can give it to a socket. As `ip rule add pref 100 ipproto udp lookup 100` and
 * `ip route add local default dev lo [src SOURCE] table 100`. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <linux/fib_rules.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { TABLE = 100, PRIORITY = 100 };

struct request {
    struct nlmsghdr header;
    union {
        struct fib_rule_hdr rule;
        struct rtmsg route;
    } body;
    char attributes[128];
};

_Static_assert(sizeof(struct fib_rule_hdr) == sizeof(struct rtmsg), "one body serves both");

static void add(struct request *request, unsigned short type, const void *value, size_t size)
{
    struct rtattr *attribute = (struct rtattr *)((char *)request + NLMSG_ALIGN(request->header.nlmsg_len));

    attribute->rta_type = type;
    attribute->rta_len = (unsigned short)RTA_LENGTH(size);
    memcpy(RTA_DATA(attribute), value, size);
    request->header.nlmsg_len = NLMSG_ALIGN(request->header.nlmsg_len) + RTA_ALIGN(attribute->rta_len);
}

/* What is there already is as good as new. */
static bool ask(int fd, struct request *request)
{
    struct {
        struct nlmsghdr header;
        struct nlmsgerr error;
        char rest[256];
    } answer;
    ssize_t size;

    if (send(fd, request, request->header.nlmsg_len, 0) < 0)
        return false;
    size = recv(fd, &answer, sizeof answer, 0);
    if (size < 0)
        return false;
    if ((size_t)size < sizeof answer.header + sizeof answer.error || answer.header.nlmsg_type != NLMSG_ERROR) {
        errno = EPROTO;
        return false;
    }
    errno = -answer.error.error;
    return errno == 0 || errno == EEXIST;
}

bool steer_udp(int family, int interface, const struct in_addr *source)
{
    const unsigned char protocol = IPPROTO_UDP;
    const uint32_t table = TABLE, priority = PRIORITY, device = (uint32_t)interface;
    const unsigned short flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    struct request rule = {
        .header = {.nlmsg_len = NLMSG_LENGTH(sizeof rule.body), .nlmsg_type = RTM_NEWRULE, .nlmsg_flags = flags},
        .body.rule = {.family = (unsigned char)family, .action = FR_ACT_TO_TBL},
    };
    struct request route = {
        .header = {.nlmsg_len = NLMSG_LENGTH(sizeof route.body), .nlmsg_type = RTM_NEWROUTE, .nlmsg_flags = flags},
        .body.route = {.rtm_family = (unsigned char)family, .rtm_type = RTN_LOCAL, .rtm_scope = RT_SCOPE_HOST, .rtm_protocol = RTPROT_STATIC},
    };
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    bool done;

    if (fd < 0)
        return false;
    add(&rule, FRA_PRIORITY, &priority, sizeof priority);
    add(&rule, FRA_TABLE, &table, sizeof table);
    add(&rule, FRA_IP_PROTO, &protocol, sizeof protocol);
    add(&route, RTA_TABLE, &table, sizeof table);
    add(&route, RTA_OIF, &device, sizeof device);
    if (source)
        add(&route, RTA_PREFSRC, source, sizeof *source);
    done = ask(fd, &route) && ask(fd, &rule);
    close(fd);
    return done;
}
