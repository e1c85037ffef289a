/*
 * The lab guest's only program: process 1 after tools/guest/init.
 *
 * Reads its parameters from the kernel command line, fills memory, and then runs a few threads
 * that write, check and tell on the console (hvc0) what they find. It never ends.
 */
#define _GNU_SOURCE
#include "workload.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static int console_fd = STDOUT_FILENO;
static pthread_mutex_t console_lock = PTHREAD_MUTEX_INITIALIZER;

void say(const char *format, ...)
{
    char line[256];
    va_list arguments;
    int length, done = 0;

    va_start(arguments, format);
    length = vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    pthread_mutex_lock(&console_lock);
    while (done < length) {
        ssize_t n = write(console_fd, line + done, (size_t)(length - done));

        if (n <= 0)
            break;
        done += (int)n;
    }
    pthread_mutex_unlock(&console_lock);
}

uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec;
}

void sleep_until_ns(uint64_t deadline_ns)
{
    struct timespec t = {.tv_sec = (time_t)(deadline_ns / NS_PER_S),
                         .tv_nsec = (long)(deadline_ns % NS_PER_S)};

    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) != 0)
        ;
}

void start_thread(void *(*body)(void *), bool realtime)
{
    pthread_t thread;
    pthread_attr_t attributes;
    struct sched_param priority = {.sched_priority = 10};

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 128u << 10);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    if (realtime) {
        pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
        pthread_attr_setschedpolicy(&attributes, SCHED_FIFO);
        pthread_attr_setschedparam(&attributes, &priority);
    }
    if (pthread_create(&thread, &attributes, body, NULL) != 0) {
        say("FATAL cannot start a thread\n");
        _exit(1);
    }
}

static void open_console(void)
{
    struct termios settings;
    int fd = open("/dev/hvc0", O_RDWR | O_NOCTTY | O_CLOEXEC);

    if (fd < 0)
        return; /* no virtio console: lines go to the kernel's console */
    if (tcgetattr(fd, &settings) == 0) {
        cfmakeraw(&settings);
        tcsetattr(fd, TCSANOW, &settings);
    }
    console_fd = fd;
}

static enum content parse_rewrite(const char *value)
{
    if (strcmp(value, "counter") == 0)
        return CONTENT_COUNTER;
    if (strcmp(value, "half") == 0)
        return CONTENT_HALF;
    if (strcmp(value, "text") == 0)
        return CONTENT_TEXT;
    if (strcmp(value, "random") == 0)
        return CONTENT_RANDOM;
    say("FATAL wl.rewrite=%.32s is not known\n", value);
    _exit(1);
}

static void set_param(struct params *p, const char *name, const char *value)
{
    const struct { const char *name; unsigned long *field; } numbers[] = {
        {"static_mib", &p->static_mib}, {"random", &p->random}, {"text", &p->text},
        {"zero", &p->zero}, {"file", &p->file}, {"half", &p->half},
        {"duplicate", &p->duplicate}, {"device_mib", &p->device_mib},
        {"wws_mib", &p->wws_mib}, {"rate", &p->rate},
        {"touch", &p->touch}, {"hb_hz", &p->hb_hz}, {"check_rate", &p->check_rate},
        {"disk_hz", &p->disk_hz}, {"udp_port", &p->udp_port}, {"seed", &p->seed}};
    const struct { const char *name; bool *field; } switches[] = {
        {"sequential", &p->sequential}, {"selfcheck", &p->selfcheck}, {"disk", &p->disk},
        {"udp", &p->udp}};

    for (unsigned i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
        if (strcmp(name, numbers[i].name) == 0)
            *numbers[i].field = strtoul(value, NULL, 10);
    for (unsigned i = 0; i < sizeof(switches) / sizeof(switches[0]); i++)
        if (strcmp(name, switches[i].name) == 0)
            *switches[i].field = value[0] == '1';
    if (strcmp(name, "device") == 0)
        snprintf(p->device, sizeof(p->device), "%s", value);
    if (strcmp(name, "rewrite") == 0)
        p->rewrite = parse_rewrite(value);
}

static void read_params(struct params *p)
{
    static char line[4096];
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, line, sizeof(line) - 1);

    line[n < 0 ? 0 : n] = '\0';
    for (char *word = strtok(line, " \n"); word != NULL; word = strtok(NULL, " \n")) {
        char *value = strchr(word, '=');

        if (strncmp(word, "wl.", 3) != 0 || value == NULL)
            continue;
        *value++ = '\0';
        set_param(p, word + 3, value);
    }
    if (fd >= 0)
        close(fd);
    p->touch = p->touch / 8 * 8;
    if (p->touch < 8 || p->touch > PAGE_BYTES || PAGE_BYTES % p->touch != 0) {
        say("FATAL wl.touch must be a multiple of 8 that divides 4096\n");
        _exit(1);
    }
}

int main(void)
{
    static struct params p = {.static_mib = 32, .random = 50, .text = 20, .zero = 10, .file = 20,
                              .wws_mib = 8, .rate = 500, .touch = 64, .rewrite = CONTENT_RANDOM,
                              .hb_hz = 200, .selfcheck = true, .check_rate = 2000, .disk_hz = 20,
                              .udp_port = 7777, .seed = 1};

    open_console();
    read_params(&p);
    content_init(p.seed);
    memory_setup(&p);
    say("READY static_mib=%lu device_mib=%lu wws_mib=%lu rate=%lu touch=%lu\n", p.static_mib,
        p.device_mib, p.wws_mib, p.rate, p.touch);
    memory_start();
    services_start(&p);
    for (;;)
        pause();
}
