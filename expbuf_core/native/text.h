/* Trees as JSON, byte for byte what expbuf_core.codec makes of them. Whatever is not plainly a tree
 * of None, bool, int, float, str, list and dict with ordinary keys is left to Python. */
#ifndef EXPBUF_TEXT_H
#define EXPBUF_TEXT_H

#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "sleep.h"


enum { DEEPEST = 50 };

typedef struct {
    uint8_t *bytes;
    size_t size, room;
    uint8_t own[2048];
} Text;

static void
text_begin(Text *text)
{
    text->bytes = text->own;
    text->size = 0;
    text->room = sizeof text->own;
}

static void
text_end(Text *text)
{
    if (text->bytes != text->own)
        PyMem_Free(text->bytes);
}

static int
text_reserve(Text *text, size_t more)
{
    if (text->room - text->size >= more)
        return DONE;
    size_t room = 2 * (text->size + more);
    uint8_t *bytes = text->bytes == text->own ? PyMem_Malloc(room)
                                              : PyMem_Realloc(text->bytes, room);
    if (bytes == NULL) {
        PyErr_NoMemory();
        return FAILED;
    }
    if (text->bytes == text->own)
        memcpy(bytes, text->own, text->size);
    text->bytes = bytes;
    text->room = room;
    return DONE;
}

static int
text_add(Text *text, const void *bytes, size_t size)
{
    if (text_reserve(text, size))
        return FAILED;
    memcpy(text->bytes + text->size, bytes, size);
    text->size += size;
    return DONE;
}

static int
text_quote(Text *text, const uint8_t *from, size_t size)
{
    static const uint8_t digits[] = "0123456789abcdef";
    if (text_reserve(text, 6 * size + 2))
        return FAILED;
    uint8_t *to = text->bytes + text->size;
    *to++ = '"';
    for (size_t i = 0; i < size; i++) {
        uint8_t c = from[i];
        if (c >= 0x20 && c != '"' && c != '\\') {
            *to++ = c;
            continue;
        }
        *to++ = '\\';
        switch (c) {
        case '\n': *to++ = 'n'; break;
        case '\r': *to++ = 'r'; break;
        case '\t': *to++ = 't'; break;
        case '\b': *to++ = 'b'; break;
        case '\f': *to++ = 'f'; break;
        case '"':
        case '\\': *to++ = c; break;
        default:
            memcpy(to, "u00", 3);
            to[3] = digits[c >> 4];
            to[4] = digits[c & 15];
            to += 5;
        }
    }
    *to++ = '"';
    text->size = (size_t)(to - text->bytes);
    return DONE;
}

static int
text_string(Text *text, PyObject *value)
{
    if (PyUnicode_IS_COMPACT_ASCII(value))
        return text_quote(text, PyUnicode_1BYTE_DATA(value),
                          (size_t)PyUnicode_GET_LENGTH(value));
    /* Not PyUnicode_AsUTF8: it leaves a copy with the caller's string for good. */
    PyObject *bytes = PyUnicode_AsUTF8String(value);
    if (bytes == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError))
            return FAILED;
        PyErr_Clear(); /* lone surrogates */
        return NOT_PLAIN;
    }
    int result = text_quote(text, (const uint8_t *)PyBytes_AS_STRING(bytes),
                            (size_t)PyBytes_GET_SIZE(bytes));
    Py_DECREF(bytes);
    return result;
}

static int
text_float(Text *text, double value)
{
    if (!isfinite(value))
        return NOT_PLAIN;
    char *digits = PyOS_double_to_string(value, 'r', 0, Py_DTSF_ADD_DOT_0, NULL);
    if (digits == NULL)
        return FAILED;
    int result = text_add(text, digits, strlen(digits));
    PyMem_Free(digits);
    return result;
}

static int text_tree(Text *text, PyObject *tree, int depth);

static int
text_list(Text *text, PyObject *list, int depth)
{
    int result = text_add(text, "[", 1);
    for (Py_ssize_t i = 0; !result && i < PySequence_Fast_GET_SIZE(list); i++) {
        if (i && (result = text_add(text, ",", 1)))
            break;
        result = text_tree(text, PySequence_Fast_GET_ITEM(list, i), depth + 1);
    }
    return result ? result : text_add(text, "]", 1);
}

static int
text_dict(Text *text, PyObject *dict, int depth)
{
    PyObject *key, *value;
    Py_ssize_t at = 0;
    int result = text_add(text, "{", 1);
    for (int first = 1; !result && PyDict_Next(dict, &at, &key, &value); first = 0) {
        if (!PyUnicode_CheckExact(key) ||
            (PyUnicode_GET_LENGTH(key) && PyUnicode_READ_CHAR(key, 0) == '$'))
            return NOT_PLAIN;
        if (!first && (result = text_add(text, ",", 1)))
            break;
        if ((result = text_string(text, key)) || (result = text_add(text, ":", 1)))
            break;
        result = text_tree(text, value, depth + 1);
    }
    return result ? result : text_add(text, "}", 1);
}

static int
text_tree(Text *text, PyObject *tree, int depth)
{
    if (depth > DEEPEST)
        return NOT_PLAIN;
    if (tree == Py_None)
        return text_add(text, "null", 4);
    if (tree == Py_True)
        return text_add(text, "true", 4);
    if (tree == Py_False)
        return text_add(text, "false", 5);
    if (PyUnicode_CheckExact(tree))
        return text_string(text, tree);
    if (PyFloat_CheckExact(tree))
        return text_float(text, PyFloat_AS_DOUBLE(tree));
    if (PyLong_CheckExact(tree)) {
        char digits[24];
        int overflow;
        long long value = PyLong_AsLongLongAndOverflow(tree, &overflow);
        if (overflow)
            return NOT_PLAIN;
        return text_add(text, digits, (size_t)snprintf(digits, sizeof digits, "%lld", value));
    }
    if (PyList_CheckExact(tree))
        return text_list(text, tree, depth);
    if (PyDict_CheckExact(tree))
        return text_dict(text, tree, depth);
    return NOT_PLAIN;
}

/* A member of the object that `text` is: `"name":`, behind whatever stands there. */
static int
text_name(Text *text, const char *name)
{
    if (text->size > 1 && text_add(text, ",", 1))
        return FAILED;
    return text_add(text, "\"", 1) || text_add(text, name, strlen(name)) ||
                   text_add(text, "\":", 2)
               ? FAILED
               : DONE;
}

#endif
