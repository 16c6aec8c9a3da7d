/* The Python side of the kernels: numbers in, addresses among them. The callers in swarm/kernels own every check. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

#if HAS_KERNELS

#define MAX_THREADS 64

static int integers(PyObject *const *args, int count, int64_t *into) {
    for (int i = 0; i < count; i++) {
        into[i] = (int64_t)PyLong_AsUnsignedLongLong(args[i]);
        if (into[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

static int at_most(int64_t threads) { return threads < MAX_THREADS ? (int)threads : MAX_THREADS; }

static PyObject *py_linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int64_t v[9];
    if (count != 9) {
        PyErr_SetString(PyExc_TypeError, "linear takes 9 numbers");
        return NULL;
    }
    if (integers(args, 9, v)) return NULL;
    const Product p = {(const float *)v[0], (const char *)v[1], (const float *)v[2], (float *)v[3], v[4], v[5], v[6],
                       (int)v[7]};
    Py_BEGIN_ALLOW_THREADS
    multiply(&p, at_most(v[8]));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_decode(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int64_t v[16];
    if (count != 18) {
        PyErr_SetString(PyExc_TypeError, "decode takes 18 numbers");
        return NULL;
    }
    if (integers(args, 16, v)) return NULL;
    const float eps = (float)PyFloat_AsDouble(args[16]), scale = (float)PyFloat_AsDouble(args[17]);
    if (PyErr_Occurred()) return NULL;
    const Shape shape = {v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], eps, scale, (int)v[14], at_most(v[15])};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = decode((const Layer *)v[0], (const Slab *)v[1], v[2], &shape, (float *)v[3], (const float *)v[4],
                    (const float *)v[5]);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_is_supported(PyObject *self, PyObject *none) {
    __builtin_cpu_init();
    return PyBool_FromLong(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c"));
}

#else

static PyObject *py_linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    PyErr_SetString(PyExc_NotImplementedError, "there are no kernels for this processor");
    return NULL;
}

#define py_decode py_linear

static PyObject *py_is_supported(PyObject *self, PyObject *none) { Py_RETURN_FALSE; }

#endif

#define FAST(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef methods[] = {
    {"linear", FAST(py_linear), METH_FASTCALL, "linear(x, w, bias, y, rows, out, in, is_half, threads)"},
    {"decode", FAST(py_decode), METH_FASTCALL,
     "decode(layers, slabs, count, x, cos, sin, rows, hidden, heads, kv_heads, dim, intermediate, position, capacity, "
     "is_half, threads, eps, scale)"},
    {"is_supported", py_is_supported, METH_NOARGS, "Whether this processor can run the kernels."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
