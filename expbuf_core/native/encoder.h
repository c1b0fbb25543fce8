/* `Encoder`: what expbuf_core.intake does with a plain experience, at once. Whatever is not plain,
 * and whatever is wrong, is left to Python, which says what. */
#ifndef EXPBUF_ENCODER_H
#define EXPBUF_ENCODER_H

#include <Python.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <structmember.h>

#include "crc.h"
#include "text.h"

/* Experiences as `Accepted` of expbuf_core.intake: a tuple of these. */
enum {
    A_ROW, A_CRC, A_VECTOR, A_TIMESTAMP, A_REWARD, A_CONFIDENCE, A_PRIORITY, A_TAGS, A_KEY,
    A_FIELDS
};

enum { ROW_HEADER = 16, CONTENT_HEADER = 20, ROW_VERSION = 1 };

#define OLDEST 1e30 /* seconds, as in expbuf_core.values */

/* Squared lengths in between have lost nothing to the range of float32. */
#define SAFE_LOW 1e-24
#define SAFE_HIGH 1e30

typedef struct {
    PyObject_HEAD
    PyTypeObject *experience, *accepted;
    Numpy numpy;
    PyObject *fsum;
    Py_ssize_t v_dim, q_dim, dim, max_row;
    int concat, normalize, cosine, scores;
    double v_factor, q_factor;
    double uncertainty, reward, age, half_life;
} Encoder;

static PyObject *name_v_embed, *name_q_embed, *name_question, *name_answer, *name_confidence,
    *name_rewards, *name_trajectory, *name_metadata, *name_probabilities, *name_tags, *name_image,
    *name_key, *name_timestamp, *name_id;

