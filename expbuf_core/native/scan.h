/* `run`: frames that are alike, as `LogFile.alike` of expbuf_file finds them. Nothing is passed over
 * and nothing is found fault with: it ends before the first frame that is not plainly the next
 * operation, intact, of the same kind and size. */
#ifndef EXPBUF_SCAN_H
#define EXPBUF_SCAN_H

#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "crc.h"
#include "log.h"

enum { LOG_BEGIN = 0xF0 };

typedef struct {
    uint64_t lsn, place, first_id, rows_len;
    uint32_t body_len, body_crc, n, table_crc;
    uint16_t kind;
} Header;

typedef struct {
    const uint8_t *bytes;        /* what was read; it stands at `stands_at` */
    size_t end, stands_at, limit; /* of the bytes, and of the file */
    uint32_t epoch, salt_crc;
    int data_log, rows;
} Window;

static int
header_at(const Window *window, size_t at, Header *header)
{
    const uint8_t *from = window->bytes + at;
    uint32_t magic, crc, epoch;
    if (at + FRAME_HEADER > window->end)
        return 0;
    memcpy(&magic, from, 4);
    memcpy(&crc, from + 4, 4);
    memcpy(&epoch, from + 40, 4);
    if (magic != MAGIC || epoch != window->epoch ||
        crc32_of(window->salt_crc, from + 8, FRAME_HEADER - 8) != crc)
        return 0;
    memcpy(&header->lsn, from + 8, 8);
    memcpy(&header->place, from + 24, 8);
    memcpy(&header->first_id, from + 32, 8);
    memcpy(&header->kind, from + 44, 2);
    memcpy(&header->body_len, from + 48, 4);
    memcpy(&header->body_crc, from + 52, 4);
    memcpy(&header->n, from + 56, 4);
    memcpy(&header->table_crc, from + 60, 4);
    memcpy(&header->rows_len, from + 64, 8);
    return header->kind < LOG_BEGIN && header->n <= 1;
}

/* Where the frame ends if it is intact, else 0. */
static size_t
intact_until(const Window *window, size_t at, const Header *header)
{
    if (header->rows_len >> 40) /* no file is so large */
        return 0;
    size_t table_at = at + FRAME_HEADER + header->body_len;
    size_t rows_at = table_at + TABLE_ENTRY * header->n;
    size_t behind = rows_at + (window->data_log ? header->rows_len : 0);
    size_t following = at + ((behind - at + 7) & ~(size_t)7);
    const uint8_t *bytes = window->bytes;
    if ((window->rows ? following : rows_at) > window->end ||
        window->stands_at + following > window->limit ||
        (window->data_log && header->place != window->stands_at + at) ||
        crc32_of(0, bytes + at + FRAME_HEADER, header->body_len) != header->body_crc)
        return 0;
    if (header->n == 0)
        return header->rows_len == 0 ? following : 0;
    uint32_t length, seal;
    memcpy(&length, bytes + table_at, 4);
    memcpy(&seal, bytes + table_at + 4, 4);
    if (crc32_of(0, bytes + table_at, TABLE_ENTRY) != header->table_crc ||
        length != header->rows_len)
        return 0;
    if (window->rows) {
        uint64_t id;
        uint32_t crc, own_seal;
        if (length < ROW_HEADER)
            return 0;
        memcpy(&id, bytes + rows_at, 8);
        memcpy(&crc, bytes + rows_at + 8, 4);
        memcpy(&own_seal, bytes + rows_at + 12, 4);
        if (id != header->first_id || own_seal != seal ||
            crc32_of(0, bytes + rows_at + ROW_HEADER, length - ROW_HEADER) != crc ||
            crc32_of(crc, &id, 8) != seal)
            return 0;
        for (size_t i = behind; i < following; i++)
            if (bytes[i])
                return 0;
    }
    return following;
}

static PyObject *
native_run(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer view;
    Py_ssize_t at, end, stands_at, limit, least;
    unsigned long long until;
    PyObject *first_lsn, *found = NULL;
    Window window;
    if (!PyArg_ParseTuple(args, "y*nnnnIIppOKn:run", &view, &at, &end, &stands_at, &limit,
                          &window.epoch, &window.salt_crc, &window.data_log, &window.rows,
                          &first_lsn, &until, &least))
        return NULL;
    if (window.rows && !window.data_log) { /* there are none */
        PyBuffer_Release(&view);
        Py_RETURN_NONE;
    }
    window.bytes = view.buf;
    window.end = (size_t)end;
    window.stands_at = (size_t)stands_at;
    window.limit = (size_t)limit;
    Header first = {0}, header;
    uint64_t lsn = 0;
    if (at < 0 || end < 0 || end > view.len || stands_at < 0 || limit < 0 || at > end) {
        PyErr_SetString(PyExc_ValueError, "outside of what was read");
        goto done;
    }
    size_t start = (size_t)at, here = start, n = 0, following;
    int any = first_lsn == Py_None;
    if (!any) {
        lsn = PyLong_AsUnsignedLongLong(first_lsn);
        if (PyErr_Occurred())
            goto done;
    }
    /* Twice over them: first they are counted and checked. */
    while (header_at(&window, here, &header) && (following = intact_until(&window, here, &header))) {
        if (n == 0) {
            first = header;
            if (any)
                lsn = header.lsn;
        }
        if (header.lsn != lsn + n || header.lsn > until || header.kind != first.kind ||
            header.body_len != first.body_len || header.n != first.n)
            break;
        here = following;
        n++;
    }
    if (n < (size_t)least || n == 0) {
        found = Py_NewRef(Py_None);
        goto done;
    }
    size_t body = first.body_len;
    PyObject *bodies = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(n * body));
    PyObject *numbers = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(20 * n));
    if (bodies != NULL && numbers != NULL) {
        uint8_t *to = (uint8_t *)PyByteArray_AS_STRING(bodies);
        uint8_t *ids = (uint8_t *)PyByteArray_AS_STRING(numbers), *places = ids + 8 * n,
                *sizes = places + 8 * n;
        here = start;
        for (size_t i = 0; i < n; i++) {
            header_at(&window, here, &header);
            to = put(to, window.bytes + here + FRAME_HEADER, body);
            uint64_t place = header.place + FRAME_HEADER + body + TABLE_ENTRY * header.n;
            uint32_t size = (uint32_t)header.rows_len;
            ids = put(ids, &header.first_id, 8);
            places = put(places, &place, 8);
            sizes = put(sizes, &size, 4);
            size_t bare_end = here + FRAME_HEADER + body + TABLE_ENTRY * header.n;
            here += (bare_end + (window.data_log ? header.rows_len : 0) - here + 7) & ~(size_t)7;
        }
        found = Py_BuildValue("(KiIOOnn)", (unsigned long long)lsn, (int)first.kind, first.n, bodies,
                              numbers, (Py_ssize_t)n, (Py_ssize_t)here);
    }
    Py_XDECREF(bodies);
    Py_XDECREF(numbers);
done:
    PyBuffer_Release(&view);
    return found;
}

#endif
