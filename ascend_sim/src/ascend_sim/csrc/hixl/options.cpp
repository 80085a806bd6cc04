// SPDX-License-Identifier: Apache-2.0
#include "options.h"

#include <arpa/inet.h>

#include <regex>
#include <set>

#include "json.h"

namespace ascend_sim::hixl {
namespace {

using Texts = std::map<std::string, std::string>;

const char* const kFabricMem = "EnableUseFabricMem";
const char* const kTrafficClass = "RdmaTrafficClass";
const char* const kServiceLevel = "RdmaServiceLevel";
const char* const kBufferPool = "BufferPool";
const char* const kResourceConfig = "GlobalResourceConfig";
const char* const kAutoConnect = "AutoConnect";
const char* const kLocalCommRes = "LocalCommRes";

// Members of GlobalResourceConfig, and theirs.
const std::map<std::string, std::set<std::string>> kResourceMembers = {
    {"fabric_memory", {"max_capacity", "start_address", "task_stream_num", "enable_aicpu_unfold"}},
    {"connect_pool", {"thread_num", "task_queue_capacity"}},
    {"comm_resource_config", {"protocol_desc", "listen_port", "qos", "max_active_channels"}},
    {"channel_pool", {"max_channel", "high_waterline", "low_waterline"}},
    {"local_comm_res_path", {}},
};

std::string text_of(const Texts& texts, const char* key, const char* otherwise) {
  const auto found = texts.find(key);
  return found == texts.end() ? otherwise : found->second;
}

bool flag(const Texts& texts, const char* key) {
  const std::string text = text_of(texts, key, "0");
  if (text != "0" && text != "1") {
    throw BadArgument(std::string(key) + "='" + text + "' must be \"0\" or \"1\"");
  }
  return text == "1";
}

int number(const Texts& texts, const char* key, int limit) {
  const std::string text = text_of(texts, key, "0");
  if (!std::regex_match(text, std::regex("[0-9]{1,3}")) || std::stoi(text) > limit) {
    throw BadArgument(std::string(key) + "='" + text + "' must be a number in [0, " +
                      std::to_string(limit) + "]");
  }
  return std::stoi(text);
}

bool has_pool(const std::string& text) {
  std::smatch match;
  int count = 0, megabytes = 1;
  if (std::regex_match(text, match, std::regex("([0-9]{1,9}):([0-9]{1,9})"))) {
    count = std::stoi(match[1]);
    megabytes = std::stoi(match[2]);
  }
  if ((count == 0) != (megabytes == 0)) {
    throw BadArgument(std::string(kBufferPool) + "='" + text +
                      "' must be COUNT:MEGABYTES, or 0:0 for no pool");
  }
  return count > 0;
}

std::map<std::string, JsonMember> json_object(const Texts& texts, const char* key) {
  const std::string text = text_of(texts, key, "");
  if (text.empty()) {
    return {};
  }
  try {
    return parse_json_object(text);
  } catch (const BadArgument& error) {
    throw BadArgument(std::string(key) + ": " + error.what());
  }
}

// Refuses unknown members, nested ones and those spelt with a dot.
void check_resource_config(const std::map<std::string, JsonMember>& members) {
  for (const auto& [key, value] : members) {
    const size_t dot = key.find('.');
    const auto group = kResourceMembers.find(key.substr(0, dot));
    std::set<std::string> names;
    if (dot != std::string::npos) {
      names.insert(key.substr(dot + 1));
    }
    for (const auto& [name, inner] : value.members) {
      names.insert(name);
    }
    bool known = group != kResourceMembers.end();
    for (const std::string& name : names) {
      known = known && group->second.count(name) != 0;
    }
    if (!known) {
      throw BadArgument(std::string(kResourceConfig) + " has an unknown member " + key);
    }
  }
}

}  // namespace

Options Options::parse(const Texts& texts) {
  static const std::set<std::string> known = {kFabricMem,   kTrafficClass,   kServiceLevel,
                                              kBufferPool,  kResourceConfig, kAutoConnect,
                                              kLocalCommRes};
  for (const auto& [key, text] : texts) {
    if (known.count(key) == 0) {
      throw BadArgument("unknown option " + key);
    }
  }
  if (number(texts, kTrafficClass, 255) % 4 != 0) {
    throw BadArgument(std::string(kTrafficClass) + " must be a multiple of 4");
  }
  number(texts, kServiceLevel, 7);
  check_resource_config(json_object(texts, kResourceConfig));
  const auto resources = json_object(texts, kLocalCommRes);
  const auto version = resources.find("version");
  Options options;
  options.fabric_mem = flag(texts, kFabricMem);
  options.staging = has_pool(text_of(texts, kBufferPool, "4:8"));
  options.auto_connect = flag(texts, kAutoConnect);
  options.client_server = version != resources.end() && version->second.text == "1.3";
  return options;
}

Address parse_engine(const std::string& name) {
  static const std::regex form(R"((?:\[([^\]]*)\]|([^:]*))(?::([0-9]{1,5}))?)");
  std::smatch match;
  if (!std::regex_match(name, match, form)) {
    throw BadArgument("engine '" + name + "' is not of the form \"ip:port\" or \"[ipv6]:port\"");
  }
  const bool is_six = match[1].matched;
  const std::string host = is_six ? match[1] : match[2];
  in6_addr parsed;
  if (inet_pton(is_six ? AF_INET6 : AF_INET, host.c_str(), &parsed) != 1) {
    throw BadArgument("engine '" + name + "': '" + host + "' is no address");
  }
  const long port = match[3].matched ? std::stol(match[3]) : 0;
  if (port >= 1 << 16) {
    throw BadArgument("engine '" + name + "': the port is out of range [0, 65535]");
  }
  return {host, static_cast<uint16_t>(port)};
}

}  // namespace ascend_sim::hixl
