/* The Python side of the kernels: numbers in, addresses among them. The callers in swarm/kernels own every check. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

#if HAS_KERNELS

#define MAX_THREADS 64
#define ATTENTION_NUMBERS 8
#define SEGMENTS_NUMBERS 5

static const Kernels *kernels;

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}

/* `whole` integers and then `real` floats; 0, or -1 with an exception set. */
static int numbers(PyObject *const *args, Py_ssize_t count, int whole, int64_t *v, int real, float *f) {
    if (!kernels || count != whole + real) {
        PyErr_Format(PyExc_TypeError, "the kernel takes %d numbers, on a processor that has it", whole + real);
        return -1;
    }
    for (int i = 0; i < whole; i++) v[i] = (int64_t)PyLong_AsUnsignedLongLong(args[i]);
    for (int i = 0; i < real; i++) f[i] = (float)PyFloat_AsDouble(args[whole + i]);
    return PyErr_Occurred() ? -1 : 0;
}

static int at_most(int64_t threads) { return threads < MAX_THREADS ? (int)threads : MAX_THREADS; }

static PyObject *outcome(int failed) {
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static Attention attention_of(const int64_t *v, const float *f) {
    const Attention a = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], f[0], f[1], (const float *)v[7]};
    return a;
}

static Segments segments_of(const int64_t *v) {
    const Segments s = {v[0], v[1], (const int32_t *)v[2], (const int32_t *)v[3], (const int32_t *)v[4]};
    return s;
}

static PyObject *py_multiply(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int64_t v[9];
    if (numbers(args, count, 9, v, 0, NULL)) return NULL;
    const Product p = {(const float *)v[0], (const char *)v[1], (const float *)v[2], (float *)v[3], v[4], v[5], v[6],
                       (int)v[7], 0};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = kernels->multiply(&p, 1, at_most(v[8]));
    Py_END_ALLOW_THREADS
    return outcome(failed);
}

static PyObject *py_append(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int64_t v[ATTENTION_NUMBERS + SEGMENTS_NUMBERS + 4];
    float f[2];
    if (numbers(args, count, ATTENTION_NUMBERS + SEGMENTS_NUMBERS + 4, v, 2, f)) return NULL;
    const int64_t *rest = v + ATTENTION_NUMBERS + SEGMENTS_NUMBERS;
    const Attention a = attention_of(v, f);
    const Segments s = segments_of(v + ATTENTION_NUMBERS);
    const Pages p = {(float *)rest[0], (float *)rest[1]};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = kernels->append(&a, &s, &p, (const float *)rest[2], (const float *)rest[3]);
    Py_END_ALLOW_THREADS
    return outcome(failed);
}

static PyObject *py_attend(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int64_t v[ATTENTION_NUMBERS + SEGMENTS_NUMBERS + 5];
    float f[2];
    if (numbers(args, count, ATTENTION_NUMBERS + SEGMENTS_NUMBERS + 5, v, 2, f)) return NULL;
    const int64_t *rest = v + ATTENTION_NUMBERS + SEGMENTS_NUMBERS;
    const Attention a = attention_of(v, f);
    const Segments s = segments_of(v + ATTENTION_NUMBERS);
    const Pages p = {(float *)rest[0], (float *)rest[1]};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = kernels->attend(&a, &s, &p, (const float *)rest[2], (float *)rest[3], at_most(rest[4]));
    Py_END_ALLOW_THREADS
    return outcome(failed);
}

static PyObject *py_run_layers(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int64_t v[ATTENTION_NUMBERS + SEGMENTS_NUMBERS + 11];
    float f[3];
    if (numbers(args, count, ATTENTION_NUMBERS + SEGMENTS_NUMBERS + 11, v, 3, f)) return NULL;
    const int64_t *rest = v + ATTENTION_NUMBERS + SEGMENTS_NUMBERS;
    const Attention a = attention_of(v, f);
    const Segments s = segments_of(v + ATTENTION_NUMBERS);
    const Shape shape = {rest[6], rest[7], rest[8], f[2], (int)rest[9], at_most(rest[10])};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = kernels->run_layers((const Layer *)rest[0], (const Pages *)rest[1], rest[2], &shape, &a, &s,
                                 (float *)rest[3], (const float *)rest[4], (const float *)rest[5]);
    Py_END_ALLOW_THREADS
    return outcome(failed);
}

static PyObject *py_instruction_sets(PyObject *self, PyObject *none) {
    if (has_avx512()) return Py_BuildValue("(ss)", "avx2", "avx512");
    return has_avx2() ? Py_BuildValue("(s)", "avx2") : PyTuple_New(0);
}

static PyObject *py_use(PyObject *self, PyObject *name) {
    if (PyUnicode_CompareWithASCIIString(name, "avx2") == 0 && has_avx2()) kernels = &avx2_kernels;
    else if (PyUnicode_CompareWithASCIIString(name, "avx512") == 0 && has_avx512()) kernels = &avx512_kernels;
    else return PyErr_Format(PyExc_ValueError, "this processor does not have %R", name);
    Py_RETURN_NONE;
}

static void choose(void) {
    __builtin_cpu_init();
    kernels = has_avx512() ? &avx512_kernels : has_avx2() ? &avx2_kernels : NULL;
}

#else

static PyObject *py_multiply(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    PyErr_SetString(PyExc_NotImplementedError, "there are no kernels for this processor");
    return NULL;
}

#define py_append py_multiply
#define py_attend py_multiply
#define py_run_layers py_multiply

static PyObject *py_instruction_sets(PyObject *self, PyObject *none) { return PyTuple_New(0); }

static PyObject *py_use(PyObject *self, PyObject *name) { return py_multiply(self, NULL, 0); }

static void choose(void) {}

#endif

#define FAST(function) ((PyCFunction)(void (*)(void))function)
#define ATTENTION "heads, kv_heads, key_dim, value_dim, value_stride, window, chunk, sinks, "
#define SEGMENTS "segments, table_stride, starts, firsts, tables, "

static PyMethodDef methods[] = {
    {"multiply", FAST(py_multiply), METH_FASTCALL, "multiply(x, w, bias, y, rows, out, in, is_half, threads)"},
    {"append", FAST(py_append), METH_FASTCALL,
     "append(" ATTENTION SEGMENTS "key_pages, value_pages, keys, values, scale, softcap)"},
    {"attend", FAST(py_attend), METH_FASTCALL,
     "attend(" ATTENTION SEGMENTS "key_pages, value_pages, query, out, threads, scale, softcap)"},
    {"run_layers", FAST(py_run_layers), METH_FASTCALL,
     "run_layers(" ATTENTION SEGMENTS "layers, pages, count, x, cos, sin, rows, hidden, intermediate, is_half, threads, "
     "scale, softcap, eps)"},
    {"instruction_sets", py_instruction_sets, METH_NOARGS, "The ones that there are kernels for on this processor."},
    {"use", py_use, METH_O, "use(name): compute with one of `instruction_sets`; the last one is used otherwise."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    choose();
    return PyModule_Create(&definition);
}
