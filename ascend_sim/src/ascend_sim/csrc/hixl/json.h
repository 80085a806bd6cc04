// SPDX-License-Identifier: Apache-2.0
// As much of JSON as the options need: an object's members, checked for their form.
#pragma once

#include <map>
#include <string>

namespace ascend_sim::hixl {

struct JsonMember {
  bool is_object;
  std::string text;                           // a string's characters, else the value as written
  std::map<std::string, JsonMember> members;  // of an object
};

// The members of the object that a text is. Throws BadArgument if it isn't one.
std::map<std::string, JsonMember> parse_json_object(const std::string& text);

}  // namespace ascend_sim::hixl
