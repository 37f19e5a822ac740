// ZipCache on CPU: what Python calls. Work is cut in a way that depends on a request alone, so
// neither other requests nor the number of threads change a result.

#include "attend.h"
#include "write.h"

namespace zipcache {
namespace {

template <template <class> class Kernels, class Use>
void with_dtype(const Layer& l, Use use) {
  switch (l.dtype) {
    case kBFloat16: use(Kernels<hip::BFloat16>(l)); break;
    case kFloat16: use(Kernels<_Float16>(l)); break;
    default: use(Kernels<float>(l));
  }
}

}  // namespace
}  // namespace zipcache

using zipcache::Batch;
using zipcache::Layer;
using zipcache::Seals;

extern "C" int zipcache_call_size() { return sizeof(Layer) + sizeof(Batch) + sizeof(Seals); }

extern "C" int64_t zipcache_page_size(const Layer* layer) {
  return zipcache::Format(*layer).size();
}

extern "C" void zipcache_write(const Layer* layer, const Batch* batch) {
  zipcache::with_dtype<zipcache::Writer>(*layer, [&](auto kernels) { kernels.write(*batch); });
}

extern "C" void zipcache_attend(const Layer* layer, const Batch* batch) {
  zipcache::with_dtype<zipcache::Attention>(*layer, [&](auto kernels) { kernels.attend(*batch); });
}

extern "C" void zipcache_seal(const Layer* layer, const Seals* seals) {
  zipcache::with_dtype<zipcache::Writer>(*layer, [&](auto kernels) { kernels.seal(*seals); });
}
