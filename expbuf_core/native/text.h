/* Trees as JSON, byte for byte what expbuf_core.codec makes of them. Whatever is not plainly a tree
 * of None, bool, int, float, str, bytes, list, tuple, dict with ordinary keys, and numpy's arrays and
 * scalars of numbers, is left to Python. */
#ifndef EXPBUF_TEXT_H
#define EXPBUF_TEXT_H

#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "sleep.h"

enum { DEEPEST = 50, SHORT = 4096 };

/* Types of numpy, which this is not linked with. */
typedef struct {
    PyTypeObject *array, *memmap;
    PyObject *scalars; /* a tuple of types: what can be made a float, and has `item` */
} Numpy;

static PyObject *name_item, *name_tobytes, *name_dtype, *name_str, *name_shape;

static int
text_names(void)
{
#define NAME(x)                                                                                    \
    if (name_##x == NULL && (name_##x = PyUnicode_InternFromString(#x)) == NULL)                   \
        return -1;
    NAME(item) NAME(tobytes) NAME(dtype) NAME(str) NAME(shape)
#undef NAME
    return 0;
}

/* Exactly of one of these types: what a subclass does, who knows. */
static int
is_scalar(const Numpy *numpy, PyObject *value)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(numpy->scalars); i++)
        if (PyTuple_GET_ITEM(numpy->scalars, i) == (PyObject *)Py_TYPE(value))
            return 1;
    return 0;
}

typedef struct {
    const Numpy *numpy;
    PyObject *attached; /* a list of bytes, which lie behind the text; NULL: none yet */
    uint8_t *bytes;
    size_t size, room;
    uint8_t own[2048];
} Text;

static void
text_begin(Text *text, const Numpy *numpy)
{
    text->numpy = numpy;
    text->attached = NULL;
    text->bytes = text->own;
    text->size = 0;
    text->room = sizeof text->own;
}

static void
text_end(Text *text)
{
    Py_XDECREF(text->attached);
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

/* Most bytes that this takes: of what is long, exactly, for six times as much may be much. */
static size_t
quoted_size(const uint8_t *from, size_t size)
{
    if (size <= SHORT)
        return 6 * size + 2;
    size_t special = 0;
    for (size_t i = 0; i < size; i++)
        special += from[i] < 0x20 || from[i] == '"' || from[i] == '\\';
    return size + 5 * special + 2;
}

static int
text_quote(Text *text, const uint8_t *from, size_t size)
{
    static const uint8_t digits[] = "0123456789abcdef";
    if (text_reserve(text, quoted_size(from, size)))
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

/* Of what is in a container that somebody may change: numpy is asked meanwhile, and objects are
 * made, so that the garbage collector may run, and with it whatever. */
static int
text_inner(Text *text, PyObject *tree, int depth)
{
    Py_INCREF(tree);
    int result = text_tree(text, tree, depth);
    Py_DECREF(tree);
    return result;
}

/* A list or tuple. */
static int
text_list(Text *text, PyObject *list, int depth)
{
    int result = text_add(text, "[", 1);
    for (Py_ssize_t i = 0; !result && i < PySequence_Fast_GET_SIZE(list); i++) {
        if (i && (result = text_add(text, ",", 1)))
            break;
        result = text_inner(text, PySequence_Fast_GET_ITEM(list, i), depth + 1);
    }
    return result ? result : text_add(text, "]", 1);
}

static int
text_tuple(Text *text, PyObject *tuple, int depth)
{
    int result = text_add(text, "{\"$tuple\":", 10);
    if (!result)
        result = text_list(text, tuple, depth);
    return result ? result : text_add(text, "}", 1);
}

static int
text_integer(Text *text, long long value)
{
    char digits[24];
    return text_add(text, digits, (size_t)snprintf(digits, sizeof digits, "%lld", value));
}

/* `{"name":i`: the next of what lies behind the text. */
static int
text_attach(Text *text, const char *name, PyObject *bytes)
{
    if (text->attached == NULL && (text->attached = PyList_New(0)) == NULL)
        return FAILED;
    return PyList_Append(text->attached, bytes) < 0 || text_add(text, "{\"", 2) ||
                   text_add(text, name, strlen(name)) || text_add(text, "\":", 2) ||
                   text_integer(text, PyList_GET_SIZE(text->attached) - 1)
               ? FAILED
               : DONE;
}

static int
text_bytes(Text *text, PyObject *bytes)
{
    return text_attach(text, "$bytes", bytes) || text_add(text, "}", 1) ? FAILED : DONE;
}

static int
text_shape(Text *text, PyObject *shape)
{
    int result = text_add(text, "[", 1);
    for (Py_ssize_t i = 0; !result && i < PyTuple_GET_SIZE(shape); i++)
        if (!i || !(result = text_add(text, ",", 1)))
            result = text_integer(text, PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i)));
    return result ? result : text_add(text, "]", 1);
}

