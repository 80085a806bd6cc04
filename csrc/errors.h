// SPDX-License-Identifier: Apache-2.0
// What C++ throws for wrong arguments, and the Python class each becomes: std::invalid_argument is
// ValueError, std::out_of_range IndexError, TypeMismatch TypeError. Torch-free.

#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace llmdd {

class TypeMismatch : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// All parts, one after the other.
template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Throws Error with the text of all parts unless `condition`.
template <class Error, class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (!condition) {
    throw Error(text_of(parts...));
  }
}

template <class... Parts>
inline void check_value(bool condition, const Parts&... parts) {
  check<std::invalid_argument>(condition, parts...);
}

template <class... Parts>
inline void check_index(bool condition, const Parts&... parts) {
  check<std::out_of_range>(condition, parts...);
}

}  // namespace llmdd
