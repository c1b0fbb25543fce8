/* `Log`: the plain case of expbuf_core.commit, adds that nothing stands in the way of. It keeps the
 * protocol of that module and of expbuf_file, step by step: locks, words, frames. Whatever is not
 * plain (a switch, a retirement, a full file, a lock that is not free soon) is left to Python,
 * before anything has been changed.
 *
 * Threads that come at the same time let one of them append for all, and one of them sync what all
 * have appended. While one sync is under way, the next adds are appended. From the queue to the
 * acknowledgement nobody needs the GIL, so that the disk never waits for it. */
#ifndef EXPBUF_LOG_H
#define EXPBUF_LOG_H

#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include <sys/stat.h>
#include <unistd.h>

#include "crc.h"
#include "encoder.h"
#include "sleep.h"

/* As in expbuf_core.control; words of the adapter (contracts.OpenLog) from ADAPTER on. */
enum {
    W_GENERATION = 1, W_APPENDED = 8, W_NEXT_ID = 9, W_PUBLISHED = 10, W_DURABLE = 11,
    W_APPENDING = 12, W_FLUSHING = 13, W_FLUSH_FAILED = 14, W_RETIREMENTS = 15,
    W_RESERVED_ID = 17, W_RESERVED_LSN = 18, W_ROWS_ADDED = 21, W_WAITING_TO_APPEND = 26,
    W_WAITING_FOR_FLUSH = 27, W_REPRESENTATION = 24, W_DAMAGED_INDEX = 28, W_NEXT_LSN = 31,
    W_ADAPTER = 32,
    W_FILE = W_ADAPTER, W_DATA_END, W_INDEX_END, W_SYNCED, W_WRITTEN, W_COUNT = 64
};

enum { PAGE_BYTES = 4096, MAGIC = 0x46505845, KIND_ADD = 2 };
enum { FRAME_HEADER = 72, ADD_HEADER = 16, COLUMNS = 24, TABLE_ENTRY = 8, SECTION_HEADER = 8 };
enum { SECTION_LABELS = 1 };
enum { END_BYTES = 80 };                      /* room for the frame that ends a file */
enum { TOGETHER = 64, BATCH_BYTES = 1 << 18 }; /* that one leader takes */
enum { WATCHERS = 8 };                        /* threads that watch for their bells at most */
enum { LARGE = 1 << 16 };                     /* an experience that Python takes care of */
enum { AHEAD_BYTES = 1 << 20 };               /* of zeros, where the log was not written before */
enum { MOMENT_NS = 1000000, LONGEST_NS = 5000000, EVERYBODY = 1 << 30 };
enum { SLOW_SYNC_NS = 1000000000 }; /* one that lasts longer is waited for by Python */

/* What a thread that sleeps is to do when its bell rings. */
enum { SLEEP, APPEND, FLUSH, RETURN };

/* An add on its way; on the stack of its thread. */
typedef struct Add {
    struct Add *next; /* in the queue or in a batch */
    const uint8_t *row, *vector;
    const char *labels; /* JSON, or NULL */
    size_t row_size, vector_size, labels_size;
    double numbers[4]; /* A_TIMESTAMP to A_PRIORITY */
    uint32_t crc, representation;
    Bell bell;
    int may_watch; /* for the bell, instead of sleeping */
    int role, taken; /* under the queue's mutex; taken: it stands in the queue no longer */
    /* What became of it. */
    enum { NOTHING, ACKNOWLEDGED, WRITTEN, WRITE_FAILED, SYNC_FAILED } outcome;
    uint64_t lsn, id, retirements;
    int error;
    PyObject *exception;
} Add;

typedef struct {
    Add *first, *last;
    size_t n;
} List;

/* Several in one operation. */
typedef struct {
    Add *first;
    size_t n, body, rows, data_bytes, index_bytes;
    uint32_t body_crc;
} Operation;

typedef struct {
    Operation operations[TOGETHER];
    size_t n, data_bytes, index_bytes;
} Batch;

typedef struct {
    PyObject_HEAD
    Py_buffer view;
    uint64_t *words;
    char *control;
    uint64_t inode, generation;
    Mutex *append_mutex, *flush_mutex;
    int append_fd, flush_fd; /* of the lock files */
    PyObject *fail;          /* makes an error of what went wrong with what */
    PyObject *fs;            /* NULL: plain system calls */
    int syncs, reserves;
    uint32_t closed;
    uint32_t inside; /* threads, as long as they need anything of this */
    size_t max_commit;
    int64_t patience;
    /* Where to append; under the append lock. */
    int data_fd, index_fd;
    uint64_t number, data_size, index_size;
    uint32_t salt_crc;
    uint8_t *data, *index;
    size_t data_room, index_room;
    /* What to sync; under the flush lock. */
    int sync_fd;
    uint64_t sync_number;
    /* Adds that wait to be appended, and those that are and wait to be synced; under this mutex,
     * which nobody holds for long. */
    pthread_mutex_t mutex;
    List queue, appended;
    int appending, flushing; /* somebody leads */
    size_t target;
    Bell *company_bell;
    int watchers;
    Watching watching;
    int64_t sync_ns; /* the last one took */
} Log;

/* Signal handlers that run in this thread in the middle of an add. That add may be chosen to lead at
 * any moment, and all others wait for it: what a handler adds must not. */
static _Thread_local int handlers;

/* A thread that does without the GIL, and what it met. */
typedef struct {
    PyThreadState *state;
    int error;
    PyObject *exception;
    int stop; /* it was no OSError */
} Caller;

static uint64_t
word(Log *self, int i)
{
    return __atomic_load_n(self->words + i, __ATOMIC_ACQUIRE);
}

static void
set_word(Log *self, int i, uint64_t value)
{
    __atomic_store_n(self->words + i, value, __ATOMIC_RELEASE);
}

