/* Records when a thread has the lock of CPython 3.10 to 3.14.

       cc -O2 -shared -fPIC lock.c -o lock.so
       LD_PRELOAD=./lock.so LOCK_FILE=lock.bin python …

   Python signals one condition each time a thread has taken the lock (`switch_cond` in
   Python/ceval_gil.c, the first that a process signals), and another when a thread drops it.
   LOCK_FILE gets pairs of float32: the seconds that the lock was held, and those until it was taken
   again. They are of one thread, the one that took it most often besides the first, and of
   processor time, so that sleeping and other programs do not count. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define CAPACITY (1 << 23) /* memory that is not used costs nothing */
#define READINGS 1000

struct record {
    struct record *next;
    long length;
    float seconds[CAPACITY];
};

static _Atomic(pthread_cond_t *) taken, dropped;
static _Atomic(struct record *) records;
static _Thread_local struct record *record;
static _Thread_local double since;
static _Thread_local int is_other = -1;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static struct record *new_record(void)
{
    struct record *new = calloc(1, sizeof *new);
    if (!new)
        abort();
    new->next = atomic_load(&records);
    while (!atomic_compare_exchange_weak(&records, &new->next, new))
        ;
    return new;
}

/* Note that this thread has taken or dropped the lock, in turns. */
static void note(void)
{
    if (is_other < 0)
        is_other = gettid() != getpid();
    if (!is_other)
        return;
    if (!record)
        record = new_record();
    double at = now();
    if (since && record->length < CAPACITY)
        record->seconds[record->length++] = at - since;
    since = at;
}

int pthread_cond_signal(pthread_cond_t *condition)
{
    static int (*signal)(pthread_cond_t *);
    if (!signal)
        /* With the version: without it, dlsym may find an older function. */
        signal = dlvsym(RTLD_NEXT, "pthread_cond_signal", "GLIBC_2.3.2");
    if (!taken)
        taken = condition;
    else if (!dropped && condition != taken)
        dropped = condition;
    if (condition == taken || condition == dropped)
        note();
    return signal(condition);
}

__attribute__((destructor)) static void report(void)
{
    struct record *longest = records;
    for (struct record *r = longest; r; r = r->next)
        if (r->length > longest->length)
            longest = r;
    const char *name = getenv("LOCK_FILE");
    FILE *file = name && longest ? fopen(name, "wb") : NULL;
    if (!file)
        return;
    double begin = now();
    for (int i = 0; i < READINGS; i++)
        now();
    float reading = (now() - begin) / READINGS; /* each time includes one */
    for (long i = 0; i < longest->length; i++)
        longest->seconds[i] -= longest->seconds[i] < reading ? longest->seconds[i] : reading;
    fwrite(longest->seconds, 2 * sizeof(float), longest->length / 2, file);
    fclose(file);
}
