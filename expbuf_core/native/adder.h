/* `Adder`: an `Encoder` and a `Log`, one after the other, for as long as nothing else is due. What of
 * expbuf_core.buffer and session a plain add needs is here; see expbuf_core.plain_adds. */
#ifndef EXPBUF_ADDER_H
#define EXPBUF_ADDER_H

#include <Python.h>
#include <stdint.h>

#include "encoder.h"
#include "log.h"

typedef struct {
    PyObject_HEAD
    Encoder *encoder;
    Log *log;
    PyObject *labels_of, *clock, *inside, *observers;
    int tells; /* of what is written and not durable; where neither is promised it is done */
    Watch watch;
} Adder;

static PyObject *name_listening, *name_time;

/* As `Events` of expbuf_core.plugins: one without the attribute always does. FAILED (-1): asking one
 * raised something. */
static int
is_observed(Adder *self)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(self->observers); i++) {
        PyObject *found = PyObject_GetAttr(PyTuple_GET_ITEM(self->observers, i), name_listening);
        int listens = found == NULL ? -1 : PyObject_IsTrue(found);
        if (found == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
            PyErr_Clear();
            listens = 1;
        }
        Py_XDECREF(found);
        if (listens)
            return listens;
    }
    return 0;
}

/* DONE: `found` is an id, or what there is more to do with. */
static int
adder_try(Adder *self, PyObject *experience, PyObject *priority, PyObject **found)
{
    if (self->labels_of == NULL || !log_is_free(self->log) ||
        word(self->log, W_REPRESENTATION) != self->watch.representation)
        return NOT_PLAIN;
    int observed = is_observed(self);
    if (observed)
        return observed < 0 ? FAILED : NOT_PLAIN;
    /* Asked of the module each time: somebody may have put another clock in its place. */
    PyObject *now = PyObject_CallMethodNoArgs(self->clock, name_time), *accepted = NULL;
    if (now == NULL || !PyFloat_CheckExact(now)) {
        Py_XDECREF(now);
        return now == NULL ? FAILED : NOT_PLAIN;
    }
    Add add = {.representation = (uint32_t)self->watch.representation};
    int due = 0, result = encoder_try(self->encoder, experience, priority, PyFloat_AS_DOUBLE(now),
                                      &accepted);
    Py_DECREF(now);
    /* Code of others may have run meanwhile, and closed the log. */
    if (result == DONE)
        result = log_is_free(self->log) ? log_write_add(self->log, accepted, self->labels_of,
                                                        &self->watch, &add, &due)
                                        : NOT_PLAIN;
    Py_XDECREF(accepted);
    if (result == DONE && add.outcome == NOTHING)
        result = NOT_PLAIN;
    else if (result == DONE) {
        int told = add.outcome == ACKNOWLEDGED || (add.outcome == WRITTEN && !self->tells);
        *found = told && !due ? PyLong_FromUnsignedLongLong(add.id) : add_result(self->log, &add);
        result = *found == NULL ? FAILED : DONE;
    }
    Py_XDECREF(add.exception);
    return result;
}

static PyObject *
adder_add(Adder *self, PyObject *const *args, Py_ssize_t n)
{
    if (n != 2) {
        PyErr_SetString(PyExc_TypeError, "add takes an experience, and a priority or None");
        return NULL;
    }
    if (self->log == NULL || Py_TYPE(args[0]) != self->encoder->experience)
        Py_RETURN_NONE;
    /* As `_call` of expbuf_core.buffer: who is inside may not close it. */
    PyObject *thread = PyLong_FromUnsignedLong(PyThread_get_thread_ident()), *found = NULL;
    if (thread == NULL)
        return NULL;
    int nested = PySet_Contains(self->inside, thread);
    if (nested >= 0 && (nested || PySet_Add(self->inside, thread) == 0)) {
        if (adder_try(self, args[0], args[1], &found) == NOT_PLAIN)
            found = Py_NewRef(Py_None);
        if (!nested) {
            PyObject *type, *value, *trace;
            PyErr_Fetch(&type, &value, &trace);
            if (PySet_Discard(self->inside, thread) < 0)
                PyErr_Clear(); /* of a whole number? */
            PyErr_Restore(type, value, trace);
        }
    }
    Py_DECREF(thread);
    return found;
}

