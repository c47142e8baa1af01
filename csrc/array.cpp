#include "array.h"

namespace nb = nanobind;

namespace atman {
namespace {

// The head of DLPackExchangeAPI (DLPack 1.2), which PyTorch puts on its tensor type: a borrowed view costs some 50 ns,
// the `__dlpack__` protocol some 2 us and a detached copy of the tensor.
struct ExchangeApi {
  struct {
    struct {
      uint32_t major, minor;
    } version;
    void* previous;
  } header;
  void* allocate;
  void* from_python;
  void* to_python;
  int (*view_from_python)(void* object, nb::dlpack::dltensor* out);
};

const ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* known_type = nullptr;
  static const ExchangeApi* known_api = nullptr;
  if (type == known_type) return known_api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (api == nullptr) PyErr_Clear();
  if (api == nullptr || api->header.version.major != 1 || api->view_from_python == nullptr) return nullptr;
  // The type stays alive: its module is never unloaded while extension calls with its tensors are made.
  known_type = type;
  known_api = api;
  return api;
}

}  // namespace

Array::Array(std::string name_, nb::handle object) : name(std::move(name_)) {
  nb::dlpack::dltensor view{};
  if (const ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
    if (api->view_from_python(object.ptr(), &view) != 0) throw nb::python_error();
    dtype = view.dtype;
    ndim = view.ndim;
    data = static_cast<char*>(view.data) + view.byte_offset;
    if (view.device.device_type != nb::device::cpu::value) reject("is not in CPU memory");
    if (ndim > 4) reject("has " + std::to_string(ndim) + " dimensions");
    int64_t dense = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      shape[i] = view.shape[i];
      stride[i] = view.strides != nullptr ? view.strides[i] : dense;
      dense *= shape[i];
    }
    return;
  }
  nb::object plain = nb::hasattr(object, "detach") ? object.attr("detach")() : nb::borrow(object);
  nb::ndarray<> array;
  if (!nb::try_cast(plain, array)) throw nb::type_error((name + " is not an array that speaks DLPack").c_str());
  owner = std::move(array);
  dtype = owner->dtype();
  ndim = static_cast<int>(owner->ndim());
  data = owner->data();
  if (owner->device_type() != nb::device::cpu::value) reject("is not in CPU memory");
  if (ndim > 4) reject("has " + std::to_string(ndim) + " dimensions");
  for (int i = 0; i < ndim; ++i) {
    shape[i] = static_cast<int64_t>(owner->shape(static_cast<size_t>(i)));
    stride[i] = owner->stride(static_cast<size_t>(i));
  }
}

std::string Array::shape_text() const {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + ")";
}

void Array::reject(const std::string& problem) const { throw nb::value_error((name + " " + problem).c_str()); }

}  // namespace atman
