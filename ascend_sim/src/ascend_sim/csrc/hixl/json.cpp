// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <cctype>
#include <cstring>

#include "common.h"

namespace ascend_sim::hixl {
namespace {

constexpr int kMaxDepth = 64;

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  JsonMember whole() {
    JsonMember value = parse_value(0);
    skip_spaces();
    if (at_ != text_.size()) {
      fail();
    }
    return value;
  }

 private:
  [[noreturn]] void fail() const {
    throw BadArgument("no JSON at character " + std::to_string(at_));
  }

  void skip_spaces() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_]) != nullptr) {
      ++at_;
    }
  }

  bool take(char wanted) {
    skip_spaces();
    if (at_ < text_.size() && text_[at_] == wanted) {
      ++at_;
      return true;
    }
    return false;
  }

  void need(char wanted) {
    if (!take(wanted)) {
      fail();
    }
  }

  std::string parse_string() {
    need('"');
    std::string value;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\' && ++at_ == text_.size()) {
        fail();
      }
      value += text_[at_++];
    }
    if (at_ == text_.size()) {
      fail();
    }
    ++at_;
    return value;
  }

  JsonMember parse_value(int depth) {
    if (depth > kMaxDepth) {
      fail();
    }
    skip_spaces();
    if (at_ == text_.size()) {
      fail();
    }
    if (text_[at_] == '{') {
      return parse_object(depth);
    }
    if (text_[at_] == '[') {
      ++at_;
      if (!take(']')) {
        do {
          parse_value(depth + 1);
        } while (take(','));
        need(']');
      }
      return {false, "[]", {}};
    }
    if (text_[at_] == '"') {
      return {false, parse_string(), {}};
    }
    return {false, parse_word(), {}};
  }

  JsonMember parse_object(int depth) {
    JsonMember object{true, "{}", {}};
    need('{');
    if (take('}')) {
      return object;
    }
    do {
      skip_spaces();
      std::string name = parse_string();
      need(':');
      object.members[std::move(name)] = parse_value(depth + 1);
    } while (take(','));
    need('}');
    return object;
  }

  std::string parse_word() {
    std::string word;
    while (at_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[at_])) != 0 ||
                                  std::strchr("+-.", text_[at_]) != nullptr)) {
      word += text_[at_++];
    }
    const bool is_number = !word.empty() && (word[0] == '-' || std::isdigit(word[0]) != 0);
    if (!is_number && word != "true" && word != "false" && word != "null") {
      fail();
    }
    return word;
  }

  const std::string& text_;
  size_t at_ = 0;
};

}  // namespace

std::map<std::string, JsonMember> parse_json_object(const std::string& text) {
  JsonMember value = Parser(text).whole();
  if (!value.is_object) {
    throw BadArgument("it must be a JSON object");
  }
  return value.members;
}

}  // namespace ascend_sim::hixl
