/* `run`: frames that are alike, as `LogFile.alike` of expbuf_file finds them. Nothing is passed over
 * and nothing is found fault with: it ends before the first frame that is not plainly the next
 * operation, intact, of the same kind, and of the same size unless it is an add: those become one. */
#ifndef EXPBUF_SCAN_H
#define EXPBUF_SCAN_H

#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "crc.h"
#include "log.h"

enum { LOG_BEGIN = 0xF0, PLACE_BITS = 40, ID_BITS = 62 };

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
    return header->kind < LOG_BEGIN;
}

static size_t
rows_place(size_t at, const Header *header)
{
    return at + FRAME_HEADER + header->body_len + (size_t)TABLE_ENTRY * header->n;
}

/* Where the frame behind this one begins. */
static size_t
end_of(const Window *window, size_t at, const Header *header)
{
    size_t behind = rows_place(at, header) + (window->data_log ? header->rows_len : 0);
    return at + ((behind - at + 7) & ~(size_t)7);
}

/* Whether the rows are those of the table, up to `behind`. */
static int
rows_intact(const Window *window, size_t table_at, size_t row_at, size_t behind,
            const Header *header)
{
    const uint8_t *bytes = window->bytes;
    for (uint32_t i = 0; i < header->n; i++) {
        uint64_t id;
        uint32_t length, seal, crc, own_seal;
        memcpy(&length, bytes + table_at + TABLE_ENTRY * (size_t)i, 4);
        memcpy(&seal, bytes + table_at + TABLE_ENTRY * (size_t)i + 4, 4);
        if (length < ROW_HEADER || row_at + length > behind)
            return 0;
        memcpy(&id, bytes + row_at, 8);
        memcpy(&crc, bytes + row_at + 8, 4);
        memcpy(&own_seal, bytes + row_at + 12, 4);
        if (id != header->first_id + i || own_seal != seal ||
            crc32_of(0, bytes + row_at + ROW_HEADER, length - ROW_HEADER) != crc ||
            crc32_of(crc, &id, 8) != seal)
            return 0;
        row_at += length;
    }
    return row_at == behind;
}

/* Where the frame ends if it is intact, else 0. */
static size_t
intact_until(const Window *window, size_t at, const Header *header)
{
    if ((header->rows_len | header->place) >> PLACE_BITS || header->first_id >> ID_BITS)
        return 0; /* no file is so large, and no column takes it */
    size_t table_at = at + FRAME_HEADER + header->body_len, rows_at = rows_place(at, header);
    size_t following = end_of(window, at, header);
    const uint8_t *bytes = window->bytes;
    if ((window->rows ? following : rows_at) > window->end ||
        window->stands_at + following > window->limit ||
        (window->data_log && header->place != window->stands_at + at) ||
        crc32_of(0, bytes + at + FRAME_HEADER, header->body_len) != header->body_crc)
        return 0;
    if (header->n && crc32_of(0, bytes + table_at, rows_at - table_at) != header->table_crc)
        return 0;
    uint64_t sum = 0;
    for (size_t entry = table_at; entry < rows_at; entry += TABLE_ENTRY) {
        uint32_t length;
        memcpy(&length, bytes + entry, 4);
        sum += length;
    }
    if (sum != header->rows_len)
        return 0;
    if (window->rows) {
        size_t behind = rows_at + header->rows_len;
        if (!rows_intact(window, table_at, rows_at, behind, header))
            return 0;
        for (size_t i = behind; i < following; i++)
            if (bytes[i])
                return 0;
    }
    return following;
}

/* ---------------------------------------------------------------- adds */

/* What adds must have in common to become one. */
typedef struct {
    uint32_t dim, representation;
} Likeness;

/* Whether the frame, which is intact, is an add of columns and no more. */
static int
plain_add(const Window *window, size_t at, const Header *header, Likeness *likeness)
{
    uint32_t head[4]; /* n, dim, representation, sections */
    if (header->kind != KIND_ADD || header->body_len < sizeof head)
        return 0;
    memcpy(head, window->bytes + at + FRAME_HEADER, sizeof head);
    *likeness = (Likeness){head[1], head[2]};
    return head[0] == header->n && head[0] > 0 && head[1] > 0 && head[1] < 1 << 24 && head[3] == 0 &&
           header->body_len == sizeof head + head[0] * (COLUMNS + 4 * (uint64_t)head[1]);
}

/* The adds that stand from `start` to `end`, as the one that would add what they add: its body; ids,
 * places and sizes of its rows; how many rows each has. */
