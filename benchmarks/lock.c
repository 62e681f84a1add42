/* Measures how long threads other than the first hold the lock of CPython 3.10 to 3.14.

       cc -O2 -shared -fPIC lock.c -o lock.so
       LD_PRELOAD=./lock.so LOCK_FILE=lock.txt python …

   Python signals one condition each time a thread has taken the lock (`switch_cond` in
   Python/ceval_gil.c, the first that a process signals), and another when a thread drops it.
   LOCK_FILE gets the seconds of processor time between the two, and how often the lock was
   taken. It is processor time so that other programs do not count. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define READINGS 10000

static _Atomic(pthread_cond_t *) taken, dropped;
static atomic_llong held, times;
static _Thread_local long long since;
static _Thread_local enum { UNKNOWN, FIRST, OTHER } thread;

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int pthread_cond_signal(pthread_cond_t *condition)
{
    static int (*signal)(pthread_cond_t *);
    if (!signal)
        /* With the version: without it, dlsym may find an older function. */
        signal = dlvsym(RTLD_NEXT, "pthread_cond_signal", "GLIBC_2.3.2");
    if (thread == UNKNOWN)
        thread = gettid() == getpid() ? FIRST : OTHER;
    if (!taken)
        taken = condition;
    else if (!dropped && condition != taken)
        dropped = condition;
    if (thread == OTHER && condition == taken) {
        since = now();
    } else if (thread == OTHER && condition == dropped && since) {
        held += now() - since;
        times++;
        since = 0;
    }
    return signal(condition);
}

__attribute__((destructor)) static void report(void)
{
    const char *name = getenv("LOCK_FILE");
    FILE *file = name && dropped ? fopen(name, "w") : NULL;
    if (!file)
        return;
    long long begin = now();
    for (int i = 0; i < READINGS; i++)
        now();
    double reading = (double)(now() - begin) / READINGS; /* each time held includes one */
    fprintf(file, "%.9f %lld\n", (held - times * reading) / 1e9, (long long)times);
    fclose(file);
}
