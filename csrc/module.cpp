// The Python side of rampde._C: an empty module. Importing it runs the static initialisers of the
// other files, and these register the kernels with PyTorch's dispatcher.

#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
