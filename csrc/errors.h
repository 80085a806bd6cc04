// SPDX-License-Identifier: Apache-2.0
// What C++ throws for wrong arguments, and the Python class each becomes: std::invalid_argument is
// ValueError, std::out_of_range IndexError, TypeMismatch TypeError. Torch-free.

#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace llmdd {

class TypeMismatch : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A part of a message; a text must outlive it. Streams would take longer to compile than all else
// here.
class Part {
 public:
  Part(const char* text) : text_(text) {}
  Part(const std::string& text) : text_(text.c_str()) {}
  template <class N, class = std::enable_if_t<std::is_integral_v<N>>>
  Part(N number)
      : is_signed_(std::is_signed_v<N>), number_(static_cast<unsigned long long>(number)) {}
  void append_to(std::string* text) const {
    if (text_ != nullptr) {
      *text += text_;
    } else {
      *text +=
          is_signed_ ? std::to_string(static_cast<long long>(number_)) : std::to_string(number_);
    }
  }

 private:
  const char* text_ = nullptr;
  bool is_signed_ = false;
  unsigned long long number_ = 0;
};

inline std::string joined(std::initializer_list<Part> parts) {
  std::string text;
  for (const Part& part : parts) part.append_to(&text);
  return text;
}

// All parts, one after the other.
template <class... Parts>
inline std::string text_of(const Parts&... parts) {
  return joined({parts...});
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
