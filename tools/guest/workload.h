/* Parts of the lab guest's workload; each service is one thread. */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#include <stdbool.h>
#include <stdint.h>

#include "content.h"

#define NS_PER_S 1000000000ull

/* Everything the kernel command line can set, as wl.NAME=VALUE. */
struct params {
    unsigned long static_mib; /* memory that never changes after READY */
    unsigned long random, text, zero, file, half, duplicate; /* shares of its pages in percent */
    unsigned long device_mib; /* memory filled from a block device, see device_pages.h */
    char device[32];          /* its path */
    unsigned long wws_mib;    /* writable working set */
    unsigned long rate;       /* page writes per second in it */
    unsigned long touch;      /* bytes per page write, a multiple of 8 up to 4096 */
    enum content rewrite;     /* what is written */
    bool sequential;          /* order of the writes; otherwise pages are drawn at random */
    unsigned long hb_hz;      /* heartbeat lines per second, 0 = none */
    bool selfcheck;
    unsigned long check_rate; /* pages per second */
    bool disk;
    unsigned long disk_hz;    /* block writes per second */
    bool udp;
    unsigned long udp_port;
    uint64_t seed;
};

/* Write one line to the console in one piece; `format` ends with a newline. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Guest CLOCK_MONOTONIC in nanoseconds; it stands still while the guest is stopped. */
uint64_t now_ns(void);

/* Sleep until the given CLOCK_MONOTONIC time. */
void sleep_until_ns(uint64_t deadline_ns);

/* Start a detached thread, at real-time priority if `realtime`. */
void start_thread(void *(*body)(void *), bool realtime);

/* memory.c: allocate and fill, then write and check forever. */
void memory_setup(const struct params *p);
void memory_start(void);

/* services.c: heartbeat, disk writer, UDP echo. */
void services_start(const struct params *p);

#endif
