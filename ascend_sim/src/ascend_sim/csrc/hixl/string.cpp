// SPDX-License-Identifier: Apache-2.0
// ge::AscendString. This file is compiled for the old C++ ABI, as CANN's base libraries are.
#include "public.h"

namespace ge {

AscendString::AscendString() = default;
AscendString::AscendString(const char* text)
    : text_(text == nullptr ? nullptr : std::make_shared<std::string>(text)) {}
AscendString::~AscendString() = default;

const char* AscendString::GetString() const { return text_ == nullptr ? "" : text_->c_str(); }

bool AscendString::operator<(const AscendString& other) const {
  return std::string(GetString()) < std::string(other.GetString());
}

}  // namespace ge
