/* The network card of a VM. */
#ifndef HUTCH_NIC_H
#define HUTCH_NIC_H

#include <stdbool.h>
#include <stdint.h>

/* Prefix length of IPv4, of IPv6; own address and gateway of IPv4; the same of IPv6. */
enum { NIC_SETTINGS = 2 + 2 * 4 + 2 * 16 };

/* Bring the card up, with a default route. Idempotent. Returns NULL, or what is wrong. */
const char *nic_up(const uint8_t *settings);

/* guest.c: let a driver take all devices of a kind (a number of the virtio specification) that it does not have yet. */
void guest_bind(unsigned kind, const char *driver, bool required);

#endif