static int
is_closed(Log *self)
{
    return (int)__atomic_load_n(&self->closed, __ATOMIC_ACQUIRE);
}

static int
disk_is_quick(Log *self)
{
    return __atomic_load_n(&self->sync_ns, __ATOMIC_RELAXED) < 4 * WATCH_NS;
}

static void
await_word(Log *self, int i, int hint, uint64_t seen, int64_t ns)
{
    uint32_t *half = (uint32_t *)(self->words + i); /* the lower one: little-endian */
    if (disk_is_quick(self) && watch(&self->watching, half, (uint32_t)seen))
        return;
    set_word(self, hint, 1);
    futex_sleep(half, (uint32_t)seen, ns, 1);
}

static void
tell_word(Log *self, int i, int hint, int count)
{
    if (word(self, hint) && futex_wake(self->words + i, count, 1) < count)
        set_word(self, hint, 0);
}

static int
record_lock(int fd, short kind)
{
    struct flock lock = {.l_type = kind, .l_whence = SEEK_SET};
    return fcntl(fd, F_SETLK, &lock);
}

/* ---------------------------------------------------------------- writing */

/* What a file system of a test has raised is kept for `Caller`. */
static int
fs_done(Caller *caller, PyObject *done)
{
    if (done != NULL) {
        Py_DECREF(done);
        return DONE;
    }
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace != NULL)
        PyException_SetTraceback(value, trace);
    caller->stop = !PyErr_GivenExceptionMatches(type, PyExc_OSError);
    Py_XSETREF(caller->exception, value);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return FAILED;
}

static int
log_write(Log *self, Caller *caller, int fd, const uint8_t *from, size_t size, uint64_t offset)
{
    if (self->fs != NULL) {
        PyEval_RestoreThread(caller->state);
        int result = fs_done(caller, PyObject_CallMethod(self->fs, "pwritev", "i[y#]K", fd,
                                                         (const char *)from, (Py_ssize_t)size,
                                                         (unsigned long long)offset));
        caller->state = PyEval_SaveThread();
        return result;
    }
    while (size) {
        ssize_t n = pwrite(fd, from, size, (off_t)offset);
        if (n < 0 && errno != EINTR) {
            caller->error = errno;
            return FAILED;
        }
        if (n > 0) {
            from += n;
            size -= (size_t)n;
            offset += (uint64_t)n;
        }
    }
    return DONE;
}

static int
log_fdatasync(Log *self, Caller *caller)
{
    if (self->fs != NULL) {
        PyEval_RestoreThread(caller->state);
        int result =
            fs_done(caller, PyObject_CallMethod(self->fs, "fdatasync", "i", self->sync_fd));
        caller->state = PyEval_SaveThread();
        return result;
    }
    while (fdatasync(self->sync_fd))
        if (errno != EINTR) {
            caller->error = errno;
            return FAILED;
        }
    return DONE;
}

/* ---------------------------------------------------------------- frames */

static uint8_t *
put(uint8_t *to, const void *bytes, size_t size)
{
    memcpy(to, bytes, size);
    return to + size;
}

static size_t
padded(size_t size)
{
    return (size + 7) & ~(size_t)7;
}

static size_t
bare(const Operation *operation)
{
    return FRAME_HEADER + operation->body + TABLE_ENTRY * operation->n;
}

/* What may be one operation is one: adds with labels stay alone. */
static int
measure(Log *self, Add *adds, Batch *batch)
{
    batch->n = batch->data_bytes = batch->index_bytes = 0;
    for (Add *add = adds; add != NULL; add = add->next) {
        Operation *last = batch->n ? batch->operations + batch->n - 1 : NULL;
        size_t columns = COLUMNS + add->vector_size;
        if (last == NULL || add->labels != NULL || last->first->labels != NULL ||
            last->first->representation != add->representation ||
            last->first->vector_size != add->vector_size ||
            last->rows + add->row_size + (last->n + 1) * add->vector_size > self->max_commit) {
            last = batch->operations + batch->n++;
            *last = (Operation){.first = add, .body = ADD_HEADER};
            if (add->labels != NULL)
                last->body += SECTION_HEADER + add->labels_size;
        }
        last->n++;
        last->body += columns;
        last->rows += add->row_size;
        if (last->rows + last->n * add->vector_size > self->max_commit)
            return NOT_PLAIN;
    }
    for (size_t i = 0; i < batch->n; i++) {
        Operation *operation = batch->operations + i;
        operation->index_bytes = padded(bare(operation));
        operation->data_bytes = padded(bare(operation) + operation->rows);
        batch->data_bytes += operation->data_bytes;
        batch->index_bytes += operation->index_bytes;
    }
    return DONE;
}

static int
reserve(uint8_t **bytes, size_t *room, size_t size)
{
    if (*room >= size)
        return DONE;
    uint8_t *found = PyMem_RawRealloc(*bytes, 2 * size);
    if (found == NULL)
        return NOT_PLAIN;
    *bytes = found;
    *room = 2 * size;
    return DONE;
}

/* As `codec.encode_add`. */
static void
put_body(const Operation *operation, uint8_t *to)
{
    Add *first = operation->first, *add;
    uint32_t head[4] = {(uint32_t)operation->n, (uint32_t)(first->vector_size / 4),
                        first->representation, first->labels != NULL};
    size_t i;
    to = put(to, head, sizeof head);
    for (int column = 0; column < 4; column++)
        for (add = first, i = 0; i < operation->n; add = add->next, i++) {
            float narrow = (float)add->numbers[column];
            to = column < 2 ? put(to, add->numbers + column, 8) : put(to, &narrow, 4);
        }
    for (add = first, i = 0; i < operation->n; add = add->next, i++)
        to = put(to, add->vector, add->vector_size);
    if (first->labels != NULL) {
        uint32_t section[2] = {SECTION_LABELS, (uint32_t)first->labels_size};
        to = put(to, section, sizeof section);
        put(to, first->labels, first->labels_size);
    }
}

