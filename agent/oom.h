/* How often memory has run out. Only a VM's kernel is the box's own; a container's count is the control group's, on the host. */
#ifndef HUTCH_OOM_H
#define HUTCH_OOM_H

#include <stdint.h>

/* The processes that the kernel has killed for want of memory; 0 in a container. */
uint64_t oom_kills(void);

#endif
