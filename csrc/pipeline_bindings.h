// The Python face of what copies experts to a device.
#pragma once

#include <pybind11/pybind11.h>

void bind_pipeline(pybind11::module_& m);