/* All that does not depend on the place in the log. */
static void
lay_out(Log *self, Batch *batch)
{
    uint8_t *data = self->data, *index = self->index;
    for (size_t i = 0; i < batch->n; i++) {
        Operation *operation = batch->operations + i;
        put_body(operation, data + FRAME_HEADER);
        operation->body_crc = crc32_of(0, data + FRAME_HEADER, operation->body);
        memcpy(index + FRAME_HEADER, data + FRAME_HEADER, operation->body);
        uint8_t *to = data + bare(operation);
        size_t n = operation->n;
        for (Add *add = operation->first; n; add = add->next, n--)
            to = put(to, add->row, add->row_size);
        memset(to, 0, (size_t)(data + operation->data_bytes - to));
        memset(index + bare(operation), 0, operation->index_bytes - bare(operation));
        data += operation->data_bytes;
        index += operation->index_bytes;
    }
}

/* As `frames.stamp_rows` and `frames.encode`. */
static void
stamp(Log *self, Operation *operation, uint8_t *data, uint8_t *index, uint64_t lsn, uint64_t id,
      uint64_t offset)
{
    uint8_t *table = data + FRAME_HEADER + operation->body, *entry = table;
    uint8_t *row = data + bare(operation);
    uint64_t places[4] = {lsn, word(self, W_DURABLE), offset, id};
    size_t n = operation->n;
    for (Add *add = operation->first; n; add = add->next, n--, id++) {
        uint32_t length = (uint32_t)add->row_size, seal = crc32_of(add->crc, &id, 8);
        put(put(put(row, &id, 8), &add->crc, 4), &seal, 4);
        entry = put(put(entry, &length, 4), &seal, 4);
        row += add->row_size;
        add->lsn = lsn;
        add->id = id;
    }
    uint32_t magic = MAGIC, epoch = (uint32_t)self->number;
    uint16_t kind[2] = {KIND_ADD, 0};
    uint32_t sizes[4] = {(uint32_t)operation->body, operation->body_crc, (uint32_t)operation->n,
                         crc32_of(0, table, TABLE_ENTRY * operation->n)};
    uint64_t rows = operation->rows;
    uint8_t *to = put(data + 8, places, sizeof places);
    to = put(put(put(to, &epoch, sizeof epoch), kind, sizeof kind), sizes, sizeof sizes);
    put(to, &rows, sizeof rows);
    uint32_t crc = crc32_of(self->salt_crc, data + 8, FRAME_HEADER - 8);
    put(put(data, &magic, 4), &crc, 4);
    memcpy(index, data, FRAME_HEADER);
    memcpy(index + FRAME_HEADER + operation->body, table, TABLE_ENTRY * operation->n);
}

/* ---------------------------------------------------------------- append */

/* Whether the folder is the one that was opened, and nobody has set the page anew. */
static int
is_our_folder(Log *self)
{
    struct stat found;
    return stat(self->control, &found) == 0 && (uint64_t)found.st_ino == self->inode &&
           found.st_size >= PAGE_BYTES && word(self, W_GENERATION) == self->generation;
}

/* Leave no trace of a failed append: zeros stood there before. Where that cannot be done, or
 * somebody wanted the interpreter to stop, APPENDING stays set: the next append retires the log. */
static void
undo(Log *self, Caller *caller, size_t size, uint64_t offset)
{
    if (caller->stop)
        return;
    Caller again = {.state = caller->state};
    memset(self->data, 0, size);
    if (log_write(self, &again, self->data_fd, self->data, size, offset) == DONE)
        set_word(self, W_APPENDING, 0);
    caller->state = again.state;
    caller->stop = again.stop;
    if (again.exception != NULL) {
        PyEval_RestoreThread(caller->state);
        if (again.stop)
            Py_XSETREF(caller->exception, again.exception);
        else
            Py_DECREF(again.exception);
        caller->state = PyEval_SaveThread();
    }
}

/* As `_write_ahead` of expbuf_file: room that was only reserved makes the sync of a small commit
 * write metadata, too. */
static int
write_ahead(Log *self, Caller *caller, uint64_t at, uint64_t end)
{
    static uint8_t zeros[AHEAD_BYTES]; /* not const: takes up no room in the file */
    if (end <= word(self, W_WRITTEN))
        return DONE;
    if (end - at < LARGE) {
        end = at + AHEAD_BYTES < self->data_size ? at + AHEAD_BYTES : self->data_size;
        if (log_write(self, caller, self->data_fd, zeros, end - at, at))
            return FAILED;
    }
    set_word(self, W_WRITTEN, end);
    return DONE;
}

/* Append record lock held. */
static int
append_now(Log *self, Caller *caller, Batch *batch, uint64_t *at)
{
    if (!is_our_folder(self) || word(self, W_APPENDING) || word(self, W_FLUSH_FAILED) ||
        word(self, W_FILE) != self->number)
        return NOT_PLAIN;
    uint64_t lsn = word(self, W_NEXT_LSN), id = word(self, W_NEXT_ID), n = 0;
    uint64_t data_at = word(self, W_DATA_END), index_at = word(self, W_INDEX_END);
    uint64_t data_end = data_at + batch->data_bytes, index_end = index_at + batch->index_bytes;
    for (size_t i = 0; i < batch->n; i++)
        n += batch->operations[i].n;
    if (data_end + END_BYTES > self->data_size || index_end + END_BYTES > self->index_size ||
        (self->reserves && (id + n > word(self, W_RESERVED_ID) ||
                            lsn + batch->n + 1 > word(self, W_RESERVED_LSN))))
        return NOT_PLAIN;
    uint8_t *data = self->data, *index = self->index;
    uint64_t next_id = id, retirements = word(self, W_RETIREMENTS);
    for (size_t i = 0; i < batch->n; i++) {
        Operation *operation = batch->operations + i;
        stamp(self, operation, data, index, lsn + i, next_id,
              data_at + (uint64_t)(data - self->data));
        next_id += operation->n;
        data += operation->data_bytes;
        index += operation->index_bytes;
    }
    set_word(self, W_APPENDING, 1);
    if (write_ahead(self, caller, data_at, data_end) ||
        log_write(self, caller, self->data_fd, self->data, batch->data_bytes, data_at) ||
        log_write(self, caller, self->index_fd, self->index, batch->index_bytes, index_at)) {
        undo(self, caller, batch->data_bytes, data_at);
        return FAILED;
    }
    set_word(self, W_DATA_END, data_end);
    set_word(self, W_INDEX_END, index_end);
    set_word(self, W_NEXT_ID, next_id);
    set_word(self, W_ROWS_ADDED, word(self, W_ROWS_ADDED) + n);
    set_word(self, W_NEXT_LSN, lsn + batch->n);
    set_word(self, W_APPENDED, lsn + batch->n - 1);
    set_word(self, W_APPENDING, 0);
    if (!self->syncs)
        set_word(self, W_PUBLISHED, lsn + batch->n - 1);
    for (Add *add = batch->operations[0].first; add != NULL; add = add->next)
        add->retirements = retirements;
    *at = data_at;
    return DONE;
}