static PyObject *
adder_until(Adder *self, PyObject *const *args, Py_ssize_t n)
{
    if (n != WATCHED) {
        PyErr_SetString(PyExc_TypeError, "until takes a value of each word that is watched");
        return NULL;
    }
    for (int i = 0; i < WATCHED; i++) {
        uint64_t value = PyLong_AsUnsignedLongLong(args[i]);
        if (PyErr_Occurred())
            return NULL;
        __atomic_store_n(self->watch.until + i, value, __ATOMIC_RELAXED);
    }
    Py_RETURN_NONE;
}

static int
adder_init(Adder *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"encoder", "log", "labels_of", "clock", "inside", "observers",
                            "representation", "tells", NULL};
    PyObject *encoder, *log, *labels_of, *clock, *inside, *observers;
    unsigned int representation;
    if (self->log != NULL) {
        PyErr_SetString(PyExc_TypeError, "made twice");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!OOO!O!Ip", names, &EncoderType, &encoder,
                                     &LogType, &log, &labels_of, &clock, &PySet_Type, &inside,
                                     &PyTuple_Type, &observers, &representation, &self->tells))
        return -1;
    if ((name_listening == NULL &&
         (name_listening = PyUnicode_InternFromString("listening")) == NULL) ||
        (name_time == NULL && (name_time = PyUnicode_InternFromString("time")) == NULL))
        return -1;
    self->watch.representation = representation;
    self->encoder = (Encoder *)Py_NewRef(encoder);
    self->log = (Log *)Py_NewRef(log);
    self->labels_of = Py_NewRef(labels_of);
    self->clock = Py_NewRef(clock);
    self->inside = Py_NewRef(inside);
    self->observers = Py_NewRef(observers);
    return 0;
}

static int
adder_traverse(Adder *self, visitproc visit, void *arg)
{
    Py_VISIT(self->log);
    Py_VISIT(self->labels_of);
    Py_VISIT(self->clock);
    Py_VISIT(self->inside);
    Py_VISIT(self->observers);
    return 0;
}

static int
adder_clear(Adder *self)
{
    /* `log` and `encoder` stay: a thread may be in the middle of an add. */
    Py_CLEAR(self->labels_of);
    return 0;
}

static void
adder_dealloc(Adder *self)
{
    PyObject_GC_UnTrack(self);
    adder_clear(self);
    Py_XDECREF(self->encoder);
    Py_XDECREF(self->log);
    Py_XDECREF(self->clock);
    Py_XDECREF(self->inside);
    Py_XDECREF(self->observers);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef adder_methods[] = {
    {"add", (PyCFunction)(void (*)(void))adder_add, METH_FASTCALL,
     "add(experience, priority)\n--\n\nIts id; (LSN, id, None or the number of retirements) where "
     "something is left to do, as behind `Log.add`; None: this is not plain, and nothing was "
     "done."},
    {"until", (PyCFunction)(void (*)(void))adder_until, METH_FASTCALL,
     "until(appended, next_id, rows_added, damaged_index, file, data_end)\n--\n\nNothing is left to do "
     "before one of these words comes to its value."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject AdderType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "expbuf_core.native._native.Adder",
    .tp_doc = "Adds plain experiences.",
    .tp_basicsize = sizeof(Adder),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)adder_init,
    .tp_traverse = (traverseproc)adder_traverse,
    .tp_clear = (inquiry)adder_clear,
    .tp_dealloc = (destructor)adder_dealloc,
    .tp_methods = adder_methods,
};

#endif
