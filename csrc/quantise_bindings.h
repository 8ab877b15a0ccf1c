// The Python face of the converter's quantiser.
#pragma once

#include <pybind11/pybind11.h>

void bind_quantise(pybind11::module_& m);