/* Append thread lock held. The record lock is waited for only as long as others just write. */
static int
append_locked(Log *self, Caller *caller, Batch *batch)
{
    if (is_closed(self) || self->data_fd < 0 ||
        reserve(&self->data, &self->data_room, batch->data_bytes) ||
        reserve(&self->index, &self->index_room, batch->index_bytes))
        return NOT_PLAIN;
    lay_out(self, batch);
    int64_t deadline = now_ns() + LONGEST_NS;
    uint64_t at;
    for (;;) {
        uint64_t seen = word(self, W_APPENDED);
        if (record_lock(self->append_fd, F_WRLCK) == 0)
            break;
        if ((errno != EACCES && errno != EAGAIN) || now_ns() > deadline)
            return NOT_PLAIN;
        await_word(self, W_APPENDED, W_WAITING_TO_APPEND, seen, MOMENT_NS);
    }
    int result = append_now(self, caller, batch, &at);
    record_lock(self->append_fd, F_UNLCK);
    tell_word(self, W_APPENDED, W_WAITING_TO_APPEND, 1);
    /* Where a flush is under way, another will have to follow it anyhow. */
    if (result == DONE && self->syncs && self->fs == NULL && !word(self, W_FLUSHING))
        sync_file_range(self->data_fd, (off_t)at, (off_t)batch->data_bytes, SYNC_FILE_RANGE_WRITE);
    return result;
}

static int
append(Log *self, Caller *caller, Add *adds)
{
    Batch batch;
    if (measure(self, adds, &batch) || mutex_take(self->append_mutex, LONGEST_NS))
        return NOT_PLAIN;
    int result = append_locked(self, caller, &batch);
    mutex_give(self->append_mutex);
    return result;
}

/* ---------------------------------------------------------------- flush */

/* Flush record lock held. */
static int
flush_now(Log *self, Caller *caller, uint64_t lsn, uint64_t retirements)
{
    if (word(self, W_RETIREMENTS) != retirements || word(self, W_FLUSH_FAILED) ||
        word(self, W_FLUSHING))
        return NOT_PLAIN;
    if (word(self, W_DURABLE) >= lsn)
        return DONE;
    uint64_t target = word(self, W_APPENDED); /* before the file is looked at that it may be in */
    if (word(self, W_FILE) != self->sync_number || word(self, W_SYNCED) != self->sync_number)
        return NOT_PLAIN;
    set_word(self, W_FLUSHING, 1);
    if (log_fdatasync(self, caller) != DONE) {
        /* Linux reports a write error once, and then calls the pages clean. A mere interrupt has
         * taken no report away with it. */
        if (!caller->stop)
            set_word(self, W_FLUSH_FAILED, 1);
        set_word(self, W_FLUSHING, 0);
        return FAILED;
    }
    if (target > word(self, W_DURABLE))
        set_word(self, W_DURABLE, target);
    set_word(self, W_FLUSHING, 0);
    return DONE;
}

/* Lead a flush; DONE also where another process does: look again. */
static int
flush_led(Log *self, Caller *caller, uint64_t lsn, uint64_t retirements, uint64_t durable)
{
    int result = NOT_PLAIN;
    if (mutex_take(self->flush_mutex, LONGEST_NS))
        return NOT_PLAIN;
    if (!is_closed(self) && self->sync_fd >= 0) {
        if (record_lock(self->flush_fd, F_WRLCK) == 0) {
            result = flush_now(self, caller, lsn, retirements);
            record_lock(self->flush_fd, F_UNLCK);
            tell_word(self, W_DURABLE, W_WAITING_FOR_FLUSH, EVERYBODY);
        } else if (errno == EACCES || errno == EAGAIN) {
            await_word(self, W_DURABLE, W_WAITING_FOR_FLUSH, durable, LONGEST_NS);
            result = DONE;
        }
    }
    mutex_give(self->flush_mutex);
    return result;
}

static int
flush(Log *self, Caller *caller, uint64_t lsn, uint64_t retirements)
{
    int result = DONE;
    int64_t deadline = now_ns() + SLOW_SYNC_NS;
    while (result == DONE && now_ns() < deadline) {
        uint64_t durable = word(self, W_DURABLE); /* first: behind a retirement it is another log's */
        if (word(self, W_RETIREMENTS) != retirements)
            return NOT_PLAIN;
        if (durable >= lsn)
            return DONE;
        if (word(self, W_FLUSHING))
            await_word(self, W_DURABLE, W_WAITING_FOR_FLUSH, durable, LONGEST_NS);
        /* Nothing came of it: who has the lock lives, and who died has it no longer. */
        if (word(self, W_DURABLE) == durable)
            result = flush_led(self, caller, lsn, retirements, durable);
    }
    return result == DONE ? NOT_PLAIN : result;
}

