// From PyTorch's stack of arguments to a typed function. TORCH_BOX of the stable interface does the
// same for torch::stable::Tensor; this one serves rampde::Tensor and copies no argument. A function
// may take items out of a list that it takes by reference to other than const.

#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "tensor.h"

namespace rampde {

// An argument or result as the stack holds it, and as the operators take it.
template <class T>
struct Boxed {
  static T unbox(StableIValue value) { return torch::stable::detail::to<T>(value); }
};

template <>
struct Boxed<Tensor> {
  static Tensor unbox(StableIValue value) {
    return Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
  }
  static StableIValue box(Tensor tensor) { return torch::stable::detail::from(tensor.release()); }
};

template <>
struct Boxed<std::optional<Tensor>> {
  static std::optional<Tensor> unbox(StableIValue value) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
    if (!handle.has_value()) return std::nullopt;
    return std::optional<Tensor>(std::in_place, *handle);
  }
};

template <class T>
struct Boxed<std::vector<T>> {
  static std::vector<T> unbox(StableIValue value) {
    const auto list = torch::stable::detail::to<StableListHandle>(value);
    size_t size = 0;
    check_shim(torch_list_size(list, &size), "read the length of a list");
    std::vector<T> items;
    items.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      check_shim(torch_list_get_item(list, i, &item), "read an item of a list");
      items.push_back(Boxed<T>::unbox(item));
    }
    check_shim(torch_delete_list(list), "free a list");
    return items;
  }
  static StableIValue box(std::vector<T> items) {
    StableListHandle list;
    check_shim(torch_new_list_reserve_size(items.size(), &list), "make a list");
    for (T& item : items) {
      check_shim(torch_list_push_back(list, Boxed<T>::box(std::move(item))), "append to a list");
    }
    return torch::stable::detail::from(list);
  }
};

// dtypes arrive as PyTorch's numbers: an operator says which it supports
struct DTypeArgument {
  int32_t number;
};

template <>
struct Boxed<DTypeArgument> {
  static DTypeArgument unbox(StableIValue value) {
    return {torch::stable::detail::to<int32_t>(value)};
  }
};

template <class Function>
struct Boxer;

template <class Result, class... Arguments>
struct Boxer<Result (*)(Arguments...)> {
  template <Result (*function)(Arguments...)>
  static void call(StableIValue* stack, uint64_t, uint64_t) {
    call_with<function>(stack, std::index_sequence_for<Arguments...>());
  }

 private:
  template <Result (*function)(Arguments...), size_t... i>
  static void call_with(StableIValue* stack, std::index_sequence<i...>) {
    // everything on the stack is owned by the callee, hence taken off it before anything can fail
    std::tuple<std::remove_cvref_t<Arguments>...> arguments{
        Boxed<std::remove_cvref_t<Arguments>>::unbox(stack[i])...};
    if constexpr (std::is_void_v<Result>) {
      function(std::get<i>(arguments)...);
    } else {
      stack[0] = Boxed<Result>::box(function(std::get<i>(arguments)...));
    }
  }
};

// `m.impl("name", boxed<&function>)`
template <auto function>
inline constexpr auto boxed = &Boxer<decltype(function)>::template call<function>;

}  // namespace rampde
