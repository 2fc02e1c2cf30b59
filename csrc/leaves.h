// Lists of what belongs to the leaves of a state, for the operators that take all leaves at once.

#pragma once

#include <iterator>

#include "boxing.h"
#include "operands.h"

namespace rampde {

// `items` hold as many for each of `leaves` leaves, one leaf after the other: the number of each
template <class Item>
size_t count_of_leaf(const Argument& argument, const std::vector<Item>& items, size_t leaves) {
  check(leaves == 0 ? items.empty() : items.size() % leaves == 0, argument, " has ", items.size(),
        " tensors, expected a multiple of the number of leaves, ", leaves);
  return leaves == 0 ? 0 : items.size() / leaves;
}

template <class Item>
void check_one_of_leaf(const Argument& argument, const std::vector<Item>& items, size_t leaves) {
  check(items.size() == leaves, argument, " has ", items.size(),
        " elements, expected one for each of ", leaves, " leaves");
}

// what all leaves have, or none
inline void check_optional_leaves(const Argument& argument, const TensorList& items,
                                  size_t leaves) {
  if (!items.empty()) check_one_of_leaf(argument, items, leaves);
}

// a product of each stage that has a coefficient, leaf after leaf
inline void check_leaf_products(const char* op, const OptionalTensorList& vjps,
                                const std::vector<double>& a, size_t leaves) {
  check(vjps.size() == a.size() * leaves, Argument{op, "vjps"}, " has ", vjps.size(),
        " elements, expected one for each of ", a.size(), " coefficients and ", leaves, " leaves");
}

// PyTorch's number of the dtype of each leaf, given by its place in DType
inline std::vector<DTypeArgument> read_dtypes(const char* op, const std::vector<int64_t>& places,
                                              size_t leaves) {
  check_one_of_leaf({op, "dtypes"}, places, leaves);
  std::vector<DTypeArgument> dtypes;
  dtypes.reserve(leaves);
  for (int64_t place : places) {
    check(place >= 0 && place < kDTypes, Argument{op, "dtypes"}, " has ", place,
          ", expected a place among float64, float32, float16 and bfloat16, 0 to ", kDTypes - 1);
    dtypes.push_back({kDTypeNumbers.number[place]});
  }
  return dtypes;
}

// takes out of `items` those of a leaf, of which there are `count`
template <class Item>
std::vector<Item> take_leaf(std::vector<Item>& items, size_t leaf, size_t count) {
  const auto first = std::make_move_iterator(items.begin() + leaf * count);
  return std::vector<Item>(first, first + count);
}

// takes the item of a leaf out of `items`, which may be empty for all leaves
inline std::optional<Tensor> take_optional(TensorList& items, size_t leaf) {
  if (items.empty()) return std::nullopt;
  return std::move(items[leaf]);
}

// The vector-Jacobian products that a leaf has; `weights`, where given, keep those of the present.
inline TensorList take_present(OptionalTensorList& items, size_t leaf, size_t count,
                               std::vector<double>* weights = nullptr) {
  TensorList present;
  present.reserve(count);
  for (size_t j = 0; j < count; ++j) {
    std::optional<Tensor>& item = items[leaf * count + j];
    if (!item) continue;
    if (weights != nullptr) (*weights)[present.size()] = (*weights)[j];
    present.push_back(*std::move(item));
  }
  if (weights != nullptr) weights->resize(present.size());
  return present;
}

}  // namespace rampde