/* ---------------------------------------------------------------- together */

static void
list_push(List *list, Add *add)
{
    add->next = NULL;
    if (list->last == NULL)
        list->first = add;
    else
        list->last->next = add;
    list->last = add;
    list->n++;
}

static Add *
list_pop(List *list)
{
    Add *add = list->first;
    if (add != NULL) {
        list->first = add->next;
        if (list->first == NULL)
            list->last = NULL;
        add->next = NULL;
        list->n--;
    }
    return add;
}

static void
list_remove(List *list, Add *add)
{
    Add *before = NULL;
    for (Add *each = list->first; each != add; each = each->next)
        before = each;
    if (before == NULL)
        list->first = add->next;
    else
        before->next = add->next;
    if (list->last == add)
        list->last = before;
    add->next = NULL;
    list->n--;
}

/* What the caller has met, in each of these adds. Where somebody wanted the interpreter to stop, that
 * is for the caller's own: to the others it is that the call was interrupted. */
static void
tell(Caller *caller, Add *adds, Add *own, int outcome)
{
    if (caller->exception != NULL) {
        PyEval_RestoreThread(caller->state);
        int for_all = PyErr_GivenExceptionMatches(caller->exception, PyExc_Exception);
        for (Add *add = adds; add != NULL; add = add->next)
            if (for_all || add == own)
                add->exception = Py_NewRef(caller->exception);
        Py_CLEAR(caller->exception);
        caller->state = PyEval_SaveThread();
        caller->error = EINTR;
    }
    for (Add *add = adds; add != NULL; add = add->next) {
        add->error = caller->error;
        add->outcome = outcome;
    }
    caller->error = caller->stop = 0;
}

/* Let the threads of these adds return. When a bell has rung, its add is gone. */
static void
send_home(Add *adds, Add *own)
{
    for (Add *add = adds, *next; add != NULL; add = next) {
        next = add->next;
        add->role = RETURN; /* without the mutex: nobody looks before the bell has rung */
        if (add != own)
            bell_ring(&add->bell);
    }
}

/* Let somebody append what waits, if it is time (mutex held); whose bell is to be rung.
 *
 * Of those who come again and again half are enough: while that half is synced, the other one
 * comes. Else a single one would lead a sync of its own each time. Beside a sync one need not hurry:
 * what is appended only then can be synced only behind it. */
static Add *
next_append(Log *self)
{
    if (self->appending || self->queue.n == 0 ||
        (self->flushing && self->queue.n < self->target))
        return NULL;
    Add *heir = list_pop(&self->queue);
    heir->taken = 1; /* for good, whatever its role is later */
    heir->role = APPEND;
    self->appending = 1;
    return heir;
}

/* Wait for others to come, for a short time at most (mutex held). */
static void
await_company(Log *self)
{
    Bell bell = {0};
    self->company_bell = &bell;
    pthread_mutex_unlock(&self->mutex);
    bell_await(&bell, self->patience);
    pthread_mutex_lock(&self->mutex);
    self->company_bell = NULL;
}

/* Append what waits, with one's own add. */
static void
lead_append(Log *self, Caller *caller, Add *own)
{
    List batch = {0};
    size_t size = own->row_size + own->vector_size;
    pthread_mutex_lock(&self->mutex);
    if (self->syncs && !self->flushing && self->queue.n + 1 < self->target)
        await_company(self);
    list_push(&batch, own);
    while (self->queue.first != NULL && batch.n < TOGETHER) {
        size += self->queue.first->row_size + self->queue.first->vector_size;
        if (size > BATCH_BYTES)
            break;
        Add *add = list_pop(&self->queue);
        add->taken = 1;
        list_push(&batch, add);
    }
    pthread_mutex_unlock(&self->mutex);
    int result = append(self, caller, batch.first), home = 1;
    if (result == NOT_PLAIN || (result == FAILED && batch.n > 1 && !caller->stop))
        tell(caller, batch.first, own, NOTHING); /* what is too large must not take others along */
    else if (result == FAILED)
        tell(caller, batch.first, own, WRITE_FAILED);
    else {
        tell(caller, batch.first, own, WRITTEN);
        home = !self->syncs;
    }
    pthread_mutex_lock(&self->mutex);
    self->appending = 0;
    if (!home) {
        own->role = SLEEP;
        own->bell.rung = 0;
        for (Add *add; (add = list_pop(&batch)) != NULL;)
            list_push(&self->appended, add);
        if (!self->flushing) {
            self->flushing = 1;
            own->role = FLUSH;
        }
    }
    Add *heir = next_append(self);
    pthread_mutex_unlock(&self->mutex);
    if (heir != NULL)
        bell_ring(&heir->bell);
    if (home)
        send_home(batch.first, own);
}

/* Sync all that is appended, with one's own add. */
static void
lead_flush(Log *self, Caller *caller, Add *own)
{
    pthread_mutex_lock(&self->mutex);
    List batch = self->appended;
    self->appended = (List){0};
    pthread_mutex_unlock(&self->mutex);
    uint64_t retirements = batch.last->retirements;
    int64_t began = now_ns();
    int result = flush(self, caller, batch.last->lsn, retirements);
    tell(caller, batch.first, own,
         result == DONE ? ACKNOWLEDGED : result == FAILED ? SYNC_FAILED : WRITTEN);
    if (result == DONE)
        for (Add *add = batch.first; add != NULL; add = add->next)
            if (add->retirements != retirements)
                add->outcome = WRITTEN; /* into a log that was given up since */
    __atomic_store_n(&self->sync_ns, now_ns() - began, __ATOMIC_RELAXED);
    pthread_mutex_lock(&self->mutex);
    self->target = (batch.n + self->appended.n + self->queue.n + 1) / 2;
    Add *heir = self->appended.first;
    if (heir != NULL)
        heir->role = FLUSH;
    else
        self->flushing = 0;
    Add *following = next_append(self);
    pthread_mutex_unlock(&self->mutex);
    if (heir != NULL)
        bell_ring(&heir->bell);
    if (following != NULL)
        bell_ring(&following->bell);
    send_home(batch.first, own);
}

