// The Python face of adapters that serve.
#pragma once

#include <pybind11/pybind11.h>

void bind_adapters(pybind11::module_& m);
