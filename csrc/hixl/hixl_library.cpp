// SPDX-License-Identifier: Apache-2.0
#include "hixl_library.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

namespace llmdd::hixl {
namespace {

struct Loaded {
  Members members{};
  std::string path;
  std::string why;
  bool done = false;
};

Loaded& loaded() {
  static Loaded* const one = new Loaded;  // used until the process ends
  return *one;
}

// One caller after the other. Not std::mutex: where this is compiled for an older glibc,
// libstdc++'s header of it wants one of 2.32.
struct Lock {
  static inline pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  Lock() { pthread_mutex_lock(&mutex); }
  ~Lock() { pthread_mutex_unlock(&mutex); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
};

// What the compiler makes of the members' declarations (tests compare it).
#define TEXT_TYPE "N2ge12AscendStringE"

template <typename Function>
void look_up(void* library, const char* mangled, Function* member, std::string* missing) {
  *member = reinterpret_cast<Function>(dlsym(library, mangled));
  if (*member == nullptr && missing != nullptr) {
    *missing += *missing == "" ? "" : ", ";
    *missing += mangled;
  }
}

std::string look_up_all(void* library, Members* all) {
  std::string missing;
  look_up(library, "_ZN2ge12AscendStringC1EPKc", &all->text_construct, &missing);
  look_up(library, "_ZN2ge12AscendStringD1Ev", &all->text_destroy, nullptr);
  look_up(library, "_ZNK2ge12AscendStringltERKS0_", &all->text_less, &missing);
  look_up(library, "_ZN4hixl4HixlC1Ev", &all->construct, &missing);
  look_up(library, "_ZN4hixl4HixlD1Ev", &all->destroy, &missing);
  look_up(library,
          "_ZN4hixl4Hixl10InitializeERKN2ge12AscendStringERKSt3mapIS2_S2_St4lessIS2_ESaISt4pairIS3_"
          "S2_EEE",
          &all->initialize, &missing);
  look_up(library, "_ZN4hixl4Hixl8FinalizeEv", &all->finalize, &missing);
  look_up(library, "_ZN4hixl4Hixl11RegisterMemERKNS_7MemDescENS_7MemTypeERPv",
          &all->register_memory, &missing);
  look_up(library, "_ZN4hixl4Hixl13DeregisterMemEPv", &all->deregister_memory, &missing);
  look_up(library, "_ZN4hixl4Hixl7ConnectERKN2ge12AscendStringEi", &all->connect, &missing);
  look_up(library, "_ZN4hixl4Hixl10DisconnectERKN2ge12AscendStringEi", &all->disconnect, &missing);
  look_up(library,
          "_ZN4hixl4Hixl13TransferAsyncERKN2ge12AscendStringENS_10TransferOpERKSt6vectorINS_"
          "14TransferOpDescESaIS7_EERKNS_12TransferArgsERPv",
          &all->transfer, &missing);
  look_up(library, "_ZN4hixl4Hixl17GetTransferStatusERKPvRNS_14TransferStatusE",
          &all->transfer_state, &missing);
  look_up(library, "_ZN4hixl4Hixl13GetCapabilityENS_11FeatureTypeERi", &all->capability, nullptr);
  return missing.empty() ? "" : "it lacks " + missing;
}

}  // namespace

Text::Text(const char* text) { members().text_construct(bytes_, text); }

Text::~Text() {
  // A destructor that CANN's headers define inline is in no library: then the text, of some dozen
  // bytes, stays for good.
  if (members().text_destroy != nullptr) {
    members().text_destroy(bytes_);
  }
}

bool Text::operator<(const Text& other) const { return members().text_less(bytes_, other.bytes_); }

const char* load(const char* name) {
  const Lock lock;
  Loaded& one = loaded();
  if (one.done) {
    return nullptr;
  }
  void* library = dlopen(name, RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) {
    one.why = dlerror();
    return one.why.c_str();
  }
  link_map* map = nullptr;
  if (dlinfo(library, RTLD_DI_LINKMAP, &map) == 0) {
    one.path = map->l_name;
  }
  one.why = look_up_all(library, &one.members);
  if (!one.why.empty()) {
    one.why = one.path + ": " + one.why;
    dlclose(library);
    return one.why.c_str();
  }
  one.done = true;
  return nullptr;
}

const Members& members() { return loaded().members; }

const char* path() { return loaded().path.c_str(); }

}  // namespace llmdd::hixl