/* Sleep until there is something to do. Where a signal handler raises, an add that nobody has taken
 * is not written: RETURN, with NOTHING as its outcome; else it takes its course. */
static void
sleep_until_rung(Log *self, Caller *caller, Add *add, PyObject **interrupt)
{
    while (bell_await(&add->bell, FOREVER) != 0) {
        if (syscall(SYS_gettid) != getpid())
            continue; /* handlers run in the main thread only */
        PyEval_RestoreThread(caller->state);
        handlers++;
        int raised = PyErr_CheckSignals();
        handlers--;
        if (raised < 0) {
            PyObject *type, *value, *trace;
            PyErr_Fetch(&type, &value, &trace);
            PyErr_NormalizeException(&type, &value, &trace);
            if (trace != NULL)
                PyException_SetTraceback(value, trace);
            Py_XSETREF(*interrupt, value);
            Py_XDECREF(type);
            Py_XDECREF(trace);
        }
        caller->state = PyEval_SaveThread();
        if (raised < 0) {
            pthread_mutex_lock(&self->mutex);
            int waits = !add->taken;
            if (waits) {
                list_remove(&self->queue, add);
                add->role = RETURN;
            }
            pthread_mutex_unlock(&self->mutex);
            if (waits)
                return;
        }
    }
}

/* Whether it pays to watch for the bell (mutex held): while others come again and again. */
static int
watches_for_bell(Log *self, Add *add)
{
    int watches = add->role == SLEEP && add->may_watch && self->target > 1 &&
                  self->watchers < WATCHERS && disk_is_quick(self);
    self->watchers += watches;
    return watches;
}

static void
take_part(Log *self, Caller *caller, Add *add, PyObject **interrupt)
{
    add->may_watch = syscall(SYS_gettid) != getpid(); /* a signal ends the main thread's sleep */
    pthread_mutex_lock(&self->mutex);
    list_push(&self->queue, add);
    Add *heir = next_append(self);
    if (self->company_bell != NULL && self->queue.n + 1 >= self->target) {
        bell_ring(self->company_bell);
        self->company_bell = NULL;
    }
    int role = add->role, watches = watches_for_bell(self, add);
    pthread_mutex_unlock(&self->mutex);
    if (heir != NULL && heir != add)
        bell_ring(&heir->bell);
    while (role != RETURN) {
        if (role == APPEND)
            lead_append(self, caller, add);
        else if (role == FLUSH)
            lead_flush(self, caller, add);
        else if (!watches || !watch(&self->watching, &add->bell.rung, 0))
            sleep_until_rung(self, caller, add, interrupt);
        pthread_mutex_lock(&self->mutex);
        self->watchers -= watches;
        role = add->role;
        watches = watches_for_bell(self, add);
        pthread_mutex_unlock(&self->mutex);
    }
}

/* ---------------------------------------------------------------- add */

static int
add_of(Log *self, PyObject *accepted, PyObject *labels_of, Add *add, PyObject **labels)
{
    if (!PyTuple_Check(accepted) || PyTuple_GET_SIZE(accepted) != A_FIELDS)
        return NOT_PLAIN;
    PyObject *row = PyTuple_GET_ITEM(accepted, A_ROW), *crc = PyTuple_GET_ITEM(accepted, A_CRC);
    PyObject *vector = PyTuple_GET_ITEM(accepted, A_VECTOR);
    PyObject *tags = PyTuple_GET_ITEM(accepted, A_TAGS), *key = PyTuple_GET_ITEM(accepted, A_KEY);
    if (!PyBytes_CheckExact(row) || !PyBytes_CheckExact(vector) || !PyLong_CheckExact(crc) ||
        !PyList_CheckExact(tags))
        return NOT_PLAIN;
    for (int i = 0; i < 4; i++) {
        PyObject *number = PyTuple_GET_ITEM(accepted, A_TIMESTAMP + i);
        if (!PyFloat_CheckExact(number))
            return NOT_PLAIN;
        add->numbers[i] = PyFloat_AS_DOUBLE(number);
    }
    add->row = (const uint8_t *)PyBytes_AS_STRING(row);
    add->row_size = (size_t)PyBytes_GET_SIZE(row);
    add->vector = (const uint8_t *)PyBytes_AS_STRING(vector);
    add->vector_size = (size_t)PyBytes_GET_SIZE(vector);
    add->crc = (uint32_t)PyLong_AsUnsignedLongMask(crc);
    if (PyErr_Occurred())
        return FAILED;
    if (PyList_GET_SIZE(tags) > 0 || key != Py_None) {
        *labels = PyObject_CallOneArg(labels_of, accepted);
        if (*labels == NULL)
            return FAILED;
        if (*labels != Py_None) {
            if (!PyBytes_CheckExact(*labels))
                return NOT_PLAIN;
            add->labels = PyBytes_AS_STRING(*labels);
            add->labels_size = (size_t)PyBytes_GET_SIZE(*labels);
        }
    }
    size_t size = add->row_size + add->vector_size + add->labels_size;
    return add->row_size >= ROW_HEADER && add->vector_size % 4 == 0 && size < LARGE &&
                   add->row_size + add->vector_size <= self->max_commit
               ? DONE
               : NOT_PLAIN;
}

static PyObject *
add_failed(Log *self, Add *add, const char *what)
{
    PyObject *exception = add->exception;
    if (exception == NULL) {
        errno = add->error;
        PyErr_SetFromErrno(PyExc_OSError);
        PyObject *type, *trace;
        PyErr_Fetch(&type, &exception, &trace);
        PyErr_NormalizeException(&type, &exception, &trace);
        Py_XDECREF(type);
        Py_XDECREF(trace);
        add->exception = exception;
    }
    return PyObject_CallFunction(self->fail, "sO", what, exception); /* raises */
}

