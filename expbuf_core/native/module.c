/* expbuf_core.native._native: the path of a plain add, compiled. See expbuf_core/native/__init__.py
 * for what it is and what it leaves to Python. */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#if !defined(__linux__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || __SIZEOF_POINTER__ != 8
#error "written for Linux on little-endian machines of 64 bits; elsewhere Python does it all"
#endif

#if PY_VERSION_HEX < 0x030A0000
#error "Python 3.10 or newer"
#endif

/* What Python and this rely on of each other has this number, in expbuf_core/native/__init__.py,
 * too. Whoever changes some of it raises both: what was built before is not used any more. */
#define FITS 3

/* CRC-32 of the sources, where hatch_build.py compiles them. */
#ifndef SOURCES
#define SOURCES 0
#endif

#include "adder.h"
#include "crc.h"
#include "encoder.h"
#include "log.h"
#include "scan.h"
#include "sleep.h"

static PyObject *
native_crc32(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer data;
    unsigned int start = 0;
    if (!PyArg_ParseTuple(args, "y*|I:crc32", &data, &start))
        return NULL;
    uint32_t crc = crc32_of(start, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(crc);
}

static PyMethodDef functions[] = {
    {"crc32", native_crc32, METH_VARARGS, "crc32(data, start=0)\n--\n\nAs zlib's."},
    {"run", native_run, METH_VARARGS,
     "run(window, at, end, stands_at, limit, epoch, salt_crc, data_log, rows, lsn, until_lsn, "
     "least)\n--\n\nFrames that are alike; None: fewer than `least` are."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "The path of a plain add, compiled.",
    .m_size = -1,
    .m_methods = functions,
};

/* Numbers that are written down in Python, too, for a test that compares them. */
static int
add_constants(PyObject *module)
{
#define CONSTANT(x)                                                                                \
    if (PyModule_AddIntConstant(module, #x, x) < 0)                                                \
        return -1;
    CONSTANT(FITS)
    CONSTANT(W_GENERATION) CONSTANT(W_APPENDED) CONSTANT(W_NEXT_ID) CONSTANT(W_PUBLISHED)
    CONSTANT(W_DURABLE) CONSTANT(W_APPENDING) CONSTANT(W_FLUSHING) CONSTANT(W_FLUSH_FAILED)
    CONSTANT(W_RETIREMENTS) CONSTANT(W_RESERVED_ID) CONSTANT(W_RESERVED_LSN)
    CONSTANT(W_ROWS_ADDED) CONSTANT(W_WAITING_TO_APPEND) CONSTANT(W_WAITING_FOR_FLUSH)
    CONSTANT(W_REPRESENTATION) CONSTANT(W_DAMAGED_INDEX) CONSTANT(W_NEXT_LSN)
    CONSTANT(W_ADAPTER) CONSTANT(W_FILE) CONSTANT(W_DATA_END) CONSTANT(W_INDEX_END)
    CONSTANT(W_SYNCED) CONSTANT(W_WRITTEN) CONSTANT(W_COUNT)
    CONSTANT(PAGE_BYTES) CONSTANT(MAGIC) CONSTANT(KIND_ADD)
    CONSTANT(FRAME_HEADER) CONSTANT(END_BYTES) CONSTANT(LARGE) CONSTANT(ROW_HEADER)
    CONSTANT(ROW_VERSION) CONSTANT(LOG_BEGIN) CONSTANT(A_FIELDS)
#undef CONSTANT
    PyObject *sources = PyLong_FromUnsignedLong(SOURCES);
    int result = sources == NULL ? -1 : PyModule_AddObjectRef(module, "SOURCES", sources);
    Py_XDECREF(sources);
    return result;
}

/* An extension module is found by its name, which anybody may have changed. */
static int
is_right_python(void)
{
    char wanted[16];
    snprintf(wanted, sizeof wanted, "%d.%d.", PY_MAJOR_VERSION, PY_MINOR_VERSION);
    if (strncmp(Py_GetVersion(), wanted, strlen(wanted)) == 0)
        return 1;
    PyErr_Format(PyExc_ImportError, "_native was compiled for Python %d.%d, this is %.16s",
                 PY_MAJOR_VERSION, PY_MINOR_VERSION, Py_GetVersion());
    return 0;
}

PyMODINIT_FUNC
PyInit__native(void)
{
    if (!is_right_python())
        return NULL;
    crc_prepare();
    crc_is_folded = crc_folds();
    if (text_names() < 0 || encoder_names() < 0 || PyType_Ready(&EncoderType) < 0 ||
        PyType_Ready(&LogType) < 0 || PyType_Ready(&MutexType) < 0 ||
        PyType_Ready(&AdderType) < 0)
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    if (add_constants(module) < 0 ||
        PyModule_AddObjectRef(module, "Adder", (PyObject *)&AdderType) < 0 ||
        PyModule_AddObjectRef(module, "Encoder", (PyObject *)&EncoderType) < 0 ||
        PyModule_AddObjectRef(module, "Log", (PyObject *)&LogType) < 0 ||
        PyModule_AddObjectRef(module, "Mutex", (PyObject *)&MutexType) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
