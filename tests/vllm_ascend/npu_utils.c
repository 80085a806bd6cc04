// SPDX-License-Identifier: Apache-2.0
// Stands for the extension that triton-ascend compiles against CANN's headers when it starts. Kernels run in Triton's interpreter, which asks
// for the chip's name and the number of its cores only.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyObject* get_aicore_num(PyObject* self, PyObject* unused) { return PyLong_FromLong(24); }

static PyObject* get_arch(PyObject* self, PyObject* unused) {
  return PyUnicode_FromString("Ascend910B1");
}

static PyObject* set_device_limit(PyObject* self, PyObject* unused) { Py_RETURN_NONE; }

static PyObject* load_kernel_binary(PyObject* self, PyObject* unused) {
  PyErr_SetString(PyExc_RuntimeError, "a simulated NPU runs no kernel in binary form: set TRITON_INTERPRET=1");
  return NULL;
}

static PyMethodDef methods[] = {
    {"get_aicore_num", get_aicore_num, METH_VARARGS, "Number of its AI cores."},
    {"get_arch", get_arch, METH_VARARGS, "Name of the chip."},
    {"set_device_limit", set_device_limit, METH_VARARGS, "Nothing."},
    {"load_kernel_binary", load_kernel_binary, METH_VARARGS, "An error."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "npu_utils", NULL, -1, methods};

PyMODINIT_FUNC PyInit_npu_utils(void) { return PyModule_Create(&module); }
