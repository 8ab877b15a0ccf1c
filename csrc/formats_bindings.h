// The Python face of the table of formats.
#pragma once

#include <pybind11/pybind11.h>

void bind_formats(pybind11::module_& m);
