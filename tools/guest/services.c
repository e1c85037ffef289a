/* Heartbeat, disk writer and UDP echo. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "workload.h"

#define DISK_PATH "/dev/vda"
#define DISK_MAGIC 0x6b736964746f6f62ull
#define DISK_BLOCKS_MAX 4096u

static const struct params *params;

/* HB <counter> <guest monotonic ns> <longest time between two wake-ups since the last line, us> */
static void *heartbeat_forever(void *unused)
{
    uint64_t period = NS_PER_S / params->hb_hz, tick = now_ns(), last = tick;

    (void)unused;
    for (unsigned long long counter = 1;; counter++) {
        uint64_t now;

        tick += period;
        if (tick < now_ns()) /* after a stall go on from here, do not burst */
            tick = now_ns();
        sleep_until_ns(tick);
        now = now_ns();
        say("HB %llu %llu %llu\n", counter, (unsigned long long)now,
            (unsigned long long)((now - last) / 1000));
        last = now;
    }
    return NULL;
}

/* Block `number` as it must stand on the disk: magic, number, then words drawn from the number. */
static void make_block(uint64_t *words, uint64_t number)
{
    content_fill(words, CONTENT_RANDOM, number, ~0ull, 0, PAGE_WORDS);
    words[0] = DISK_MAGIC;
    words[1] = number;
    words[2] = mix64(number ^ params->seed);
}

static bool block_ok(int fd, uint64_t *buffer, uint64_t number, uint64_t slots)
{
    uint64_t expected[PAGE_WORDS];

    if (pread(fd, buffer, PAGE_BYTES, (off_t)(number % slots * PAGE_BYTES)) != PAGE_BYTES) {
        say("DISKERROR read %llu errno=%d\n", (unsigned long long)number, errno);
        return false;
    }
    make_block(expected, number);
    return memcmp(buffer, expected, PAGE_BYTES) == 0;
}

static int open_disk(uint64_t *slots)
{
    uint64_t bytes = 0;
    int fd = open(DISK_PATH, O_RDWR | O_DIRECT | O_CLOEXEC);

    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &bytes) < 0 || bytes < PAGE_BYTES) {
        say("DISKERROR open errno=%d\n", errno);
        return -1;
    }
    *slots = bytes / PAGE_BYTES < DISK_BLOCKS_MAX ? bytes / PAGE_BYTES : DISK_BLOCKS_MAX;
    return fd;
}

/* DISK <blocks written> <blocks read back and right> <bad>, once a second */
static void *write_disk_forever(void *unused)
{
    uint64_t slots = 0, draw = params->seed | 1, verified = 0, bad = 0;
    uint64_t period = NS_PER_S / params->disk_hz, tick = now_ns(), last_line = tick;
    uint64_t *buffer = aligned_alloc(PAGE_BYTES, PAGE_BYTES);
    int fd = open_disk(&slots);

    (void)unused;
    for (uint64_t number = 0; fd >= 0 && buffer != NULL; number++) {
        uint64_t kept = number + 1 < slots ? number + 1 : slots;

        make_block(buffer, number);
        if (pwrite(fd, buffer, PAGE_BYTES, (off_t)(number % slots * PAGE_BYTES)) != PAGE_BYTES) {
            say("DISKERROR write %llu errno=%d\n", (unsigned long long)number, errno);
            bad++;
        }
        if (block_ok(fd, buffer, number - (xorshift64(&draw) >> 11) % kept, slots))
            verified++;
        else
            bad++;
        if (now_ns() - last_line >= NS_PER_S) {
            last_line = now_ns();
            say("DISK %llu %llu %llu\n", (unsigned long long)number + 1,
                (unsigned long long)verified, (unsigned long long)bad);
        }
        tick = tick + period > now_ns() ? tick + period : now_ns() + period;
        sleep_until_ns(tick);
    }
    return NULL;
}

static void *echo_udp_forever(void *unused)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)params->udp_port)};
    char datagram[2048];
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    (void)unused;
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        say("UDPERROR errno=%d\n", errno);
        return NULL;
    }
    for (;;) {
        struct sockaddr_in from;
        socklen_t from_length = sizeof(from);
        ssize_t n = recvfrom(fd, datagram, sizeof(datagram), 0, (struct sockaddr *)&from, &from_length);

        if (n >= 0)
            sendto(fd, datagram, (size_t)n, 0, (struct sockaddr *)&from, from_length);
    }
    return NULL;
}

void services_start(const struct params *p)
{
    params = p;
    if (p->hb_hz > 0)
        start_thread(heartbeat_forever, true);
    if (p->disk && p->disk_hz > 0)
        start_thread(write_disk_forever, false);
    if (p->udp)
        start_thread(echo_udp_forever, false);
}