static int
encoder_names(void)
{
#define NAME(x)                                                                                    \
    if (name_##x == NULL && (name_##x = PyUnicode_InternFromString(#x)) == NULL)                   \
        return -1;
    NAME(v_embed) NAME(q_embed) NAME(question) NAME(answer) NAME(confidence) NAME(rewards)
    NAME(trajectory) NAME(metadata) NAME(probabilities) NAME(tags) NAME(image) NAME(key)
    NAME(timestamp) NAME(id)
#undef NAME
    return 0;
}

static double
sum_of_squares(const float *x, Py_ssize_t n)
{
    double sums[8] = {0};
    Py_ssize_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            sums[j] += (double)x[i + j] * x[i + j];
    for (; i < n; i++)
        sums[0] += (double)x[i] * x[i];
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

/* As numpy does it. */
static float
float_of_half(uint16_t half)
{
    uint32_t exponent = (half >> 10) & 31, fraction = half & 1023, sign = (half & 0x8000u) << 16;
    uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float number = (float)fraction / (1 << 24);
    if (exponent)
        memcpy(&number, &bits, sizeof number);
    return !exponent && sign ? -number : number;
}

/* One embedding of this dimension: an array of float16, float32 or float64, also of a file that is
 * mapped into memory, or a list or tuple of floats; or None where the dimension is 0. */
typedef struct {
    Py_buffer view;
    float *own; /* of a list, which may change before they are in the row */
    char kind;  /* e, f or d, as numpy has it */
    const float *numbers;
    Py_ssize_t dim;
    double square;
} Part;

static void
part_drop(Part *part)
{
    if (part->view.obj)
        PyBuffer_Release(&part->view);
    PyMem_Free(part->own);
}

static int
part_of_list(Part *part, PyObject *list, Py_ssize_t dim)
{
    if (PySequence_Fast_GET_SIZE(list) != dim ||
        (part->own = PyMem_New(float, (size_t)dim)) == NULL)
        return NOT_PLAIN;
    PyObject **items = PySequence_Fast_ITEMS(list);
    for (Py_ssize_t i = 0; i < dim; i++) {
        if (!PyFloat_CheckExact(items[i]))
            return NOT_PLAIN;
        part->own[i] = (float)PyFloat_AS_DOUBLE(items[i]);
    }
    return DONE;
}

static int
part_get(Encoder *self, Part *part, PyObject *value, Py_ssize_t dim)
{
    part->dim = dim;
    if (dim == 0)
        return value == Py_None ? DONE : NOT_PLAIN;
    if (PyList_CheckExact(value) || PyTuple_CheckExact(value))
        return part_of_list(part, value, dim);
    if (Py_TYPE(value) != self->numpy.array && Py_TYPE(value) != self->numpy.memmap)
        return NOT_PLAIN;
    if (PyObject_GetBuffer(value, &part->view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) {
        PyErr_Clear();
        part->view.obj = NULL;
        return NOT_PLAIN;
    }
    if (part->view.ndim != 1 || part->view.shape[0] != dim || part->view.format == NULL)
        return NOT_PLAIN;
    part->kind = part->view.format[0];
    return strchr("efd", part->kind) && part->kind && !part->view.format[1] ? DONE : NOT_PLAIN;
}

/* Into the row; what is computed is computed from there, as others may write to the array. */
static uint8_t *
part_put(Part *part, uint8_t *to)
{
    float *numbers = (float *)to;
    if (part->kind == 'd')
        for (Py_ssize_t i = 0; i < part->dim; i++)
            numbers[i] = (float)((const double *)part->view.buf)[i];
    else if (part->kind == 'e')
        for (Py_ssize_t i = 0; i < part->dim; i++)
            numbers[i] = float_of_half(((const uint16_t *)part->view.buf)[i]);
    else if (part->dim)
        memcpy(to, part->own ? part->own : part->view.buf, 4 * (size_t)part->dim);
    part->numbers = numbers;
    part->square = sum_of_squares(numbers, part->dim);
    return to + 4 * part->dim;
}

/* numbers · factor, scaled to length 1 first if that is wanted; added to what stands there, or not. */
static int
part_scaled(Encoder *self, Part *part, double factor, float *to, int add)
{
    if (self->normalize) {
        if (!(SAFE_LOW < part->square && part->square < SAFE_HIGH))
            return NOT_PLAIN;
        factor /= sqrt(part->square);
    }
    float by = (float)factor;
    if (add)
        for (Py_ssize_t i = 0; i < part->dim; i++)
            to[i] += part->numbers[i] * by;
    else
        for (Py_ssize_t i = 0; i < part->dim; i++)
            to[i] = part->numbers[i] * by;
    return DONE;
}

static int
encoder_fuse(Encoder *self, Part *v, Part *q, float *to)
{
    int result;
    if (v->dim == 0 || q->dim == 0)
        result = part_scaled(self, v->dim ? v : q, 1.0, to, 0);
    else if (self->concat) {
        result = part_scaled(self, v, self->v_factor, to, 0);
        if (result == DONE)
            result = part_scaled(self, q, self->q_factor, to + v->dim, 0);
    } else {
        result = part_scaled(self, v, self->v_factor, to, 0);
        if (result == DONE)
            result = part_scaled(self, q, self->q_factor, to, 1);
    }
    if (result != DONE)
        return result;
    double square = sum_of_squares(to, self->dim);
    if (!self->cosine)
        return isfinite(square) ? DONE : NOT_PLAIN;
    if (!(SAFE_LOW < square && square < SAFE_HIGH))
        return NOT_PLAIN;
    float by = (float)(1.0 / sqrt(square));
    for (Py_ssize_t i = 0; i < self->dim; i++)
        to[i] *= by;
    return DONE;
}

/* A finite float, of what is exactly a float, an int or a scalar of numpy. */
static int
number_of(const Numpy *numpy, PyObject *value, double *number)
{
    if (PyFloat_CheckExact(value))
        *number = PyFloat_AS_DOUBLE(value);
    else if (PyLong_CheckExact(value)) {
        int overflow;
        long long whole = PyLong_AsLongLongAndOverflow(value, &overflow);
        if (overflow)
            return NOT_PLAIN;
        *number = (double)whole;
    } else if (is_scalar(numpy, value)) {
        *number = PyFloat_AsDouble(value);
        if (*number == -1.0 && PyErr_Occurred())
            return FAILED;
    } else
        return NOT_PLAIN;
    return isfinite(*number) ? DONE : NOT_PLAIN;
}

/* The total, and the components as a member of the text. */
static int
encoder_rewards(Encoder *self, PyObject *rewards, Text *text, double *total)
{
    int result;
    if (rewards == Py_None)
        return DONE;
    if (text_name(text, "rewards"))
        return FAILED;
    if (!PyDict_CheckExact(rewards)) {
        if ((result = number_of(&self->numpy, rewards, total)) || (result = text_add(text, "{\"reward\":", 10)) ||
            (result = text_float(text, *total)))
            return result;
        return text_add(text, "}", 1);
    }
    PyObject *name, *value, *numbers = PyList_New(0);
    if (numbers == NULL)
        return FAILED;
    Py_ssize_t at = 0;
    result = text_add(text, "{", 1);
    for (int first = 1; !result && PyDict_Next(rewards, &at, &name, &value); first = 0) {
        double number;
        if (!PyUnicode_CheckExact(name) ||
            (PyUnicode_GET_LENGTH(name) && PyUnicode_READ_CHAR(name, 0) == '$')) {
            result = NOT_PLAIN;
            break;
        }
        if ((result = number_of(&self->numpy, value, &number)) ||
            (!first && (result = text_add(text, ",", 1))) ||
            (result = text_string(text, name)) || (result = text_add(text, ":", 1)) ||
            (result = text_float(text, number)))
            break;
        PyObject *made = PyFloat_FromDouble(number);
        if (made == NULL || PyList_Append(numbers, made) < 0)
            result = FAILED;
        Py_XDECREF(made);
    }
    if (!result && !(result = text_add(text, "}", 1))) {
        PyObject *sum = PyObject_CallOneArg(self->fsum, numbers);
        if (sum != NULL)
            result = number_of(&self->numpy, sum, total);
        else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            result = NOT_PLAIN;
        } else
            result = FAILED;
        Py_XDECREF(sum);
    }
    Py_DECREF(numbers);
    return result;
}

static int
text_member(Text *text, const char *name, PyObject *tree)
{
    if (tree == Py_None)
        return DONE;
    return text_name(text, name) ? FAILED : text_tree(text, tree, 0);
}

static int
text_tags(Text *text, PyObject *tags)
{
    if (!PyTuple_CheckExact(tags))
        return NOT_PLAIN;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(tags);
    for (Py_ssize_t i = 0; i < n; i++)
        if (!PyUnicode_CheckExact(PySequence_Fast_GET_ITEM(tags, i)))
            return NOT_PLAIN;
    if (n == 0)
        return DONE;
    return text_name(text, "tags") ? FAILED : text_list(text, tags, 0);
}

/* All that an experience holds; owned. */
typedef struct {
    PyObject *v, *q, *question, *answer, *confidence, *rewards, *trajectory, *metadata,
        *probabilities, *tags, *image, *key, *timestamp, *id;
} Fields;

static int
fields_get(Fields *fields, PyObject *experience)
{
    PyObject *names[] = {name_v_embed, name_q_embed, name_question, name_answer, name_confidence,
                         name_rewards, name_trajectory, name_metadata, name_probabilities,
                         name_tags, name_image, name_key, name_timestamp, name_id};
    PyObject **values = (PyObject **)fields;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if ((values[i] = PyObject_GetAttr(experience, names[i])) == NULL)
            return FAILED;
    return DONE;
}

/* They are looked at more than once, and what the collector runs in between may change a list. */
static int
fields_own_tags(Fields *fields)
{
    if (PyList_CheckExact(fields->tags)) {
        PyObject *own = PyList_AsTuple(fields->tags);
        if (own == NULL)
            return FAILED;
        Py_SETREF(fields->tags, own);
    }
    return DONE;
}

static void
fields_drop(Fields *fields)
{
    PyObject **values = (PyObject **)fields;
    for (size_t i = 0; i < sizeof *fields / sizeof *values; i++)
        Py_XDECREF(values[i]);
}

static int
fields_text(Encoder *self, Fields *fields, Text *text, double *reward)
{
    int result;
    if (fields->id != Py_None || fields->probabilities != Py_None ||
        !PyUnicode_CheckExact(fields->question) ||
        (fields->metadata != Py_None && !PyDict_CheckExact(fields->metadata)) ||
        (fields->image != Py_None && !PyUnicode_CheckExact(fields->image) &&
         !PyBytes_CheckExact(fields->image)) ||
        (fields->key != Py_None && !PyUnicode_CheckExact(fields->key)))
        return NOT_PLAIN;
    if ((result = text_add(text, "{", 1)))
        return result;
    if (PyUnicode_GET_LENGTH(fields->question) &&
        (result = text_member(text, "question", fields->question)))
        return result;
    if ((result = text_member(text, "answer", fields->answer)) ||
        (result = encoder_rewards(self, fields->rewards, text, reward)) ||
        (result = text_member(text, "trajectory", fields->trajectory)) ||
        (result = text_member(text, "metadata", fields->metadata)) ||
        (result = text_member(text, "image", fields->image)) ||
        (result = text_tags(text, fields->tags)) ||
        (result = text_member(text, "key", fields->key)))
        return result;
    return text_add(text, "}", 1);
}

static double
narrow(double value)
{
    return (double)(float)value;
}

static int
encoder_priority(Encoder *self, PyObject *given, double confidence, double reward, double age,
                 double *priority)
{
    if (given != Py_None) {
        int result = number_of(&self->numpy, given, priority);
        if (result)
            return result;
        *priority = narrow(*priority);
    } else {
        if (!self->scores)
            return NOT_PLAIN;
        *priority = self->uncertainty * (1.0 - narrow(confidence));
        if (!isnan(reward)) {
            if (!(fabs(reward) <= FLT_MAX))
                return NOT_PLAIN;
            *priority += self->reward * fabs(narrow(reward));
        }
        if (self->age != 0 && age > 0)
            *priority += self->age * -expm1(narrow(fmin(age, OLDEST)) * (-M_LN2 / self->half_life));
    }
    return *priority >= 0.0 && *priority <= FLT_MAX ? DONE : NOT_PLAIN;
}

static Py_ssize_t
attached_count(Text *text)
{
    return text->attached == NULL ? 0 : PyList_GET_SIZE(text->attached);
}

static Py_ssize_t
row_size(Part *v, Part *q, Text *text)
{
    Py_ssize_t size = ROW_HEADER + CONTENT_HEADER + 4 * (v->dim + q->dim) + (Py_ssize_t)text->size;
    for (Py_ssize_t i = 0; i < attached_count(text); i++)
        size += 8 + PyBytes_GET_SIZE(PyList_GET_ITEM(text->attached, i));
    return size;
}

static PyObject *
encoder_row(Part *v, Part *q, Text *text)
{
    Py_ssize_t size = row_size(v, q, text), count = attached_count(text);
    PyObject *row = PyBytes_FromStringAndSize(NULL, size);
    if (row == NULL)
        return NULL;
    uint8_t *to = (uint8_t *)PyBytes_AS_STRING(row);
    memset(to, 0, ROW_HEADER); /* stamped once the id is known */
    uint16_t version[2] = {ROW_VERSION, 0};
    uint32_t sizes[4] = {(uint32_t)v->dim, (uint32_t)q->dim, (uint32_t)text->size,
                         (uint32_t)count};
    memcpy(to + ROW_HEADER, version, 4);
    memcpy(to + ROW_HEADER + 4, sizes, 16);
    uint8_t *at = part_put(q, part_put(v, to + ROW_HEADER + CONTENT_HEADER));
    for (Py_ssize_t i = 0; i < count; i++, at += 8) {
        uint64_t bytes = (uint64_t)PyBytes_GET_SIZE(PyList_GET_ITEM(text->attached, i));
        memcpy(at, &bytes, 8);
    }
    memcpy(at, text->bytes, text->size);
    at += text->size;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *bytes = PyList_GET_ITEM(text->attached, i);
        memcpy(at, PyBytes_AS_STRING(bytes), (size_t)PyBytes_GET_SIZE(bytes));
        at += PyBytes_GET_SIZE(bytes);
    }
    return row;
}

static PyObject *
encoder_accepted(Encoder *self, PyObject *row, PyObject *vector, double timestamp, double reward,
                 double confidence, double priority, Fields *fields)
{
    const uint8_t *content = (const uint8_t *)PyBytes_AS_STRING(row) + ROW_HEADER;
    uint32_t crc = crc32_of(0, content, (size_t)PyBytes_GET_SIZE(row) - ROW_HEADER);
    PyObject *made = self->accepted->tp_alloc(self->accepted, A_FIELDS);
    if (made == NULL)
        return NULL;
    PyObject *items[A_FIELDS] = {
        Py_NewRef(row),
        PyLong_FromUnsignedLong(crc),
        Py_NewRef(vector),
        PyFloat_FromDouble(timestamp),
        PyFloat_FromDouble(reward),
        PyFloat_FromDouble(confidence),
        PyFloat_FromDouble(priority),
        PySequence_List(fields->tags),
        Py_NewRef(fields->key),
    };
    int complete = 1;
    for (int i = 0; i < A_FIELDS; i++) {
        complete = complete && items[i] != NULL;
        PyTuple_SET_ITEM(made, i, items[i]);
    }
    if (!complete)
        Py_CLEAR(made);
    return made;
}

static int
encoder_try(Encoder *self, PyObject *experience, PyObject *given, double now, PyObject **accepted)
{
    Fields fields = {0};
    Part v = {0}, q = {0};
    Text text;
    PyObject *row = NULL, *vector = NULL;
    double confidence, reward = NAN, priority, timestamp = now;
    int result;
    text_begin(&text, &self->numpy);
    if ((result = fields_get(&fields, experience)) || (result = fields_own_tags(&fields)) ||
        (result = part_get(self, &v, fields.v, self->v_dim)) ||
        (result = part_get(self, &q, fields.q, self->q_dim)) ||
        (result = number_of(&self->numpy, fields.confidence, &confidence)) ||
        (fields.timestamp != Py_None &&
         (result = number_of(&self->numpy, fields.timestamp, &timestamp))) ||
        (result = fields_text(self, &fields, &text, &reward)))
        goto end;
    if (!(0.0 <= confidence && confidence <= 1.0)) {
        result = NOT_PLAIN;
        goto end;
    }
    if ((result = encoder_priority(self, given, confidence, reward, now - timestamp, &priority)))
        goto end;
    if (row_size(&v, &q, &text) > self->max_row) {
        result = NOT_PLAIN;
        goto end;
    }
    result = FAILED;
    row = encoder_row(&v, &q, &text);
    vector = PyBytes_FromStringAndSize(NULL, 4 * self->dim);
    if (row == NULL || vector == NULL)
        goto end;
    result = NOT_PLAIN;
    if (!isfinite(v.square) || !isfinite(q.square) ||
        (result = encoder_fuse(self, &v, &q, (float *)PyBytes_AS_STRING(vector))))
        goto end;
    result = FAILED;
    if ((*accepted = encoder_accepted(self, row, vector, timestamp, reward, confidence, priority,
                                      &fields)) != NULL)
        result = DONE;
end:
    text_end(&text);
    part_drop(&v);
    part_drop(&q);
    Py_XDECREF(row);
    Py_XDECREF(vector);
    fields_drop(&fields);
    return result;
}

static PyObject *
encoder_accept(Encoder *self, PyObject *const *args, Py_ssize_t n)
{
    if (n != 3) {
        PyErr_SetString(PyExc_TypeError,
                        "accept takes an experience, a priority or None, and the time");
        return NULL;
    }
    double now = PyFloat_AsDouble(args[2]); /* a clock of a test may give whole numbers */
    if (now == -1.0 && PyErr_Occurred())
        return NULL;
    PyObject *accepted = NULL;
    int result = NOT_PLAIN;
    if (Py_TYPE(args[0]) == self->experience)
        result = encoder_try(self, args[0], args[1], now, &accepted);
    if (result == FAILED)
        return NULL;
    if (result == NOT_PLAIN)
        Py_RETURN_NONE;
    return accepted;
}

static int
encoder_init(Encoder *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"experience", "accepted", "array", "memmap", "scalars", "fsum", "v_dim",
                            "q_dim", "dim", "max_row", "concat", "normalize", "cosine", "v_factor",
                            "q_factor", "scores", "uncertainty", "reward", "age", "half_life",
                            NULL};
    PyObject *experience, *accepted, *array, *memmap, *scalars, *fsum;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O!O!O!O!O!Onnnnpppddpdddd", names, &PyType_Type, &experience,
            &PyType_Type, &accepted, &PyType_Type, &array, &PyType_Type, &memmap, &PyTuple_Type,
            &scalars, &fsum, &self->v_dim, &self->q_dim, &self->dim, &self->max_row, &self->concat,
            &self->normalize, &self->cosine, &self->v_factor, &self->q_factor, &self->scores,
            &self->uncertainty, &self->reward, &self->age, &self->half_life))
        return -1;
    Py_ssize_t one = self->v_dim ? self->v_dim : self->q_dim;
    Py_ssize_t both = self->concat ? self->v_dim + self->q_dim : one;
    if (self->v_dim < 0 || self->q_dim < 0 || self->dim < 1 ||
        self->dim != (self->v_dim && self->q_dim ? both : one) ||
        (!self->concat && self->v_dim && self->q_dim && self->v_dim != self->q_dim) ||
        !PyType_IsSubtype((PyTypeObject *)accepted, &PyTuple_Type)) {
        PyErr_SetString(PyExc_ValueError, "dimensions, or a type, that do not fit");
        return -1;
    }
    Py_XSETREF(self->experience, (PyTypeObject *)Py_NewRef(experience));
    Py_XSETREF(self->accepted, (PyTypeObject *)Py_NewRef(accepted));
    Py_XSETREF(self->numpy.array, (PyTypeObject *)Py_NewRef(array));
    Py_XSETREF(self->numpy.memmap, (PyTypeObject *)Py_NewRef(memmap));
    Py_XSETREF(self->numpy.scalars, Py_NewRef(scalars));
    Py_XSETREF(self->fsum, Py_NewRef(fsum));
    return 0;
}

static void
encoder_dealloc(Encoder *self)
{
    Py_XDECREF(self->experience);
    Py_XDECREF(self->accepted);
    Py_XDECREF(self->numpy.array);
    Py_XDECREF(self->numpy.memmap);
    Py_XDECREF(self->numpy.scalars);
    Py_XDECREF(self->fsum);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef encoder_methods[] = {
    {"accept", (PyCFunction)(void (*)(void))encoder_accept, METH_FASTCALL,
     "accept(experience, priority, now)\n--\n\nIt, checked and encoded; None if it is not plain."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject EncoderType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "expbuf_core.native._native.Encoder",
    .tp_doc = "Checks, scores, fuses and encodes plain experiences.",
    .tp_basicsize = sizeof(Encoder),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)encoder_init,
    .tp_dealloc = (destructor)encoder_dealloc,
    .tp_methods = encoder_methods,
};

#endif