/* What `dtype.str` says of arrays of numbers, such as "<f4"; the others may need a closer look. */
static int
is_of_numbers(PyObject *code)
{
    return PyUnicode_CheckExact(code) && PyUnicode_GET_LENGTH(code) >= 3 &&
           PyUnicode_READ_CHAR(code, 1) < 128 &&
           strchr("fiub", (int)PyUnicode_READ_CHAR(code, 1)) != NULL;
}

static int
text_array(Text *text, PyObject *array)
{
    int result = FAILED;
    PyObject *dtype = PyObject_GetAttr(array, name_dtype), *bytes = NULL, *shape = NULL;
    PyObject *code = dtype == NULL ? NULL : PyObject_GetAttr(dtype, name_str);
    if (code == NULL)
        goto end;
    if (!is_of_numbers(code)) {
        result = NOT_PLAIN;
        goto end;
    }
    if ((bytes = PyObject_CallMethodNoArgs(array, name_tobytes)) == NULL ||
        (shape = PyObject_GetAttr(array, name_shape)) == NULL)
        goto end;
    if (!PyBytes_CheckExact(bytes) || !PyTuple_CheckExact(shape)) {
        result = NOT_PLAIN;
        goto end;
    }
    if (text_attach(text, "$nd", bytes) || text_add(text, ",\"dtype\":", 9) ||
        text_string(text, code) || text_add(text, ",\"shape\":", 9) || text_shape(text, shape) ||
        text_add(text, "}", 1))
        goto end;
    result = DONE;
end:
    Py_XDECREF(dtype);
    Py_XDECREF(code);
    Py_XDECREF(bytes);
    Py_XDECREF(shape);
    return result;
}

static int
text_scalar(Text *text, PyObject *scalar, int depth)
{
    PyObject *item = PyObject_CallMethodNoArgs(scalar, name_item);
    if (item == NULL)
        return FAILED;
    int result = text_tree(text, item, depth + 1);
    Py_DECREF(item);
    return result;
}

static int
text_dict(Text *text, PyObject *dict, int depth)
{
    PyObject *key, *value;
    Py_ssize_t at = 0, size = PyDict_GET_SIZE(dict);
    int result = text_add(text, "{", 1);
    for (int first = 1; !result && PyDict_Next(dict, &at, &key, &value); first = 0) {
        if (!PyUnicode_CheckExact(key) ||
            (PyUnicode_GET_LENGTH(key) && PyUnicode_READ_CHAR(key, 0) == '$'))
            return NOT_PLAIN;
        Py_INCREF(value);
        if ((first || !(result = text_add(text, ",", 1))) && !(result = text_string(text, key)) &&
            !(result = text_add(text, ":", 1)))
            result = text_tree(text, value, depth + 1);
        Py_DECREF(value);
        if (!result && PyDict_GET_SIZE(dict) != size)
            return NOT_PLAIN; /* somebody changes it: Python says so */
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
        int overflow;
        long long value = PyLong_AsLongLongAndOverflow(tree, &overflow);
        return overflow ? NOT_PLAIN : text_integer(text, value);
    }
    if (PyList_CheckExact(tree))
        return text_list(text, tree, depth);
    if (PyDict_CheckExact(tree))
        return text_dict(text, tree, depth);
    if (PyTuple_CheckExact(tree))
        return text_tuple(text, tree, depth);
    if (PyBytes_CheckExact(tree))
        return text_bytes(text, tree);
    if (Py_TYPE(tree) == text->numpy->array)
        return text_array(text, tree);
    return is_scalar(text->numpy, tree) ? text_scalar(text, tree, depth) : NOT_PLAIN;
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