static PyObject *
add_result(Log *self, Add *add)
{
    switch (add->outcome) {
    case ACKNOWLEDGED:
        return Py_BuildValue("(KKO)", (unsigned long long)add->lsn, (unsigned long long)add->id,
                             Py_None);
    case WRITTEN:
        return Py_BuildValue("(KKK)", (unsigned long long)add->lsn, (unsigned long long)add->id,
                             (unsigned long long)add->retirements);
    case WRITE_FAILED:
        return add_failed(self, add, "write");
    case SYNC_FAILED:
        return add_failed(self, add, "sync");
    default:
        Py_RETURN_NONE;
    }
}

/* What its owner need not look after before one of these words comes to its value. */
enum { WATCHED = 6 };
static const int watched[WATCHED] = {W_APPENDED, W_NEXT_ID, W_ROWS_ADDED, W_DAMAGED_INDEX,
                                     W_FILE, W_DATA_END};

typedef struct {
    uint64_t representation, until[WATCHED];
} Watch;

static int
is_due(Log *self, const Watch *watch)
{
    for (int i = 0; i < WATCHED; i++)
        if (word(self, watched[i]) >= __atomic_load_n(watch->until + i, __ATOMIC_RELAXED))
            return 1;
    return word(self, W_REPRESENTATION) != watch->representation;
}

/* Whether native code may add now. Not where a signal handler has interrupted an add of this thread,
 * or this thread while it held a lock: Python says so. */
static int
log_is_free(Log *self)
{
    return !is_closed(self) && self->words != NULL && self->data_fd >= 0 && !handlers &&
           !mutex_is_mine(self->append_mutex) && !mutex_is_mine(self->flush_mutex);
}

/* Write what was accepted. DONE: see `outcome`; `due`: and there is more to do, if one watches. */
static int
log_write_add(Log *self, PyObject *accepted, PyObject *labels_of, const Watch *watch, Add *add,
              int *due)
{
    PyObject *labels = NULL, *interrupt = NULL;
    int result = add_of(self, accepted, labels_of, add, &labels);
    if (result == DONE) {
        __atomic_add_fetch(&self->inside, 1, __ATOMIC_ACQ_REL);
        Caller caller = {.state = PyEval_SaveThread()};
        take_part(self, &caller, add, &interrupt);
        /* The words may be gone behind this. They are gone by now where somebody closed the log
         * while labels were asked for: then nothing came of the add. */
        *due = watch != NULL && add->outcome != NOTHING && is_due(self, watch);
        if (__atomic_sub_fetch(&self->inside, 1, __ATOMIC_ACQ_REL) == 0 && is_closed(self))
            futex_wake(&self->inside, EVERYBODY, 0);
        PyEval_RestoreThread(caller.state);
        if (interrupt != NULL) {
            PyErr_SetObject((PyObject *)Py_TYPE(interrupt), interrupt);
            Py_DECREF(interrupt);
            result = FAILED;
        }
    }
    Py_XDECREF(labels);
    return result;
}

static PyObject *
log_add(Log *self, PyObject *const *args, Py_ssize_t n)
{
    Add add = {0};
    int due;
    if (n != 3) {
        PyErr_SetString(PyExc_TypeError, "add takes what was accepted, representation, labels_of");
        return NULL;
    }
    add.representation = (uint32_t)PyLong_AsUnsignedLongMask(args[1]);
    if (PyErr_Occurred())
        return NULL;
    if (!log_is_free(self))
        Py_RETURN_NONE;
    int result = log_write_add(self, args[0], args[2], NULL, &add, &due);
    PyObject *found = result == DONE ? add_result(self, &add)
                      : result == NOT_PLAIN ? Py_NewRef(Py_None) : NULL;
    Py_XDECREF(add.exception);
    return found;
}

/* ---------------------------------------------------------------- life */

static PyObject *
log_append_to(Log *self, PyObject *args)
{
    int data_fd, index_fd;
    unsigned long long number, data_size, index_size;
    unsigned int salt_crc;
    if (!PyArg_ParseTuple(args, "iiKKKI:append_to", &data_fd, &index_fd, &number, &data_size,
                          &index_size, &salt_crc))
        return NULL;
    self->data_fd = data_fd;
    self->index_fd = index_fd;
    self->number = number;
    self->data_size = data_size;
    self->index_size = index_size;
    self->salt_crc = salt_crc;
    Py_RETURN_NONE;
}

static PyObject *
log_append_nowhere(Log *self, PyObject *Py_UNUSED(ignored))
{
    self->data_fd = self->index_fd = -1;
    Py_RETURN_NONE;
}

static PyObject *
log_sync_with(Log *self, PyObject *args)
{
    int fd;
    unsigned long long number;
    if (!PyArg_ParseTuple(args, "iK:sync_with", &fd, &number))
        return NULL;
    self->sync_fd = fd;
    self->sync_number = number;
    Py_RETURN_NONE;
}

static PyObject *
log_sync_nothing(Log *self, PyObject *Py_UNUSED(ignored))
{
    self->sync_fd = -1;
    Py_RETURN_NONE;
}

static PyObject *
log_shut(Log *self, PyObject *Py_UNUSED(ignored))
{
    __atomic_store_n(&self->closed, 1, __ATOMIC_RELEASE);
    Py_RETURN_NONE;
}

static PyObject *
log_abandon(Log *self, PyObject *Py_UNUSED(ignored))
{
    __atomic_store_n(&self->closed, 1, __ATOMIC_RELEASE);
    self->data_fd = self->index_fd = self->sync_fd = -1;
    self->words = NULL;
    if (self->view.obj != NULL)
        PyBuffer_Release(&self->view);
    Py_RETURN_NONE;
}

