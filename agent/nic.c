/* The network card of a VM: taken by its driver and given its addresses when the host says so, for the other end is nothing before. */
#define _GNU_SOURCE
#include "nic.h"

#include "launch.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define NAME "eth0"

/* Datagrams of all sizes in one piece, for the other end takes no pieces; of IPv6 it takes nothing that is longer than the usual. */
enum { NETWORK_CARD = 1, MTU = 65535 };
#define MTU6 "1500"

/* As <linux/ipv6.h>, which the C library's headers do not go together with. */
struct address6 {
    struct in6_addr address;
    uint32_t prefix;
    int interface;
};

/* What is there already is as good. */
static bool set(int fd, unsigned long request, void *value)
{
    return ioctl(fd, request, value) == 0 || errno == EEXIST;
}

static void set_in(struct sockaddr *to, in_addr_t address)
{
    const struct sockaddr_in value = {.sin_family = AF_INET, .sin_addr.s_addr = address};
    memcpy(to, &value, sizeof value);
}

static bool configure4(int fd, const uint8_t *own, uint8_t prefix, const uint8_t *gateway)
{
    struct ifreq interface = {.ifr_name = NAME};
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY, .rt_dev = NAME};
    in_addr_t address;

    memcpy(&address, own, sizeof address);
    set_in(&interface.ifr_addr, address);
    if (!set(fd, SIOCSIFADDR, &interface))
        return false;
    set_in(&interface.ifr_netmask, htonl(~0u << (32 - prefix)));
    if (!set(fd, SIOCSIFNETMASK, &interface))
        return false;
    interface.ifr_mtu = MTU;
    if (!set(fd, SIOCSIFMTU, &interface))
        return false;
    interface.ifr_flags = IFF_UP | IFF_RUNNING;
    memcpy(&address, gateway, sizeof address);
    set_in(&route.rt_dst, INADDR_ANY);
    set_in(&route.rt_genmask, INADDR_ANY);
    set_in(&route.rt_gateway, address);
    return set(fd, SIOCSIFFLAGS, &interface) && set(fd, SIOCADDRT, &route);
}

static void write_setting(const char *path, const char *value)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, value, strlen(value)) < 0)
        errno = 0; /* then addresses come a second later, or the first long datagram is lost another way */
    if (fd >= 0)
        close(fd);
}

/* A kernel without IPv6 does without. */
static bool configure6(const uint8_t *own, uint8_t prefix, const uint8_t *gateway)
{
    struct address6 address = {.prefix = prefix};
    struct in6_rtmsg route = {.rtmsg_metric = 1024, .rtmsg_flags = RTF_UP | RTF_GATEWAY};
    int fd = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return true;
    write_setting("/proc/sys/net/ipv6/conf/" NAME "/mtu", MTU6);
    address.interface = route.rtmsg_ifindex = (int)if_nametoindex(NAME);
    memcpy(&address.address, own, sizeof address.address);
    memcpy(&route.rtmsg_gateway, gateway, sizeof route.rtmsg_gateway);
    bool done = set(fd, SIOCSIFADDR, &address) && set(fd, SIOCADDRT, &route);
    close(fd);
    return done;
}

const char *nic_up(const uint8_t *settings)
{
    const uint8_t *own = settings + 2, *own6 = own + 8;
    guest_bind(NETWORK_CARD, "virtio_net", false);
    if (!if_nametoindex(NAME))
        return "the kernel of the VM has no driver for its network card";
    /* Nobody else is on this link: no address is taken, and no router has anything to say. */
    write_setting("/proc/sys/net/ipv6/conf/" NAME "/accept_dad", "0");
    write_setting("/proc/sys/net/ipv6/conf/" NAME "/accept_ra", "0");
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool done = fd >= 0 && configure4(fd, own, settings[0], own + 4) && configure6(own6, settings[1], own6 + 16);
    int cause = errno;
    if (fd >= 0)
        close(fd);
    return done ? NULL : strerror(cause);
}
