/* Sleeping on a word of memory and waking (futex), and `Mutex`: a thread lock that knows its owner,
 * and can be taken by threads that do not hold the GIL. */
#ifndef EXPBUF_SLEEP_H
#define EXPBUF_SLEEP_H

#include <Python.h>
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { DONE = 0, NOT_PLAIN = 1, FAILED = -1 }; /* FAILED: an exception is set, or errno */

#define FOREVER INT64_MAX

static int64_t
now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Sleep while the word is `seen`, until it is woken or `ns` are over; errno or 0. */
static int
futex_sleep(void *word, uint32_t seen, int64_t ns, int shared)
{
    struct timespec timeout = {ns / 1000000000, ns % 1000000000};
    long result = syscall(SYS_futex, word, shared ? FUTEX_WAIT : FUTEX_WAIT_PRIVATE, seen,
                          ns == FOREVER ? NULL : &timeout, NULL, 0);
    return result < 0 ? errno : 0;
}

static long
futex_wake(void *word, int count, int shared)
{
    return syscall(SYS_futex, word, shared ? FUTEX_WAKE : FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

/* ---------------------------------------------------------------- watching instead of sleeping */

/* Who is woken needs tens of microseconds where the processor sleeps, too, a virtual one most of
 * all: as long as a sync of a quick disk. So one looks again and again for a while, lets other
 * threads have the processor in between, and sleeps where that takes long. Where another program
 * gets the processor, which keeps it for milliseconds, nobody watches for some time. */
enum { WATCH_NS = 100000, LONG_YIELD_NS = 10000, LONG_YIELDS = 6, TAKEN_NS = 1000000 };
enum { SHORTEST_PAUSE_NS = 4000000, LONGEST_PAUSE_NS = 500000000 };

typedef struct {
    int64_t from, pause; /* nobody watches before that time */
} Watching;

/* How long it is left depends on how soon the same happened again. */
static void
watch_later(Watching *self)
{
    int64_t now = now_ns(), from = __atomic_load_n(&self->from, __ATOMIC_RELAXED);
    int64_t pause = __atomic_load_n(&self->pause, __ATOMIC_RELAXED);
    if (now < from)
        return; /* another thread has just found the same */
    if (now - from > 4 * SHORTEST_PAUSE_NS)
        pause = SHORTEST_PAUSE_NS;
    else if (pause < LONGEST_PAUSE_NS)
        pause *= 2;
    __atomic_store_n(&self->pause, pause, __ATOMIC_RELAXED);
    __atomic_store_n(&self->from, now + pause, __ATOMIC_RELAXED);
}

/* Whether the word has changed before it was time to sleep. */
static int
watch(Watching *self, const uint32_t *word, uint32_t seen)
{
    int64_t now = now_ns(), end = now + WATCH_NS, longest = 0;
    if (now < __atomic_load_n(&self->from, __ATOMIC_RELAXED))
        return 0;
    for (int longs = 0; longs < LONG_YIELDS && now < end;) {
        if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != seen)
            break;
        int64_t before = now;
        sched_yield();
        now = now_ns();
        longs += now - before > LONG_YIELD_NS;
        longest = now - before > longest ? now - before : longest;
    }
    if (longest > TAKEN_NS)
        watch_later(self);
    return __atomic_load_n(word, __ATOMIC_ACQUIRE) != seen;
}

/* ---------------------------------------------------------------- a bell that rings once */

typedef struct {
    uint32_t rung;
} Bell;

/* 0: rung; else errno (ETIMEDOUT, EINTR). */
static int
bell_await(Bell *bell, int64_t ns)
{
    while (!__atomic_load_n(&bell->rung, __ATOMIC_ACQUIRE)) {
        int error = futex_sleep(&bell->rung, 0, ns, 0);
        if (error && error != EAGAIN)
            return __atomic_load_n(&bell->rung, __ATOMIC_ACQUIRE) ? 0 : error;
    }
    return 0;
}

/* Its owner may go at once, and the bell with it: the kernel is told the address, no more. */
static void
bell_ring(Bell *bell)
{
    __atomic_store_n(&bell->rung, 1, __ATOMIC_RELEASE);
    futex_wake(&bell->rung, 1, 0);
}

/* ---------------------------------------------------------------- a mutex */

typedef struct {
    PyObject_HEAD
    uint32_t state; /* 0: free, 1: held, 2: held, and somebody may sleep */
    unsigned long owner;
} Mutex;

static int
mutex_is_mine(Mutex *self)
{
    return __atomic_load_n(&self->owner, __ATOMIC_RELAXED) == PyThread_get_thread_ident();
}

static int
mutex_try(Mutex *self)
{
    uint32_t free = 0;
    if (!__atomic_compare_exchange_n(&self->state, &free, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return 0;
    __atomic_store_n(&self->owner, PyThread_get_thread_ident(), __ATOMIC_RELAXED);
    return 1;
}

/* 0: taken; else errno (ETIMEDOUT, EINTR). */
static int
mutex_take(Mutex *self, int64_t ns)
{
    if (mutex_try(self))
        return 0;
    int64_t deadline = ns == FOREVER ? FOREVER : now_ns() + ns;
    while (__atomic_exchange_n(&self->state, 2, __ATOMIC_ACQUIRE) != 0) {
        int64_t left = deadline == FOREVER ? FOREVER : deadline - now_ns();
        if (left <= 0)
            return ETIMEDOUT;
        if (futex_sleep(&self->state, 2, left, 0) == EINTR)
            return EINTR;
    }
    __atomic_store_n(&self->owner, PyThread_get_thread_ident(), __ATOMIC_RELAXED);
    return 0;
}

static void
mutex_give(Mutex *self)
{
    __atomic_store_n(&self->owner, 0, __ATOMIC_RELAXED);
    if (__atomic_exchange_n(&self->state, 0, __ATOMIC_RELEASE) == 2)
        futex_wake(&self->state, 1, 0);
}

static PyObject *
mutex_acquire(Mutex *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"blocking", "timeout", NULL};
    int blocking = 1, result;
    double timeout = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|pd:acquire", names, &blocking, &timeout))
        return NULL;
    if (mutex_is_mine(self)) {
        PyErr_SetString(PyExc_RuntimeError, "this thread holds the lock already");
        return NULL;
    }
    if (mutex_try(self))
        Py_RETURN_TRUE;
    if (!blocking)
        Py_RETURN_FALSE;
    int64_t deadline = timeout < 0 || timeout > 1e9 ? FOREVER : now_ns() + (int64_t)(timeout * 1e9);
    do {
        int64_t left = deadline == FOREVER ? FOREVER : deadline - now_ns();
        Py_BEGIN_ALLOW_THREADS
        result = mutex_take(self, left < 0 ? 0 : left);
        Py_END_ALLOW_THREADS
        if (result == EINTR && PyErr_CheckSignals() < 0)
            return NULL;
    } while (result == EINTR);
    return PyBool_FromLong(result == 0);
}

static PyObject *
mutex_release(Mutex *self, PyObject *Py_UNUSED(args))
{
    if (!mutex_is_mine(self)) {
        PyErr_SetString(PyExc_RuntimeError, "this thread does not hold the lock");
        return NULL;
    }
    mutex_give(self);
    Py_RETURN_NONE;
}

static PyObject *
mutex_enter(Mutex *self, PyObject *Py_UNUSED(args))
{
    PyObject *none = PyTuple_New(0);
    PyObject *taken = none == NULL ? NULL : mutex_acquire(self, none, NULL);
    Py_XDECREF(none);
    return taken;
}

static PyObject *
mutex_owned(Mutex *self, PyObject *Py_UNUSED(args))
{
    return PyBool_FromLong(mutex_is_mine(self));
}

static PyMethodDef mutex_methods[] = {
    {"acquire", (PyCFunction)(void (*)(void))mutex_acquire, METH_VARARGS | METH_KEYWORDS,
     "acquire(blocking=True, timeout=-1)\n--\n\nAs of `threading.Lock`."},
    {"release", (PyCFunction)mutex_release, METH_NOARGS, "release()\n--\n\nBy its owner only."},
    {"_is_owned", (PyCFunction)mutex_owned, METH_NOARGS, "_is_owned()\n--\n\nAs of `RLock`."},
    {"__enter__", (PyCFunction)mutex_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)mutex_release, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject MutexType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "expbuf_core.native._native.Mutex",
    .tp_doc = "A lock that knows its owner. Not reentrant.",
    .tp_basicsize = sizeof(Mutex),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_methods = mutex_methods,
};

#endif