static PyObject *
log_close(Log *self, PyObject *Py_UNUSED(ignored))
{
    __atomic_store_n(&self->closed, 1, __ATOMIC_RELEASE);
    uint32_t inside;
    while ((inside = __atomic_load_n(&self->inside, __ATOMIC_ACQUIRE)) != 0) {
        Py_BEGIN_ALLOW_THREADS
        futex_sleep(&self->inside, inside, 10 * MOMENT_NS, 0);
        Py_END_ALLOW_THREADS
    }
    return log_abandon(self, NULL);
}

static int
log_init(Log *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"words", "control", "inode", "generation", "append_mutex", "append_fd",
                            "flush_mutex", "flush_fd", "fail", "fs", "syncs", "reserves",
                            "max_commit", "patience", NULL};
    PyObject *words, *append_mutex, *flush_mutex, *fail, *fs, *control;
    unsigned long long inode, generation;
    Py_ssize_t max_commit;
    double patience;
    if (self->append_mutex != NULL) {
        PyErr_SetString(PyExc_TypeError, "made twice");
        return -1;
    }
    self->closed = 1; /* until all is there */
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO&KKO!iO!iOOppnd", names, &words,
                                     PyUnicode_FSConverter, &control, &inode, &generation,
                                     &MutexType, &append_mutex, &self->append_fd, &MutexType,
                                     &flush_mutex, &self->flush_fd, &fail, &fs, &self->syncs,
                                     &self->reserves, &max_commit, &patience))
        return -1;
    size_t size = (size_t)PyBytes_GET_SIZE(control) + 1;
    self->control = PyMem_RawMalloc(size);
    if (self->control != NULL)
        memcpy(self->control, PyBytes_AS_STRING(control), size);
    Py_DECREF(control);
    if (self->control == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    pthread_mutex_init(&self->mutex, NULL);
    self->data_fd = self->index_fd = self->sync_fd = -1;
    self->inode = inode;
    self->generation = generation;
    self->max_commit = max_commit < 0 ? 0 : (size_t)max_commit;
    self->patience = (int64_t)(patience * 1e9);
    self->target = 1;
    self->append_mutex = (Mutex *)Py_NewRef(append_mutex);
    self->flush_mutex = (Mutex *)Py_NewRef(flush_mutex);
    self->fail = Py_NewRef(fail);
    self->fs = fs == Py_None ? NULL : Py_NewRef(fs);
    if (PyObject_GetBuffer(words, &self->view, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) < 0) {
        self->view.obj = NULL;
        return -1;
    }
    if (self->view.len < 8 * W_COUNT) {
        PyErr_SetString(PyExc_ValueError, "too few words");
        return -1;
    }
    self->words = self->view.buf;
    self->closed = 0;
    return 0;
}

static int
log_traverse(Log *self, visitproc visit, void *arg)
{
    Py_VISIT(self->append_mutex);
    Py_VISIT(self->flush_mutex);
    Py_VISIT(self->fail);
    Py_VISIT(self->fs);
    return 0;
}

static int
log_clear(Log *self)
{
    Py_CLEAR(self->fail);
    Py_CLEAR(self->fs);
    return 0;
}

static void
log_dealloc(Log *self)
{
    PyObject_GC_UnTrack(self);
    log_clear(self);
    if (self->view.obj != NULL)
        PyBuffer_Release(&self->view);
    PyMem_RawFree(self->control);
    PyMem_RawFree(self->data);
    PyMem_RawFree(self->index);
    Py_XDECREF(self->append_mutex);
    Py_XDECREF(self->flush_mutex);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef log_methods[] = {
    {"add", (PyCFunction)(void (*)(void))log_add, METH_FASTCALL,
     "add(accepted, representation, labels_of)\n--\n\n(LSN, id, None) of an add that is durable as "
     "configured; with the number of retirements where it is written, and no more; None: this is "
     "not plain, and nothing was done."},
    {"append_to", (PyCFunction)log_append_to, METH_VARARGS,
     "append_to(data_fd, index_fd, number, data_size, index_size, salt_crc)\n--\n\n"
     "Append to these files from now on (append lock held)."},
    {"append_nowhere", (PyCFunction)log_append_nowhere, METH_NOARGS,
     "append_nowhere()\n--\n\nAppend to none (append lock held)."},
    {"sync_with", (PyCFunction)log_sync_with, METH_VARARGS,
     "sync_with(fd, number)\n--\n\nSync this file from now on (flush lock held)."},
    {"sync_nothing", (PyCFunction)log_sync_nothing, METH_NOARGS,
     "sync_nothing()\n--\n\nSync none (flush lock held)."},
    {"shut", (PyCFunction)log_shut, METH_NOARGS, "shut()\n--\n\nBegin nothing any more."},
    {"close", (PyCFunction)log_close, METH_NOARGS,
     "close()\n--\n\nBegin nothing any more; let go of the words when all threads are out."},
    {"abandon", (PyCFunction)log_abandon, METH_NOARGS,
     "abandon()\n--\n\nThe same in a forked child, which has none of those threads."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef log_members[] = {
    {"inside", T_UINT, offsetof(Log, inside), READONLY, "Threads whose adds are under way."},
    {"watchers", T_INT, offsetof(Log, watchers), READONLY, "Of them, who watch for their bells."},
    {"data_size", T_ULONGLONG, offsetof(Log, data_size), READONLY, "Of the file appended to last."},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject LogType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "expbuf_core.native._native.Log",
    .tp_doc = "Appends plain adds and makes them durable.",
    .tp_basicsize = sizeof(Log),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)log_init,
    .tp_traverse = (traverseproc)log_traverse,
    .tp_clear = (inquiry)log_clear,
    .tp_dealloc = (destructor)log_dealloc,
    .tp_methods = log_methods,
    .tp_members = log_members,
};

#endif
