/* Intrusive doubly linked list; an unlinked link points at itself. */
#ifndef HUTCH_LIST_H
#define HUTCH_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct link {
    struct link *prev, *next;
};

#define LIST_OF(list) ((struct link){&(list), &(list)})
#define entry(pointer, type, member) ((type *)(void *)((char *)(pointer) - offsetof(type, member)))

/* The body may remove `it`, but no other link of the list. */
#define list_each(it, head) \
    for (struct link *it = (head)->next, *it##_next = it->next; it != (head); it = it##_next, it##_next = it->next)

static inline void list_init(struct link *link) { link->prev = link->next = link; }

static inline bool list_empty(const struct link *head) { return head->next == head; }

static inline void list_append(struct link *head, struct link *link)
{
    link->prev = head->prev;
    link->next = head;
    head->prev->next = link;
    head->prev = link;
}

static inline void list_remove(struct link *link)
{
    link->prev->next = link->next;
    link->next->prev = link->prev;
    list_init(link);
}

#endif