static PyObject *
joined(const Window *window, size_t start, size_t end, size_t adds, size_t rows, uint64_t lsn,
       Likeness likeness)
{
    size_t size = ADD_HEADER + rows * (COLUMNS + 4 * (size_t)likeness.dim);
    PyObject *body = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)size);
    PyObject *numbers = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(20 * rows));
    PyObject *counts = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(4 * adds));
    PyObject *found = NULL;
    if (body != NULL && numbers != NULL && counts != NULL) {
        uint8_t *to = (uint8_t *)PyByteArray_AS_STRING(body);
        uint8_t *ids = (uint8_t *)PyByteArray_AS_STRING(numbers), *places = ids + 8 * rows;
        uint8_t *sizes = places + 8 * rows, *count = (uint8_t *)PyByteArray_AS_STRING(counts);
        uint32_t head[4] = {(uint32_t)rows, likeness.dim, likeness.representation, 0};
        static const size_t widths[4] = {8, 8, 4, 4};
        uint8_t *columns[5] = {put(to, head, sizeof head)};
        for (int i = 0; i < 4; i++)
            columns[i + 1] = columns[i] + widths[i] * rows;
        for (size_t at = start; at < end;) {
            Header header;
            header_at(window, at, &header);
            const uint8_t *from = window->bytes + at + FRAME_HEADER + ADD_HEADER;
            uint32_t n = header.n;
            for (int i = 0; i < 5; i++) {
                size_t bytes = n * (i < 4 ? widths[i] : 4 * (size_t)likeness.dim);
                columns[i] = put(columns[i], from, bytes);
                from += bytes;
            }
            count = put(count, &n, 4);
            uint64_t place = header.place + rows_place(0, &header);
            for (uint32_t i = 0; i < n; i++, from += TABLE_ENTRY) {
                uint64_t id = header.first_id + i;
                uint32_t length;
                memcpy(&length, from, 4);
                ids = put(ids, &id, 8);
                places = put(places, &place, 8);
                sizes = put(sizes, &length, 4);
                place += length;
            }
            at = end_of(window, at, &header);
        }
        found = Py_BuildValue("(KiiOOnnO)", (unsigned long long)lsn, (int)KIND_ADD, 1, body, numbers,
                              (Py_ssize_t)rows, (Py_ssize_t)end, counts);
    }
    Py_XDECREF(body);
    Py_XDECREF(numbers);
    Py_XDECREF(counts);
    return found;
}

/* ---------------------------------------------------------------- run */

/* Operations of any kind with a body of one size each and at most one row. */
static PyObject *
side_by_side(const Window *window, size_t start, size_t n, uint64_t lsn, const Header *first)
{
    size_t body = first->body_len, here = start;
    PyObject *bodies = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(n * body));
    PyObject *numbers = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(20 * n));
    PyObject *found = NULL;
    if (bodies != NULL && numbers != NULL) {
        uint8_t *to = (uint8_t *)PyByteArray_AS_STRING(bodies);
        uint8_t *ids = (uint8_t *)PyByteArray_AS_STRING(numbers), *places = ids + 8 * n,
                *sizes = places + 8 * n;
        for (size_t i = 0; i < n; i++) {
            Header header;
            header_at(window, here, &header);
            to = put(to, window->bytes + here + FRAME_HEADER, body);
            uint64_t place = header.place + rows_place(0, &header);
            uint32_t size = (uint32_t)header.rows_len;
            ids = put(ids, &header.first_id, 8);
            places = put(places, &place, 8);
            sizes = put(sizes, &size, 4);
            here = end_of(window, here, &header);
        }
        found = Py_BuildValue("(KiIOOnnO)", (unsigned long long)lsn, (int)first->kind, first->n,
                              bodies, numbers, (Py_ssize_t)n, (Py_ssize_t)here, Py_None);
    }
    Py_XDECREF(bodies);
    Py_XDECREF(numbers);
    return found;
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
    Likeness likeness = {0}, another = {0};
    uint64_t lsn = 0;
    int any = first_lsn == Py_None, adds = 0;
    if (at < 0 || end < 0 || end > view.len || stands_at < 0 || limit < 0 || at > end) {
        PyErr_SetString(PyExc_ValueError, "outside of what was read");
        goto done;
    }
    if (!any) {
        lsn = PyLong_AsUnsignedLongLong(first_lsn);
        if (PyErr_Occurred())
            goto done;
    }
    /* Twice over them: first they are counted and checked. */
    size_t start = (size_t)at, here = start, n = 0, rows = 0, following;
    while (header_at(&window, here, &header) && (following = intact_until(&window, here, &header))) {
        int plain = plain_add(&window, here, &header, &another);
        if (n == 0) {
            first = header;
            likeness = another;
            adds = plain;
            if (any)
                lsn = header.lsn;
        }
        if (header.lsn != lsn + n || header.lsn < lsn || header.lsn > until ||
            header.kind != first.kind || plain != adds || rows + header.n > UINT32_MAX)
            break;
        if (adds ? another.dim != likeness.dim || another.representation != likeness.representation
                 : header.body_len != first.body_len || header.n != first.n || header.n > 1)
            break;
        here = following;
        rows += header.n;
        n++;
    }
    if (n == 0 || (!adds && n < (size_t)least))
        found = Py_NewRef(Py_None);
    else if (adds)
        found = joined(&window, start, here, n, rows, lsn, likeness);
    else
        found = side_by_side(&window, start, n, lsn, &first);
done:
    PyBuffer_Release(&view);
    return found;
}

#endif
