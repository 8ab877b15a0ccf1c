// The Python face of training.
#pragma once

#include <pybind11/pybind11.h>

void bind_training(pybind11::module_& m);
