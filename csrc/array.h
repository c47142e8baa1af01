// Arrays from Python through DLPack, without linking against any framework.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>
#include <string>

namespace atman {

struct Array {
  std::string name;
  void* data = nullptr;
  int ndim = 0;
  int64_t shape[4] = {};
  int64_t stride[4] = {};
  nanobind::dlpack::dtype dtype{};
  // Keeps the exported view alive where the exporter hands out no borrowed one.
  std::optional<nanobind::ndarray<>> owner;

  // Reads a tensor of at most four dimensions in CPU memory. Throws nanobind::value_error and nanobind::type_error.
  Array(std::string name, nanobind::handle object);

  std::string shape_text() const;
  [[noreturn]] void reject(const std::string& problem) const;
};

}  // namespace atman
