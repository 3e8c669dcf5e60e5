/* The box's life: uptime and power-off. */
#ifndef HUTCH_POWER_H
#define HUTCH_POWER_H

#include <stdbool.h>
#include <stdint.h>

void power_init(void);
uint64_t power_uptime_ms(void);

/* Stop everything: the stop signal (0: SIGTERM) to the main command, SIGTERM to the rest, SIGKILL after `grace_ms`. Idempotent, but a
 * later call may shorten the grace. */
void power_off(uint32_t grace_ms, int stop_signal);
bool power_stopping(void);

/* Once per turn; true when the agent is to end. */
bool power_over(void);

#endif
