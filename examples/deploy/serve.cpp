// Runs an AOTInductor package without Python: serve MODEL.pt2 INPUT.bin OUTPUT.bin SIZE..
//
// INPUT.bin holds float32 numbers of shape SIZE.., rows in order; the model's output is written to OUTPUT.bin likewise.
// The package calls perceiver_fast's operators, which libperceiver_fast.so registers as it is loaded: this program links
// to it and calls nothing in it.
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <fstream>
#include <functional>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

int main(int count, char** words) {
  if (count < 5) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 INPUT.bin OUTPUT.bin SIZE..\n"
                 "expected a package of AOTInductor, float32 numbers of shape SIZE.., a file to write to, and that shape\n", words[0]);
    return 2;
  }
  try {
    std::vector<int64_t> shape;
    for (int i = 4; i < count; ++i) shape.push_back(std::stoll(words[i]));
    const int64_t numbers = std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<>());
    std::ifstream in(words[2], std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    if (int64_t(bytes.size()) != numbers * int64_t(sizeof(float)))
      throw std::runtime_error(std::string(words[2]) + ": expected " + std::to_string(numbers * sizeof(float)) +
                               " bytes for that shape, got " + std::to_string(bytes.size()));

    const c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader model(words[1]);
    const at::Tensor output = model.run({at::from_blob(bytes.data(), shape, at::kFloat)}).at(0).contiguous();

    std::ofstream(words[3], std::ios::binary)
        .write(static_cast<const char*>(output.const_data_ptr()), output.numel() * output.element_size());
    std::printf("output of shape");
    for (const int64_t size : output.sizes()) std::printf(" %lld", static_cast<long long>(size));
    std::printf("\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
