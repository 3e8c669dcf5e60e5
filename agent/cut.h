/* In a fork: an end to what is not its own. */
#ifndef HUTCH_CUT_H
#define HUTCH_CUT_H

/* Before the box has a root of its own: what it may hide later. */
void cut_prepare(void);

/* While all other processes are frozen: reset the connections to others, and end the transfers of files and ports, whose other ends
 * talk to the box that this one was forked from. */
void cut(void);

#endif
